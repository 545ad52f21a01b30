"""Chooses the next token of each row from the model's scores."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1


class Sampler:
    """How one generation chooses; temperature 0 takes the likeliest.

    Its random numbers are its own and drawn on the CPU: the same seed gives the same numbers on every device, whatever else runs.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int | None) -> None:
        import torch

        self.temperature = temperature
        self.top_p = top_p
        self._generator: torch.Generator | None = None
        if temperature > 0:
            self._generator = torch.Generator(device="cpu")
            self._generator.manual_seed((secrets.randbits(63) if seed is None else seed) & MAX_SEED)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest."""
        return self._generator is None

    def draw(self) -> float:
        """The next random number, 0 up to but not 1."""
        import torch

        return float(torch.rand((), dtype=torch.float64, generator=self._generator))


class NotNumbers(Exception):
    """The model gave scores that are no numbers."""


def choose(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | NotNumbers]:
    """The next token of each row, or what is wrong with its scores (rows × vocabulary, float32, on any device).

    All is computed where the scores are; only the tokens come from there.
    """
    import torch

    with torch.inference_mode():
        best = scores.max(-1)
        # Of a row with NaN the highest is NaN too.
        tokens = torch.where(best.values.isfinite(), best.indices, -1)
        sampling = [row for row, sampler in enumerate(samplers) if not sampler.is_greedy]
        if sampling:
            sampled = _sample(scores[sampling], [samplers[row] for row in sampling])
            tokens[sampling] = torch.where(tokens[sampling] < 0, -1, sampled)
        return [token if token >= 0 else NotNumbers("the model's scores are no numbers") for token in tokens.tolist()]


def _sample(scores: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """A token of each row, by its temperature and nucleus (top_p): where a random number falls among the summed probabilities."""
    import torch

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device)[:, None]

    # The highest becomes 0, so that a tiny temperature makes the others -inf, and nothing infinite.
    scaled = (scores - scores.amax(-1, keepdim=True)) / column([sampler.temperature for sampler in samplers])
    # Sorted also where the nucleus is everything: what a number leads to must not depend on the other rows' options.
    ordered, ids = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    # The token that crosses the border still belongs to the nucleus, so at least one always does.
    top_p = column([sampler.top_p for sampler in samplers])
    outside = (ordered.cumsum(-1) - ordered >= top_p) & (top_p < 1)
    sums = ordered.masked_fill(outside, 0.0).double().cumsum(-1)
    drawn = column([sampler.draw() for sampler in samplers], torch.float64) * sums[:, -1:]
    # The first whose sum is greater: one without probability never is.
    places = torch.searchsorted(sums, drawn, right=True).clamp(max=scores.shape[-1] - 1)
    return ids.gather(-1, places)[:, 0]
