"""Choosing tokens: the likeliest, by temperature and nucleus, the same for the same seed whatever the other rows do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_server.describers.sampling import NotNumbers, Sampler, choose

SCORES = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0])
GREEDY = Sampler(temperature=0, top_p=1, seed=None)


def sampler(seed: int, temperature: float = 1.0, top_p: float = 1.0) -> Sampler:
    return Sampler(temperature=temperature, top_p=top_p, seed=seed)


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    mine = sampler(1, temperature=2.0)
    counts = Counter(choose(SCORES[None], [mine])[0] for _ in range(4000))
    expected = torch.softmax(SCORES / 2.0, -1)
    for token, share in enumerate(expected.tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_outside_the_nucleus_nothing_is_chosen() -> None:
    # given: 0.63 and 0.23 of the probability with two tokens; the second one crosses the border
    mine = sampler(2, top_p=0.7)
    assert {choose(SCORES[None], [mine])[0] for _ in range(500)} == {1, 2}
    narrow = sampler(3, top_p=1e-6)
    assert {choose(SCORES[None], [narrow])[0] for _ in range(50)} == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    assert choose(SCORES[None] * 100, [sampler(4, temperature=temperature)]) == [1]


def test_rows_without_numbers_are_told_apart() -> None:
    ill = [torch.full((5,), float("nan")), torch.tensor([0.0, float("inf"), 0, 0, 0]), torch.full((5,), -float("inf"))]
    for row in ill:
        first, second, third = choose(torch.stack([SCORES, row, row]), [GREEDY, GREEDY, sampler(1)])
        assert first == 1
        assert isinstance(second, NotNumbers) and isinstance(third, NotNumbers)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0.1, 2),
    top_p=st.floats(0.01, 1),
    mates=st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 1), st.integers(0, 99)), max_size=5),
)
def test_the_same_seed_chooses_the_same_whatever_the_other_rows_do(
    seed: int, temperature: float, top_p: float, mates: list[tuple[float, float, int]]
) -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed % 1000)) * 3
    alone, among = sampler(seed, temperature, top_p), sampler(seed, temperature, top_p)
    others = [Sampler(temperature=t, top_p=p, seed=s) for t, p, s in mates]
    for step in range(6):
        expected = choose(scores[step][None], [alone])[0]
        crowd = torch.cat([scores[: len(others)], scores[step][None]])
        assert choose(crowd, [*others, among])[-1] == expected
