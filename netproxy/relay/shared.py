# cython: annotation_typing=False
"""The HTTP/2 connections to endpoints, and the requests that wait for one: what `upstream.shared` decides is done here.

A connection counts as dialled when the endpoint has said by its SETTINGS what it takes: so nobody begins more than it
allows, and whether it knows extended CONNECT is known. All that wait for it are told when it can't be had.

Between agents the server chooses by ALPN: one that does not know `netproxy/h2` takes HTTP/1.1, also mesh TLS. Then the
stream goes to the other pool, who waits goes there, and for `SPEAKS_HTTP1_S` nobody asks again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ..addr import WorkloadKey
from ..decide.route import Choice
from ..errors import Reason, Refused, UpstreamError
from ..identity.tls import ALPN_H2, ALPN_H2_HTTP1
from ..stream import Stream
from ..upstream.pool import PoolKey
from ..upstream.shared import SharedPool, Statistics
from .facts import dial
from .upstream import Requester, UpstreamHttp
from .upstream_h2 import Http2Connection, Http2Request

if TYPE_CHECKING:
    from .services import Facts, Services

SPEAKS_HTTP1_S = 30.0
_MAX_KNOWN = 4096


_MAX_DIALS = 3
"""For one connection."""


class Wanted(NamedTuple):
    """How a connection of a key is dialled. `http1`: the key of the other pool, for servers that choose HTTP/1.1."""

    facts: Facts
    choice: Choice
    alpn: tuple[str, ...]
    http1: PoolKey
    connect_s: float = 0.0


class Waiter:
    """What waits in the pool."""

    __slots__ = ("sharer", "wanted")

    def __init__(self, sharer: Requester, wanted: Wanted) -> None:
        self.sharer = sharer
        self.wanted = wanted


class SharedConnections:
    """All of a worker."""

    def __init__(self, services: Services, pool: SharedPool[Http2Connection, Waiter] | None = None) -> None:
        self.services = services
        self._pool: SharedPool[Http2Connection, Waiter] = pool or SharedPool()
        self._connections: set[Http2Connection] = set()
        """Every one, from its first octet to its last."""
        self._dials: dict[asyncio.Task[Http2Connection | Stream], tuple[PoolKey, Wanted]] = {}
        self._http1: dict[PoolKey, float] = {}
        """Agents that chose HTTP/1.1, and when."""

    def __repr__(self) -> str:
        return f"<SharedConnections {self._pool}>"

    def statistics(self) -> Statistics:
        return self._pool.statistics()

    @property
    def busy(self) -> bool:
        """Something is dialled, or open."""
        return bool(self._connections or self._dials)

    # -- for requests ---------------------------------------------------------------------------------

    def speaks_http1(self, key: PoolKey) -> bool:
        """Its agent chose HTTP/1.1 not long ago."""
        if not self._http1:
            return False
        since = self._http1.get(key)
        return since is not None and self.services.now() - since < SPEAKS_HTTP1_S

    def take(self, key: PoolKey) -> Http2Request | None:
        connection = self._pool.take(key)
        return Http2Request(connection) if connection is not None else None

    def wait(self, key: PoolKey, sharer: Requester, wanted: Wanted) -> Waiter:
        """Nothing could be taken. To be given to `forget` by who waits no longer. Raises Refused."""
        waiter = Waiter(sharer, wanted)
        dials = self._pool.wait(key, waiter)
        if dials < 0:
            raise Refused(Reason.OVERLOADED, f"{key.endpoint}: as many connections or waiting requests as allowed")
        self._dial(key, wanted, dials)
        return waiter

    def forget(self, key: PoolKey, waiter: Waiter) -> None:
        self._pool.forget(key, waiter)

    # -- dialling -------------------------------------------------------------------------------------

    def _dial(self, key: PoolKey, wanted: Wanted, n: int) -> None:
        for _ in range(n):
            task = self.services.loop.create_task(self._connect(key, wanted))
            self._dials[task] = key, wanted
            task.add_done_callback(self._dialled)

    async def _connect(self, key: PoolKey, wanted: Wanted) -> Http2Connection | Stream:
        """A connection that is ready; a stream if the agent chose HTTP/1.1. Raises UpstreamError.

        One that goes away before it takes a request is dialled again: it was accepted by a worker that is being
        replaced, and the next one may meet the one that replaces it.
        """
        for _ in range(_MAX_DIALS):
            made = await self._connect_once(key, wanted)
            if not isinstance(made, Http2Connection) or made.free_streams:
                return made
            made.abort()
            if not made.engine.is_draining:
                break
        raise UpstreamError(Reason.OVERLOADED, f"{key.endpoint}: it allows no HTTP/2 streams")

    async def _connect_once(self, key: PoolKey, wanted: Wanted) -> Http2Connection | Stream:
        services = self.services
        facts, choice = wanted.facts, wanted.choice
        stream = await dial(services, facts, choice, key.endpoint, wanted.alpn, connect_s=wanted.connect_s)
        if key.tls and getattr(stream, "alpn", None) not in (ALPN_H2, ALPN_H2_HTTP1):
            return stream
        connection = Http2Connection(key, stream, self)
        self._connections.add(connection)
        try:
            await connection.wait_ready(services.tables.mesh.handshake_timeout_s)
        except BaseException:
            connection.abort()
            raise
        return connection

    def _dialled(self, task: asyncio.Task[Http2Connection | Stream]) -> None:
        # Not in the task: one that is cancelled before its first step runs nothing of its own.
        key, wanted = self._dials.pop(task)
        if task.cancelled():
            self._failed(key, UpstreamError(Reason.CONNECT_FAILED, "the workload is gone"))
            return
        exc = task.exception()
        if exc is not None:
            if isinstance(exc, UpstreamError):
                self._failed(key, exc)
                return
            self._failed(key, UpstreamError(Reason.INTERNAL, "the endpoint could not be dialled"))
            raise exc  # our bug, for the loop to report
        done = task.result()
        if not isinstance(done, Http2Connection):
            self._chose_http1(key, wanted, done)
        elif not done.free_streams:
            # Something came behind its SETTINGS.
            done.abort()
            self._failed(key, UpstreamError(Reason.UPSTREAM_CLOSED, f"{key.endpoint}: closed at once"))
        else:
            self._http1.pop(key, None)
            done.is_up = True
            more = self._pool.up(key, done)
            self._serve(key)
            self._dial(key, wanted, more)

    def _chose_http1(self, key: PoolKey, wanted: Wanted, stream: Stream) -> None:
        now = self.services.now()
        if len(self._http1) >= _MAX_KNOWN:
            self._http1 = {known: at for known, at in self._http1.items() if now - at < SPEAKS_HTTP1_S}
        if len(self._http1) < _MAX_KNOWN:
            self._http1[key] = now
        if self.services.pool.reserve(wanted.http1):
            UpstreamHttp(wanted.http1, stream, self.services).idle(self.services.now())
        else:
            stream.abort()
        self._tell(self._pool.failed(key), None)

    def _failed(self, key: PoolKey, exc: UpstreamError) -> None:
        self._tell(self._pool.failed(key), exc)

    def _tell(self, waiting: list[Waiter], exc: UpstreamError | None) -> None:
        """That there is no connection; None: one of HTTP/1.1."""
        for at, waiter in enumerate(waiting):
            try:
                if exc is not None:
                    waiter.sharer.upstream_failed(exc)
                else:
                    waiter.sharer.upstream_speaks_http1()
            except Exception:
                self.services.loop.call_soon(self._tell, waiting[at + 1 :], exc)  # the others are not to suffer by it
                raise

    def _serve(self, key: PoolKey) -> None:
        """Who waits begins, as far as there are free streams."""
        while (found := self._pool.next(key)) is not None:
            waiter, connection = found
            try:
                waiter.sharer.upstream_ready(Http2Request(connection))
            except Exception:
                self.services.loop.call_soon(self._serve, key)  # the others are not to suffer by it
                raise

    # -- for the connections --------------------------------------------------------------------------

    def freed(self, connection: Http2Connection) -> None:
        """A stream of it is free."""
        self._serve(connection.key)
        if self.services.draining and connection.idle_since:
            connection.close()

    def drained(self, connection: Http2Connection) -> None:
        """It takes no new requests."""
        self._redial(connection.key, self._pool.drained(connection.key, connection))

    def closed(self, connection: Http2Connection) -> None:
        self._connections.discard(connection)
        if connection.is_up:
            self._redial(connection.key, self._pool.closed(connection.key, connection))

    def _redial(self, key: PoolKey, n: int) -> None:
        if n:
            wanted = self._pool.first(key)
            assert wanted is not None
            self._dial(key, wanted.wanted, n)

    # -- for the worker -------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Called about twice a second."""
        for connection in list(self._connections):
            connection.check(now)

    def expire(self, before: float) -> None:
        """Close what has carried nothing since before that time."""
        for connection in self._pool.expire(before):
            connection.close()

    def drop(self, workload: WorkloadKey) -> None:
        """The workload is gone: end all of it, now."""
        _, waiting = self._pool.drop(workload)
        self._tell(waiting, UpstreamError(Reason.CONNECT_FAILED, "the workload is gone"))
        for task in [task for task, (key, _) in self._dials.items() if key.workload == workload]:
            task.cancel()
        for connection in [found for found in self._connections if found.key.workload == workload]:
            connection.abort()

    def abort(self) -> None:
        for task in list(self._dials):
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
