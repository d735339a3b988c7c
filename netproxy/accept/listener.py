"""Listening sockets inside a workload's namespace: accept, learn the destination, peek at the protocol.

The sockets come from the supervisor, which keeps a copy. Accepted connections are peeked at without reading
(so that whoever gets the socket sees every octet), for at most `detect_timeout_s`; the verdict is None when
the client stayed silent that long, which is normal where the server speaks first, and STALLED or STALLED_HTTP
when it began and stopped, which is normal nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from typing import NamedTuple

from ..addr import ClientAddr, OriginalDst, WorkloadKey, canonical_ip
from .origdst import local_dst, original_dst
from .sniff import NO_NAME, PEEK, TLS_HANDSHAKE, Protocol, client_hello, missing, sniff

_ACCEPT_BATCH = 64
"""Connections accepted per wake-up, so that a flood can't starve the connections that exist."""
_AGAIN_S = 0.02
"""When to look again at octets that the kernel reports over and over."""


class Accepted(NamedTuple):
    """`dst` is None when somebody dialled the listener itself."""

    sock: socket.socket
    workload: WorkloadKey
    inbound: bool
    client: ClientAddr
    dst: OriginalDst | None


class Listener:
    """One listening socket. `on_accept` is called for each connection and must not block."""

    def __init__(
        self, sock: socket.socket, workload: WorkloadKey, *, inbound: bool, on_accept: Callable[[Accepted], None]
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.workload = workload
        self.inbound = inbound
        self._on_accept = on_accept
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self._reading = True

    def _readable(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # Out of descriptors or memory: let what is queued wait, others will close.
                self._pause(0.1)
                return
            try:
                sock.setblocking(False)
                client = ClientAddr(canonical_ip(address[0]), address[1])
                dst = local_dst(sock) if self.inbound else original_dst(sock)
            except OSError:
                sock.close()
                continue
            self._on_accept(Accepted(sock, self.workload, self.inbound, client, dst))

    def _pause(self, delay_s: float) -> None:
        if self._reading:
            self._loop.remove_reader(self.sock.fileno())
            self._reading = False
            self._loop.call_later(delay_s, self._resume)

    def _resume(self) -> None:
        if self.sock.fileno() >= 0 and not self._reading:
            self._loop.add_reader(self.sock.fileno(), self._readable)
            self._reading = True

    def accept_queued(self) -> None:
        """Take what is in the queue right now: the last thing before `close` when draining."""
        if self.sock.fileno() >= 0:
            self._readable()

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            if self._reading:
                self._loop.remove_reader(self.sock.fileno())
                self._reading = False
            self.sock.close()


def _has_ended(sock: socket.socket) -> bool:
    """Has the peer ended its stream? Reading would tell only behind what is there already."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


async def detect(sock: socket.socket, timeout_s: float) -> Protocol | None:
    """Sniff without consuming. Raises OSError when the client is gone.

    None: silent for `timeout_s`. STALLED_HTTP: what it sent until then may become HTTP/1; STALLED: it may not, but is
    not decided. OPAQUE also for a client that ended its stream.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] | None = None
    seen = 0
    first = b""
    reading = False

    def wake() -> None:
        if ready is not None and not ready.done():
            ready.set_result(None)

    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    data = sock.recv(PEEK, socket.MSG_PEEK)
                except (BlockingIOError, InterruptedError):
                    pass
                else:
                    verdict = sniff(data)
                    if verdict is not None:
                        return verdict
                    if not data or len(data) >= PEEK or (len(data) <= seen and _has_ended(sock)):
                        return Protocol.OPAQUE
                    if len(data) <= seen:
                        # Woken without more: short of memory for TCP, the kernel does not wait for SO_RCVLOWAT.
                        loop.remove_reader(sock.fileno())
                        reading = False
                        await asyncio.sleep(_AGAIN_S)
                        continue
                    seen, first = len(data), data[:1]
                    # Else the loop would spin on the octets that are there already.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(seen + missing(data), PEEK))
                ready = loop.create_future()
                if not reading:
                    loop.add_reader(sock.fileno(), wake)
                    reading = True
                await ready
    except TimeoutError:
        if not seen:
            return None
        return Protocol.STALLED if first == TLS_HANDSHAKE else Protocol.STALLED_HTTP
    finally:
        if reading:
            loop.remove_reader(sock.fileno())
        if seen:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def server_name(sock: socket.socket) -> str:
    """SNI of the ClientHello that `detect` has found, without consuming it; as in `ClientHello`.

    One that is larger than `PEEK` octets can't be read. Raises OSError when the client is gone.
    """
    try:
        hello = client_hello(sock.recv(PEEK, socket.MSG_PEEK))
    except (BlockingIOError, InterruptedError):
        return NO_NAME
    return hello.sni if hello is not None else NO_NAME
