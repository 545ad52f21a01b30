"""What models lie on this machine, as last seen: the shipped ones and those of the model directories."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

from vision_server.results import ModelInfo, ModelState, Task
from vision_server.weights import Available, WeightsMissing, detector_files, find_here, list_models, model_name


def plain_name(name: str) -> str:
    """The name that `cams` and `cams.pt` share; `cams.onnx` means that file and no other."""
    stem = model_name(name)
    return stem if name == f"{stem}.pt" else name


class Catalog:
    """Remembers what look() saw, so that the event loop need not read the disk. Names are plain_name()s."""

    def __init__(self, model_dir: Path, prefetched_dir: Path | None = None) -> None:
        self._folders = (model_dir, prefetched_dir)
        self._here: Mapping[str, Available] = {}

    async def look(self) -> None:
        """Reads the disk."""
        available = await asyncio.to_thread(list_models, *self._folders)
        self._here = {plain_name(model.name): model for model in available}

    async def generates(self, name: str) -> bool | None:
        """Whether what lies under this name now is a describer (else it is a detector); None: nothing does."""
        return await asyncio.to_thread(_generates, name, *self._folders)

    def __iter__(self) -> Iterator[str]:
        return iter(self._here)

    def __contains__(self, name: str) -> bool:
        return plain_name(name) in self._here

    def info(self, name: str) -> ModelInfo:
        """A model that lies here, as one that is not in memory. Raises KeyError."""
        model = self._here[plain_name(name)]
        task = Task.GENERATE if model.generates else Task.UNKNOWN
        return ModelInfo(model.name, task, ModelState.UNLOADED, 0.0, is_default=False)


def _generates(name: str, model_dir: Path, prefetched_dir: Path | None) -> bool | None:
    try:
        path = find_here(name, model_dir, prefetched_dir)
        if path is not None and (path / "config.json").is_file():
            return True
        return False if detector_files(name, model_dir, prefetched_dir) else None
    except (WeightsMissing, OSError, ValueError):  # leads out of the directory, or is no name that a file can have
        return None
