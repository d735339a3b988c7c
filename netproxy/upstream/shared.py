# cython: annotation_typing=False
"""Connections that many requests share (HTTP/2): which one takes the next request, and when another is dialled. PURE.

A request takes a connection that has a free stream, the oldest first, so that the surplus grows idle and is expired.
When none has, it waits, at most `max_waiting` of them per key; and when those who wait are more than the connections
that are being dialled will take, one more is dialled, as long as fewer than `max_open` exist. So the first requests to
an endpoint share its first connection. How many streams a connection takes is what the last one to that endpoint said,
until then `streams`.

    none --take fails--> waiting --next--> on a connection
                            |----dial failed, no room--> told why

Who waits never does so for nothing: something is being dialled, or a connection of the key is full and will be free.
Every call after which that might not hold says how many connections are to be dialled now; they are reserved already,
and each has to end in `up` or `failed`. A connection that came up ends in `closed`.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, NamedTuple, Protocol, TypeVar

from ..addr import WorkloadKey
from .pool import PoolKey


class Shared(Protocol):
    @property
    def free_streams(self) -> int:
        """So many requests may begin on it now; 0 when it takes no more."""

    @property
    def idle_since(self) -> float:
        """Since when it carries nothing; 0.0 while it does."""


C = TypeVar("C", bound=Shared)
W = TypeVar("W")


class Statistics(NamedTuple):
    """`idle`: connections that carry nothing. `waiting`: requests."""

    open: int
    idle: int
    dialling: int
    waiting: int


class _Group(Generic[C, W]):
    """All of one key. `open` counts those that are dialled, take requests, or only end what they have begun."""

    __slots__ = ("connections", "dialling", "open", "streams", "waiting")

    def __init__(self, streams: int) -> None:
        self.connections: list[C] = []
        self.waiting: deque[W] = deque()
        self.dialling = 0
        self.open = 0
        self.streams = streams


class SharedPool(Generic[C, W]):
    def __init__(self, max_open: int = 1024, max_waiting: int = 4096, streams: int = 100) -> None:
        self.max_open = max_open
        self.max_waiting = max_waiting
        self._streams = streams
        self._groups: dict[PoolKey, _Group[C, W]] = {}

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<SharedPool open={now.open} idle={now.idle} dialling={now.dialling} waiting={now.waiting}>"

    def statistics(self) -> Statistics:
        groups = self._groups.values()
        return Statistics(
            sum(group.open for group in groups),
            sum(connection.idle_since > 0.0 for group in groups for connection in group.connections),
            sum(group.dialling for group in groups),
            sum(len(group.waiting) for group in groups),
        )

    def take(self, key: PoolKey) -> C | None:
        """A connection on which a request may begin now."""
        group = self._groups.get(key)
        if group is not None:
            for connection in group.connections:
                if connection.free_streams > 0:
                    return connection
        return None

    def wait(self, key: PoolKey, waiter: W) -> int:
        """`take` found nothing. How many are to be dialled for it (0: it waits for others); -1: there is no room."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(self._streams)
        if len(group.waiting) >= self.max_waiting:
            return -1
        group.waiting.append(waiter)
        dials = self._due(group)
        if not dials and not group.dialling:
            # As many connections as there may be, all of them full.
            group.waiting.pop()
            self._tidy(key, group)
            return -1
        return dials

    def forget(self, key: PoolKey, waiter: W) -> bool:
        """It waits no longer. False when it did not."""
        group = self._groups.get(key)
        if group is None or waiter not in group.waiting:
            return False
        group.waiting.remove(waiter)
        self._tidy(key, group)
        return True

    def up(self, key: PoolKey, connection: C) -> int:
        """One was dialled. Ask `next` who begins on it; then this says how many more are to be dialled."""
        group = self._groups[key]
        group.dialling -= 1
        group.streams = max(1, connection.free_streams)
        group.connections.append(connection)
        return self._due(group, connection.free_streams)

    def next(self, key: PoolKey) -> tuple[W, C] | None:
        """Who has waited longest, and the connection that takes it. Let it begin before the next one is asked for."""
        group = self._groups.get(key)
        if group is None or not group.waiting:
            return None
        connection = self.take(key)
        return (group.waiting.popleft(), connection) if connection is not None else None

    def first(self, key: PoolKey) -> W | None:
        """Who has waited longest."""
        group = self._groups.get(key)
        return group.waiting[0] if group is not None and group.waiting else None

    def failed(self, key: PoolKey) -> list[W]:
        """One could not be dialled. Those that wait and that no other one is dialled for, to be told."""
        group = self._groups[key]
        group.dialling -= 1
        group.open -= 1
        out = []
        while len(group.waiting) > group.dialling * group.streams:
            out.append(group.waiting.pop())
        out.reverse()
        self._tidy(key, group)
        return out

    def drained(self, key: PoolKey, connection: C) -> int:
        """It takes no new requests any more. How many are to be dialled for those that wait."""
        group = self._groups.get(key)
        if group is None or not _take_out(group.connections, connection):
            return 0
        return self._due(group)

    def closed(self, key: PoolKey, connection: C) -> int:
        """One that was `up` is gone. How many are to be dialled for those that wait."""
        group = self._groups[key]
        _take_out(group.connections, connection)
        group.open -= 1
        dials = self._due(group)
        self._tidy(key, group)
        return dials

    def expire(self, before: float) -> list[C]:
        """Take out what has been idle since before that time; the caller closes them."""
        out = []
        for group in self._groups.values():
            old = [connection for connection in group.connections if 0.0 < connection.idle_since < before]
            if old and not group.waiting:
                group.connections = [c for c in group.connections if not 0.0 < c.idle_since < before]
                out += old
        return out

    def drop(self, workload: WorkloadKey) -> tuple[list[C], list[W]]:
        """Take out all of one workload: connections to abort, requests to be told. End its dials, too."""
        connections: list[C] = []
        waiting: list[W] = []
        for key in [key for key in self._groups if key.workload == workload]:
            group = self._groups[key]
            connections += group.connections
            waiting += group.waiting
            group.connections = []
            group.waiting.clear()
        return connections, waiting

    def _due(self, group: _Group[C, W], more: int = 0) -> int:
        """Reserves what those that wait need beyond what is being dialled, and `more` streams."""
        missing = len(group.waiting) - more - group.dialling * group.streams
        dials = min(-(-missing // group.streams), self.max_open - group.open) if missing > 0 else 0
        group.dialling += dials
        group.open += dials
        return dials

    def _tidy(self, key: PoolKey, group: _Group[C, W]) -> None:
        if not group.open and not group.waiting:
            del self._groups[key]


def _take_out(connections: list[C], connection: C) -> bool:
    for at, other in enumerate(connections):
        if other is connection:
            del connections[at]
            return True
    return False
