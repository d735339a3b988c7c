"""A `Stream` over one TCP socket, on uvloop or asyncio.

Rules:

* What is read while the owner has paused, or before it has set a sink, is held and replayed in a loop turn
  of its own. At most one read of the loop (256 KiB) is held, since the socket is paused at once.
* `abort` resets (SO_LINGER 0): a FIN would tell the peer that a truncated body was complete.
* The stream never closes itself: when both sides have sent their end, the owner calls `close`.

`Delivery` is the reading half that every implementation of `Stream` shares: it decides when the sink hears what.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import cast

from .errors import LocalProtocolError
from .stream import Sink

HIGH_WATER = 256 * 1024
"""One read of uvloop: a relay is asked to stop once it has queued more than a single turn's worth."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Delivery:
    """What the sink is told and when: in order, never while paused, `closed` once and last.

    `ready` is true when data may be given to `target` without looking at anything else; otherwise it is given to
    `hold`. `more` is called whenever reading from below may go on.
    """

    __slots__ = (
        "_blocked", "_eof", "_held", "_lost", "_lost_exc", "_more", "_over", "_paused", "_scheduled", "_stopped",
        "_told_blocked", "ready", "target",
    )  # fmt: skip

    def __init__(self, sink: Sink | None, more: Callable[[], None]) -> None:
        self.target = sink
        self.ready = sink is not None
        self._more = more
        self._held: deque[bytes] = deque()
        self._eof = False  # received, not told
        self._paused = False
        self._blocked = self._told_blocked = False
        self._stopped = False  # nothing but `closed` from now on
        self._lost = False
        self._lost_exc: Exception | None = None
        self._over = False  # `closed` was told
        self._scheduled = False

    @property
    def sink(self) -> Sink:
        if self.target is None:
            raise AttributeError("the stream has no sink")
        return self.target

    def held(self) -> int:
        """Octets that wait for the sink."""
        return sum(map(len, self._held))

    def replace(self, sink: Sink) -> None:
        """The new sink hears what the old one has not been given, and whether writing is stopped, in the next turn."""
        if self._over:
            return
        self.target = sink
        self._told_blocked = False
        self._wake()

    def pause(self) -> None:
        self._paused = True
        self.ready = False

    def resume(self) -> None:
        self._paused = False
        self._wake()

    def hold(self, data: bytes) -> None:
        if not self._stopped:
            self._held.append(data)

    def eof(self) -> None:
        if self.ready and self.target is not None:
            self.target.eof_received()
        elif not self._stopped:
            self._eof = True

    def writable(self, ok: bool) -> None:
        self._blocked = not ok
        if self._stopped or self.target is None or self._told_blocked is self._blocked:
            return
        self._told_blocked = self._blocked
        self.target.writable(ok)

    def stop(self) -> None:
        self._stopped = True
        self.ready = False
        self._held.clear()

    def lost(self, exc: Exception | None) -> None:
        """The stream is gone. Without a sink yet, the first one set is told."""
        if self._lost:
            return
        self.stop()
        self._lost, self._lost_exc = True, exc
        self._more = _nothing
        if self.target is not None:
            self._tell_closed(self.target)

    def _tell_closed(self, target: Sink) -> None:
        self._over = True
        # The cycle stream - sink - stream would keep its buffers until the next full collection.
        self.target = None
        target.closed(self._lost_exc)

    def _wake(self) -> None:
        if self._held or self._eof or self._lost or self._scheduled or self._blocked is not self._told_blocked:
            # In a turn of its own: `resume_reading` is called from `writable`, within another stream's callback.
            if not self._scheduled:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._go_on()

    def _go_on(self) -> None:
        self.ready = not (self.target is None or self._paused or self._held or self._eof or self._stopped)
        if self.ready:
            self._more()

    def _turn(self) -> None:
        self._scheduled = False
        if self.target is None:
            return
        if self._lost:
            self._tell_closed(self.target)
            return
        if self._blocked and not self._stopped and not self._told_blocked:
            self._told_blocked = True
            self.target.writable(False)
        # The sink may pause, abort or be replaced within each call.
        while self._held and not self._paused:
            self.sink.data_received(self._held.popleft())
        if self._eof and not self._held and not self._paused and not self._stopped:
            self._eof = False
            self.sink.eof_received()
        self._go_on()


def _nothing() -> None:
    pass


