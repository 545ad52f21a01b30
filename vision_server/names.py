"""The names of models: which model a caller means by a name, a name@version or an alias."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence

from serving.errors import ServiceError
from vision_server.catalog import plain_name
from vision_server.describers.addresses import RemoteAddress
from vision_server.errors import InvalidField
from vision_server.loaded import Loaded
from vision_server.results import ModelInfo, ModelState, Task

MAX_ALIASES = 8


class ServedModel:
    """A name with what stands behind it: nothing yet, what is loaded, or why it could not be."""

    def __init__(
        self,
        name: str,
        *,
        generates: bool,
        is_told: bool = False,
        is_default: bool = False,
        address: RemoteAddress | None = None,
    ) -> None:
        self.name = name
        self.address = address
        """Where it runs; None: in this process."""
        self.generates = generates
        self.is_told = is_told
        """The operator's settings name it."""
        self.is_default = is_default
        self.loaded: Loaded | None = None
        self.turn = 0
        """The greater, the later it was asked for: of several versions the latest one answers to the bare name."""
        self.step = ModelState.UNLOADED
        self.progress = 0.0
        self.reason = ""
        self.loading: asyncio.Task[ServiceError | None] | None = None
        self.unloading: asyncio.Task[None] | None = None
        self.aliases_to_come: dict[str, None] = {}

    @property
    def state(self) -> ModelState:
        """Where it is in its life; READY as long as it serves, also while it is loaded anew."""
        if self.unloading is not None:
            return ModelState.UNLOADING
        if self.loaded is None:
            return self.step
        return ModelState.FAILED if self.loaded.broken else ModelState.READY

    @property
    def load_progress(self) -> float:
        """0 to 1."""
        return self.progress if self.loading is not None else float(self.state is ModelState.READY)

    @property
    def why(self) -> str:
        """Why it failed; empty otherwise."""
        return (self.loaded.broken if self.loaded is not None else "") or self.reason

    @property
    def depth(self) -> int:
        """Requests that wait for it."""
        return 0 if self.loaded is None else self.loaded.depth

    def take(self) -> Loaded:
        """Parts it from what is loaded."""
        loaded, self.loaded = self.loaded, None
        assert loaded is not None, "asked of what is loaded alone"
        return loaded

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this one's without its version (`cams` of `cams@2`), or with it (`cams@2` of `cams`, which is 2)."""
        return name == self.name.rpartition("@")[0] or self.is_called_by_version(name)

    def is_called_by_version(self, name: str) -> bool:
        """Whether `name` is this one's with the version that is loaded, where that is no part of its name already."""
        base, _, version = name.rpartition("@")
        loaded = self.loaded
        return loaded is not None and loaded.card.version == version and plain_name(base) == plain_name(self.name)


class Names:
    """The models by their names, in the order in which they came."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}  # by plain_name
        self._aliases: dict[str, ServedModel] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(tuple(self._models.values()))

    def add(self, model: ServedModel) -> ServedModel:
        """Makes a model known, unless one of this name is; answers the one that is known then."""
        return self._models.setdefault(plain_name(model.name), model)

    def remove(self, model: ServedModel) -> None:
        """Forgets a model."""
        self._models.pop(plain_name(model.name), None)

    def exactly(self, name: str) -> ServedModel | None:
        """The model of this very name, with or without the ending of its file."""
        return self._models.get(plain_name(name))

    def find(self, name: str) -> ServedModel | None:
        """The model that a caller means: a name goes before an alias, and of several versions the latest one is meant."""
        if (model := self.exactly(name) or self._aliases.get(name)) is not None:
            return model
        return max((model for model in self if model.answers_to(name)), key=lambda model: model.turn, default=None)

    def default(self, *, generates: bool) -> ServedModel | None:
        """The model that answers when a request names none."""
        return next((model for model in self if model.generates == generates and model.is_default), None)

    def aliases_of(self, model: ServedModel) -> tuple[str, ...]:
        """Its other names."""
        return tuple(alias for alias, its in self._aliases.items() if its is model)

    def check_aliases(self, model: ServedModel, aliases: Sequence[str], others: Iterable[str]) -> None:
        """Raises InvalidField: an alias is a model's name (`others` are those that are not loaded), or there are too many."""
        names = {known for name in others for known in (name, name.partition("@")[0])}
        for alias in aliases:
            is_known = self.exactly(alias) or plain_name(alias) == plain_name(model.name)
            if is_known or plain_name(alias) in names or any(known.answers_to(alias) for known in (model, *self)):
                raise InvalidField("aliases", f"has {alias!r}, which is the name of a model.", "Choose another.")
        count = len({*self.aliases_of(model), *model.aliases_to_come, *aliases})
        if count > MAX_ALIASES:
            raise InvalidField(
                "aliases",
                f"would give {model.name!r} {count} names.",
                f"At most {MAX_ALIASES}; they go when the model is unloaded.",
            )

    def give_aliases(self, model: ServedModel) -> None:
        """Lets it answer to the aliases that it was to have, and no other model any more."""
        self._aliases |= dict.fromkeys(model.aliases_to_come, model)
        model.aliases_to_come = {}

    def take_aliases(self, model: ServedModel) -> None:
        """Leaves it its name alone."""
        self._aliases = {alias: its for alias, its in self._aliases.items() if its is not model}

    def info(self, model: ServedModel) -> ModelInfo:
        """A model as callers see it."""
        card = None if model.loaded is None else model.loaded.card
        task = card.task if card else Task.GENERATE if model.generates else Task.UNKNOWN
        return ModelInfo(
            model.name,
            task,
            model.state,
            model.load_progress,
            model.is_default,
            card,
            model.why,
            self.aliases_of(model),
        )
