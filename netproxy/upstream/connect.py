"""Fresh connections, dialled inside the workload's network namespace.

The worker may not enter a namespace or set a mark; the supervisor makes the sockets there and hands them
over in batches. A stock per workload, family and kind keeps some ready, so that a dial normally waits for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from ..addr import EndpointAddr, SpiffeId, WorkloadKey
from ..config.shard import SvidShard
from ..errors import IdentityError, Reason, UpstreamError
from ..identity.resume import SessionKey
from ..identity.tls import ContextCache
from ..stream import Stream
from ..tcp import connected

BATCH = 32
LOW_WATER = 12
MAX_WAITING = 4096
STOCK_TIMEOUT_S = 5.0

SocketKind = Literal["stream", "dgram"]


class StockKey(NamedTuple):
    workload: WorkloadKey
    family: int
    """4 or 6."""
    kind: SocketKind = "stream"


class SocketStock:
    """Unconnected sockets. `ask(key, n)` sends for more."""

    def __init__(self, ask: Callable[[StockKey, int], None]) -> None:
        self._ask = ask
        self._stock: dict[StockKey, deque[socket.socket]] = {}
        self._waiting: dict[StockKey, deque[asyncio.Future[socket.socket]]] = {}
        self._asked: dict[StockKey, int] = {}

    async def take(self, workload: WorkloadKey, family: int, kind: SocketKind = "stream") -> socket.socket:
        """Raises UpstreamError when there is none in time or the workload is gone."""
        key = StockKey(workload, family, kind)
        stock = self._stock.get(key)
        if stock:
            sock = stock.popleft()
            if len(stock) < LOW_WATER:
                self._order(key, BATCH)
            return sock
        waiting = self._waiting.setdefault(key, deque())
        if len(waiting) >= MAX_WAITING:
            raise UpstreamError(Reason.OVERLOADED, "too many connections wait for a socket")
        future: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        waiting.append(future)
        self._order(key, max(BATCH, len(waiting)))
        try:
            async with asyncio.timeout(STOCK_TIMEOUT_S):
                return await future
        except (TimeoutError, asyncio.CancelledError) as exc:
            with contextlib.suppress(ValueError):
                waiting.remove(future)  # else it would be counted, and asked for, until the next delivery
            if future.done() and not future.cancelled() and future.exception() is None:
                self._put_back(key, future.result())
            if isinstance(exc, TimeoutError):
                raise UpstreamError(Reason.INTERNAL, "no socket from the supervisor in time") from None
            raise

    def _put_back(self, key: StockKey, sock: socket.socket) -> None:
        """Delivered in the very moment its taker gave up: for the next one, unless the workload is gone."""
        if key not in self._stock:
            # It would keep the namespace alive.
            sock.close()
            return
        waiting = self._waiting.get(key, deque())
        while waiting:
            future = waiting.popleft()
            if not future.done():
                future.set_result(sock)
                return
        self._stock[key].append(sock)

    def _order(self, key: StockKey, n: int) -> None:
        if self._asked.get(key, 0) < n:
            self._asked[key] = self._asked.get(key, 0) + BATCH
            self._ask(key, BATCH)

    def deliver(self, key: StockKey, fds: list[int], error: str) -> None:
        if self._asked.get(key, 0) > BATCH:
            self._asked[key] -= BATCH
        else:
            self._asked.pop(key, None)
        waiting = self._waiting.get(key, deque())
        stock = self._stock.setdefault(key, deque())
        for fd in fds:
            stock.append(socket.socket(fileno=fd))
        while waiting and (stock or error):
            future = waiting.popleft()
            if future.done():
                continue
            if stock:
                future.set_result(stock.popleft())
            else:
                future.set_exception(UpstreamError(Reason.CONNECT_FAILED, f"no socket in the namespace: {error}"))
        if waiting and not stock:
            self._order(key, len(waiting))

    def drop(self, workload: WorkloadKey) -> None:
        """The workload is gone: close its sockets, fail who waits."""
        for key in [key for key in self._stock if key[0] == workload]:
            for sock in self._stock.pop(key):
                sock.close()
        for key in [key for key in self._waiting if key[0] == workload]:
            for future in self._waiting.pop(key):
                if not future.done():
                    future.set_exception(UpstreamError(Reason.CONNECT_FAILED, "the workload is gone"))
                    future.exception()
        for key in [key for key in self._asked if key[0] == workload]:
            del self._asked[key]


class Dialer:
    """Opens streams as a workload. `svid` finds the SVID of a local identity."""

    def __init__(
        self, stock: SocketStock, contexts: ContextCache, svid: Callable[[SpiffeId], SvidShard | None]
    ) -> None:
        self._stock = stock
        self._contexts = contexts
        self._svid = svid

    async def dial(
        self,
        workload: WorkloadKey,
        endpoint: EndpointAddr,
        timeouts_s: tuple[float, float],
        *,
        tls: tuple[SpiffeId, SpiffeId, tuple[str, ...]] | None = None,
        high_water: int = 256 * 1024,
    ) -> Stream:
        """A connected stream (its `sink` is still to be set, reading is paused).

        `timeouts_s`: for the connection, and for the TLS handshake after it. `tls`: (our identity, the identity the
        endpoint must have, ALPN protocols of which the server takes one). Raises UpstreamError with CONNECT_FAILED,
        CONNECT_TIMEOUT, IDENTITY_MISMATCH or OVERLOADED; OSError never.
        """
        loop = asyncio.get_running_loop()
        sock = await self._stock.take(workload, 6 if ":" in endpoint.host else 4)
        connect_s, handshake_s = timeouts_s
        stream: Stream | None = None
        try:
            async with asyncio.timeout(connect_s):
                await loop.sock_connect(sock, (endpoint.host, endpoint.port))
            stream = await connected(loop, sock, None, high_water=high_water)
            stream.pause_reading()
            if tls is None:
                return stream
            mine, theirs, alpn = tls
            svid = self._svid(mine)
            if svid is None:
                raise IdentityError(f"no certificate for {mine} yet")
            secured = await self._contexts.connect(stream, SessionKey(svid, alpn, theirs, endpoint), handshake_s)
            secured.pause_reading()
            return secured
        except TimeoutError:
            self._discard(sock, stream)
            raise UpstreamError(Reason.CONNECT_TIMEOUT, f"{endpoint}: no connection within {connect_s:g} s") from None
        except IdentityError as exc:
            self._discard(sock, stream)
            raise UpstreamError(Reason.IDENTITY_MISMATCH, f"{endpoint}: {exc}") from exc
        except OSError as exc:
            self._discard(sock, stream)
            text = os.strerror(exc.errno) if exc.errno else str(exc)
            raise UpstreamError(Reason.CONNECT_FAILED, f"{endpoint}: {text}") from exc
        except BaseException:
            self._discard(sock, stream)
            raise

    @staticmethod
    def _discard(sock: socket.socket, stream: Stream | None) -> None:
        if stream is not None:
            stream.abort()
        else:
            with contextlib.suppress(OSError):
                sock.close()
