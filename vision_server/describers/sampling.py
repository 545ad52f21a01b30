"""Chooses the next token of each row from the model's scores."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1


class Sampler:
    """Chooses tokens for one generation, with random numbers of its own.

    Temperature 0 takes the likeliest. The same seed gives the same choices whatever else runs, because no generator is
    shared; the choice is made on the CPU in float32, so that it does not depend on the device's generator.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int | None) -> None:
        import torch

        self._temperature = temperature
        self._top_p = top_p
        self._generator: torch.Generator | None = None
        if temperature > 0:
            self._generator = torch.Generator(device="cpu")
            self._generator.manual_seed((secrets.randbits(63) if seed is None else seed) & MAX_SEED)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest."""
        return self._generator is None

    def choose(self, scores: torch.Tensor) -> int:
        """The next token's id. `scores`: logits of one position, float, as long as the vocabulary."""
        import torch

        if self._generator is None:
            return int(scores.argmax())
        scores = scores.detach().float().cpu()
        # The highest becomes 0, so that a tiny temperature makes the others -inf, and nothing infinite.
        probabilities = torch.softmax((scores - scores.max()) / self._temperature, dim=-1)
        ordered, ids = probabilities.sort(descending=True, stable=True)
        if self._top_p < 1:
            # The token that crosses the border still belongs to the nucleus, so at least one always does.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self._top_p, 0.0)
        return int(ids[torch.multinomial(ordered, 1, generator=self._generator)])


class NotNumbers(Exception):
    """The model gave scores that are no numbers."""


def choose(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | Exception]:
    """The next token of each row, or what went wrong with it (`scores`: rows × vocabulary, float32).

    The greedy rows' tokens come from the device in one transfer; only a row that samples brings its scores along.
    """
    import torch

    with torch.inference_mode():
        likeliest, ill = torch.stack([scores.argmax(-1), scores.isnan().any(-1).long()]).tolist()
        chosen: list[int | Exception] = []
        for row, sampler in enumerate(samplers):
            if ill[row]:
                chosen.append(NotNumbers("the model's scores are no numbers"))
            elif sampler.is_greedy:
                chosen.append(likeliest[row])
            else:
                try:
                    chosen.append(sampler.choose(scores[row]))
                except RuntimeError as error:  # all its scores are infinite
                    chosen.append(error)
        return chosen
