"""The Muon optimiser: momentum whose update is made orthogonal before it is applied."""

from collections.abc import Iterable

import torch
from torch import nn

# Coefficients of the quintic Newton-Schulz iteration of Jordan et al., https://kellerjordan.github.io/posts/muon/
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are all about one."""
    tall = matrix.shape[0] > matrix.shape[1]
    work: torch.Tensor = matrix.T if tall else matrix
    work = work / float(work.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = work @ work.T
        work = A * work + (B * gram + C * gram @ gram) @ work
    return work.T.contiguous() if tall else work


class Muon(torch.optim.Optimizer):
    """For weight matrices and convolutions only; biases, norms and embeddings belong to Adam.

    Adam barely moves the directions in which patches differ little, and the edges that tell a circle from a square
    are such directions. An orthogonal update moves them all alike.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-group["lr"] * scale)
