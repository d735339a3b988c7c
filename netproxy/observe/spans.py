"""Sampled requests, kept until something takes them away: bounded, the oldest go first and are counted.

Attributes are named as OpenTelemetry's semantic conventions for HTTP name them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

MAX_SPANS = 2048
"""Of a worker: some seconds of a busy one with 1 % sampled."""


class Span(NamedTuple):
    """Ids in hexadecimal digits, `parent_id` "" for the first of its trace. Times in seconds: `began` of the system's
    clock. `kind`: ``client`` of the caller's agent, ``server`` of the other one."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    began: float
    duration_s: float
    attributes: dict[str, str | int]


class Spans:
    def __init__(self, count: Callable[[str], None], limit: int = MAX_SPANS) -> None:
        """`count`: is told ``spans_recorded`` and ``spans_dropped``."""
        self._count = count
        self._kept: deque[Span] = deque()
        self._limit = limit

    def __len__(self) -> int:
        return len(self._kept)

    def record(self, span: Span) -> None:
        if len(self._kept) >= self._limit:
            self._kept.popleft()
            self._count("spans_dropped")
        self._kept.append(span)
        self._count("spans_recorded")

    def take(self) -> list[Span]:
        """All that are kept, the oldest first."""
        taken, self._kept = list(self._kept), deque()
        return taken
