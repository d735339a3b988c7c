from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netproxy.decide.balance import WeightedCycle, pick

weights = st.lists(st.one_of(st.integers(0, 10), st.integers(0, 1_000_000)), min_size=1, max_size=16)
ROUNDING = 1e-6


def harmonic(k: int) -> float:
    return sum(1 / i for i in range(1, k + 1))


def counts(cycle: WeightedCycle, n: int) -> list[int]:
    out = [0] * len(cycle.weights)
    for _ in range(n):
        out[cycle.next()] += 1
    return out


@settings(deadline=None)
@given(weights, st.integers(1, 200))
def test_shares_are_exact_to_within_the_documented_bound(given: list[int], n: int) -> None:
    cycle = WeightedCycle(given)
    total = sum(given)
    if not total:
        assert cycle.next() == -1
        return
    k = sum(1 for weight in given if weight)
    had = [0] * len(given)
    for done in range(1, n + 1):
        had[cycle.next()] += 1
        for weight, count in zip(given, had, strict=True):
            ahead = count - done * weight / total
            assert 1 - harmonic(k) - ROUNDING <= ahead <= 1 - 1 / k + ROUNDING


@given(weights, st.floats(0, 1, exclude_max=True), st.integers(1, 200))
def test_shares_from_the_middle_of_the_sequence(given: list[int], phase: float, n: int) -> None:
    total = sum(given)
    if not total:
        return
    k = sum(1 for weight in given if weight)
    for weight, count in zip(given, counts(WeightedCycle(given, phase), n), strict=True):
        assert abs(count - n * weight / total) <= harmonic(k - 1) + ROUNDING


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True))
def test_a_whole_period_is_exact(given: list[int], phase: float) -> None:
    if sum(given):
        assert counts(WeightedCycle(given, phase), sum(given)) == given


def test_a_backend_can_be_more_than_one_behind() -> None:
    """Why the bound is not plus or minus one."""
    given = [100, 1, 7, 100]
    cycle = WeightedCycle(given)
    had = [0] * 4
    worst = 0.0
    for done in range(1, sum(given) + 1):
        had[cycle.next()] += 1
        worst = min(worst, *(count - done * w / 208 for w, count in zip(given, had, strict=True)))
    assert -1.1 < worst < -1


@pytest.mark.parametrize("given", [[], [0], [0, 0]])
def test_without_weight_there_is_no_choice(given: list[int]) -> None:
    cycle = WeightedCycle(given, 0.5)
    assert [cycle.next(), cycle.next()] == [-1, -1]


def test_smooth() -> None:
    cycle = WeightedCycle([5, 1, 1])
    assert "".join("abc"[cycle.next()] for _ in range(14)) == "aabacaaaabacaa"


def test_weight_0_is_never_chosen() -> None:
    assert counts(WeightedCycle([0, 3, 0, 1], 0.7), 1000)[::2] == [0, 0]


def test_phases_spread_the_start() -> None:
    starts = {WeightedCycle([1] * 10, phase / 10).next() for phase in range(10)}
    assert starts == set(range(10))


class Item:
    def __init__(self, outstanding: int) -> None:
        self.outstanding = outstanding


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(0, 2**32))
def test_pick_takes_the_less_loaded_of_two_distinct(loads: list[int], seed: int) -> None:
    items = [Item(load) for load in loads]
    rng = random.Random(seed)
    got = pick(items, rng.random)
    if not items:
        assert got is None
    else:
        assert got in items
        if len(items) > 1:
            # Two distinct ones are compared, so one that is busier than all others is never it.
            assert got is not None
            assert sum(item.outstanding >= got.outstanding for item in items if item is not got) >= 1


@pytest.mark.parametrize("numbers", [(0.0, 0.0), (0.999999, 0.999999), (0.5, 0.0), (0.0, 0.999999)])
def test_pick_at_the_ends_of_the_range(numbers: tuple[float, float]) -> None:
    drawn = list(numbers)
    items = [Item(0), Item(1), Item(2)]
    assert pick(items, lambda: drawn.pop(0)) in items[:2]
    assert not drawn


def test_pick_is_uniform_when_all_are_equal() -> None:
    items = [Item(0) for _ in range(5)]
    rng = random.Random(1)
    had = [0] * 5
    for _ in range(10_000):
        had[items.index(pick(items, rng.random))] += 1  # type: ignore[arg-type]
    assert all(1800 < n < 2200 for n in had)


def test_pick_evens_out() -> None:
    """Requests that never end: P2C keeps the fullest close to the mean, chance alone would not."""
    items = [Item(0) for _ in range(20)]
    rng = random.Random(1)
    for _ in range(20_000):
        pick(items, rng.random).outstanding += 1  # type: ignore[union-attr]
    assert max(item.outstanding for item in items) - min(item.outstanding for item in items) <= 6
