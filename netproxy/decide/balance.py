# cython: annotation_typing=False
"""Shares of weighted backends, and the choice of one endpoint. PURE: the random source is an argument.

Weights are met by a low-discrepancy sequence, not by chance. It is nginx's smooth weighted round robin: everybody
gains its weight, the richest is chosen and pays the total. From its start, after any n choices, none of k backends
is more than 1 - 1/k ahead of its exact share or more than 1/2 + 1/3 + ... + 1/k behind it (the cup game with a
greedy emptier; 0.5 for two backends, 1.1 for four, 2.4 for sixteen). In any n choices from the middle of it each
is within 1 + 1/2 + ... + 1/(k-1) of its share. Each worker has a sequence of its own, so these add up.

Endpoints are chosen by P2C: of two distinct random ones, the one with fewer outstanding requests
(Mitzenmacher, "The Power of Two Choices", 2001).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """Anything with outstanding requests."""

    outstanding: int


L = TypeVar("L", bound=Loaded)


class WeightedCycle:
    """Indexes into `weights`, each in proportion. All weights 0 or none: `next` gives -1."""

    def __init__(self, weights: Sequence[int], phase: float = 0.0) -> None:
        """`phase` in [0, 1) shifts the start, so that several workers do not all begin with the same one."""
        self.weights = tuple(weights)
        self._total = sum(self.weights)
        self._current = [0] * len(self.weights)
        if self._total > 0 and phase > 0.0:
            for _ in range(int(phase * min(self._total, 1000))):
                self.next()

    def next(self) -> int:
        if self._total <= 0:
            return -1
        best, best_value = -1, 0
        for index, weight in enumerate(self.weights):
            if weight:
                value = self._current[index] = self._current[index] + weight
                if best < 0 or value > best_value:
                    best, best_value = index, value
        self._current[best] -= self._total
        return best


def pick(candidates: Sequence[L], random: Callable[[], float]) -> L | None:
    """P2C. `random` gives a float in [0, 1). None when there are no candidates."""
    n = len(candidates)
    if n < 2:
        return candidates[0] if n else None
    first = int(random() * n)
    second = int(random() * (n - 1))
    if second >= first:
        second += 1
    a, b = candidates[first], candidates[second]
    return b if b.outstanding < a.outstanding else a