class TcpStream(asyncio.Protocol):
    """Made by `accepted` and `connected`. The loop's transport callbacks are not for the owner."""

    __slots__ = ("_aborted", "_closing", "_delivery", "_eof", "_high_water", "_resuming", "_transport", "_wrote_eof")

    _transport: asyncio.Transport

    def __init__(self, sink: Sink | None = None, *, high_water: int = HIGH_WATER) -> None:
        self._delivery = Delivery(sink, self._more)
        self._high_water = high_water
        self._eof = False
        self._wrote_eof = False
        self._resuming = False  # within the transport's resume_writing
        self._closing = False
        self._aborted = False

    def __repr__(self) -> str:
        ends = " eof" * self._eof + " wrote-eof" * self._wrote_eof + " closing" * self.closing
        return f"<TcpStream{ends} buffered={self.buffered()} held={self._delivery.held()}>"

    @property
    def sink(self) -> Sink:
        return self._delivery.sink

    @sink.setter
    def sink(self, sink: Sink) -> None:
        self._delivery.replace(sink)

    @property
    def closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Dropped when the stream is closing: the peer's reset may always come first."""
        if self._closing or self._transport.is_closing():
            return
        if self._wrote_eof:
            raise LocalProtocolError("write after write_eof")
        self._transport.write(data)

    def write_eof(self) -> None:
        if self._wrote_eof or self.closing:
            return
        self._wrote_eof = True
        if self._resuming:
            # asyncio would shut the socket down a second time when the callback returns: ENOTCONN if the peer has, too.
            asyncio.get_running_loop().call_soon(self._end)
        else:
            self._end()

    def _end(self) -> None:
        if not self._transport.is_closing():
            try:
                self._transport.write_eof()
            except OSError:
                pass  # reset by the peer, which reading or `close` will tell

    def pause_reading(self) -> None:
        self._delivery.pause()
        if not self._eof:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._delivery.resume()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._delivery.stop()
        self._transport.close()

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = self._closing = True
        self._delivery.stop()
        sock = self._transport.get_extra_info("socket")
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        except OSError:
            pass  # closed already
        self._transport.abort()

    def buffered(self) -> int:
        return self._transport.get_write_buffer_size()

    def _more(self) -> None:
        # After the end both loops would report it again.
        if not self._eof:
            self._transport.resume_reading()

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not paused here even when there is no sink: uvloop ignores pause_reading() within connection_made().
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=self._high_water, low=self._high_water // 4)

    def data_received(self, data: bytes) -> None:
        delivery = self._delivery
        if delivery.ready:
            delivery.target.data_received(data)  # type: ignore[union-attr]  # ready implies a target
        else:
            delivery.hold(data)
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        self._delivery.eof()
        return True  # half-close: the transport stays open

    def pause_writing(self) -> None:
        self._delivery.writable(False)

    def resume_writing(self) -> None:
        self._resuming = True
        try:
            self._delivery.writable(True)
        finally:
            self._resuming = False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._closing and not self._eof:
            self._deliver_rest()
        # uvloop's transport has no socket to reset any more.
        self._aborted = self._closing = True
        self._delivery.lost(exc)

    def _deliver_rest(self) -> None:
        """What came before the reset: when it is a write that fails, the loop does not read any more.

        So ends every upload that a server answers early and closes without reading it.
        """
        sock = self._transport.get_extra_info("socket")
        left = HIGH_WATER
        while left > 0 and self._delivery.ready and self._delivery.target is not None:
            try:
                data = os.read(sock.fileno(), left)
            except OSError:
                return
            if not data:
                return
            left -= len(data)
            self._delivery.target.data_received(data)


async def accepted(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, sink: Sink | None = None, *, high_water: int = HIGH_WATER
) -> TcpStream:
    """The stream of a socket that `accept` returned. It owns `sock`, also when this raises OSError."""
    return await _stream(loop.connect_accepted_socket, sock, sink, high_water)


async def connected(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, sink: Sink | None = None, *, high_water: int = HIGH_WATER
) -> TcpStream:
    """The stream of a connected, non-blocking socket. It owns `sock`, also when this raises OSError."""
    return await _stream(loop.create_connection, sock, sink, high_water)


async def _stream(attach: Callable[..., object], sock: socket.socket, sink: Sink | None, high_water: int) -> TcpStream:
    stream = TcpStream(sink, high_water=high_water)
    try:
        # asyncio sets it on accepted sockets only.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await attach(lambda: stream, sock=sock)  # type: ignore[misc]
    except BaseException:
        sock.close()
        raise
    return stream
