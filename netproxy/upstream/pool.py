# cython: annotation_typing=False
"""Idle upstream connections, and how many there are. PURE: decides, does no I/O.

A key is (workload, endpoint, TLS mode): a connection is never shared between workloads, since its source
address and identity are the workload's. Limits are per key: at most `max_idle` wait here, at most
`max_open` exist (idle and busy); past that `reserve` says no (Envoy's circuit breaker: 1024).

The most recently used one is handed out first, so that the surplus grows old and is expired.
"""

from __future__ import annotations

from typing import Any

from ..addr import EndpointAddr, WorkloadKey


class PoolKey:
    """`tls` is "" for plaintext, else the ALPN protocol and the identity that the endpoint must have. Equal by what it
    names, and hashed once: it is looked for with every request."""

    def __init__(self, workload: WorkloadKey, endpoint: EndpointAddr, tls: str) -> None:
        self.workload = workload
        self.endpoint = endpoint
        self.tls = tls
        self._hash = hash((workload, endpoint, tls))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PoolKey) and self._names(other))

    def _names(self, other: PoolKey) -> bool:
        """The same."""
        return (
            (self.endpoint is other.endpoint or self.endpoint == other.endpoint)
            and self.tls == other.tls
            and self.workload == other.workload
        )

    def __repr__(self) -> str:
        return f"PoolKey({self.workload!r}, {self.endpoint!r}, {self.tls!r})"


class Pool:
    """Connections are whatever the owner makes them; they are only kept."""

    def __init__(self, max_idle: int = 64, max_open: int = 1024) -> None:
        self.max_idle = max_idle
        self.max_open = max_open
        self._idle: dict[PoolKey, list[tuple[float, Any]]] = {}
        """Oldest first. Lists that became empty stay while a connection is open: mostly it is given back soon."""
        self._open: dict[PoolKey, int] = {}
        self.idle_count = 0

    def __repr__(self) -> str:
        return f"<Pool idle={self.idle_count} open={self.open_count} keys={len(self._open)}>"

    @property
    def open_count(self) -> int:
        return sum(self._open.values())

    def take(self, key: PoolKey) -> Any:
        """An idle connection, now busy; None when there is none."""
        waiting = self._idle.get(key)
        if not waiting:
            return None
        self.idle_count -= 1
        return waiting.pop()[1]

    def reserve(self, key: PoolKey) -> bool:
        """Ask to open one more. True: it counts until `closed` is called for it."""
        count = self._open.get(key, 0)
        if count >= self.max_open:
            return False
        self._open[key] = count + 1
        return True

    def closed(self, key: PoolKey) -> None:
        """A reserved connection is gone (or was never made). It must not be idle here: `remove` it before."""
        count = self._open.get(key, 0) - 1
        if count > 0:
            self._open[key] = count
        else:
            self._open.pop(key, None)
            self._idle.pop(key, None)

    def give(self, key: PoolKey, connection: Any, now: float) -> Any:
        """A busy connection became idle. Returns the one to close instead, when too many are."""
        waiting = self._idle.get(key)
        if waiting is None:
            waiting = self._idle[key] = []
        waiting.append((now, connection))
        self.idle_count += 1
        if len(waiting) > self.max_idle:
            self.idle_count -= 1
            return waiting.pop(0)[1]
        return None

    def remove(self, key: PoolKey, connection: Any) -> bool:
        """An idle connection was closed by its peer. False when it was not idle here."""
        waiting = self._idle.get(key)
        if waiting is None:
            return False
        for index, (_, idle) in enumerate(waiting):
            if idle is connection:
                del waiting[index]
                self.idle_count -= 1
                return True
        return False

    def expire(self, before: float) -> list[Any]:
        """Take out what has been idle since before that time; the caller closes them."""
        out = []
        for waiting in self._idle.values():
            while waiting and waiting[0][0] < before:
                out.append(waiting.pop(0)[1])
        self.idle_count -= len(out)
        return out

    def drop(self, workload: WorkloadKey) -> list[Any]:
        """Take out all that is idle of one workload; the caller closes them."""
        out = []
        for key in [key for key in self._idle if key.workload == workload]:
            out += [connection for _, connection in self._idle.pop(key)]
        self.idle_count -= len(out)
        return out
