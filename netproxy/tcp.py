"""A `Stream` over one TCP socket, on uvloop or asyncio.

Rules:

* What is read while the owner has paused, or before it has set a sink, is held and replayed in a loop turn
  of its own. At most one read of the loop (256 KiB) is held, since the socket is paused at once.
* `abort` resets (SO_LINGER 0): a FIN would tell the peer that a truncated body was complete.
* The stream never closes itself: when both sides have sent their end, the owner calls `close`.

`delivery` decides when the sink hears what.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

from .delivery import Delivery
from .errors import LocalProtocolError
from .stream import HIGH_WATER, Sink, Stream

try:
    from netproxy import tcp_native
except ImportError:
    tcp_native = None  # type: ignore[assignment]  # it was not compiled: no compiler at the installation

STREAMS = ("native", "loop") if tcp_native is not None else ("loop",)
"""Those that there are, the preferred one first: `tcp_native`, or the loop's transports."""
_in_use = {"streams": STREAMS[0]}


def use(streams: str) -> None:
    """Every stream that is made from now on is of this kind, one of `STREAMS`."""
    if streams not in STREAMS:
        raise ValueError(f"no streams {streams!r} here, there are: {', '.join(STREAMS)}")
    _in_use["streams"] = streams


_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class TcpStream(asyncio.Protocol, Stream):
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
            self._deliver_rest(exc)
        # uvloop's transport has no socket to reset any more.
        self._aborted = self._closing = True
        self._delivery.lost(exc)

    def _deliver_rest(self, exc: Exception) -> None:
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
                if isinstance(exc, BrokenPipeError):
                    # A reset behind the peer's end; without one it is ECONNRESET (tcp_reset), and b"" says nothing.
                    self._eof = True
                    self._delivery.eof()
                return
            left -= len(data)
            self._delivery.target.data_received(data)


async def accepted(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, sink: Sink | None = None, *, high_water: int = HIGH_WATER
) -> Stream:
    """The stream of a socket that `accept` returned. It owns `sock`, also when this raises OSError."""
    return await _stream(loop.connect_accepted_socket, sock, sink, high_water)


async def connected(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, sink: Sink | None = None, *, high_water: int = HIGH_WATER
) -> Stream:
    """The stream of a connected, non-blocking socket. It owns `sock`, also when this raises OSError."""
    return await _stream(loop.create_connection, sock, sink, high_water)


async def _stream(attach: Callable[..., object], sock: socket.socket, sink: Sink | None, high_water: int) -> Stream:
    try:
        if _in_use["streams"] == "native" and tcp_native is not None:
            return tcp_native.TcpStream(asyncio.get_running_loop(), sock, sink, high_water=high_water)
        stream = TcpStream(sink, high_water=high_water)
        # asyncio sets it on accepted sockets only.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await attach(lambda: stream, sock=sock)  # type: ignore[misc]
    except BaseException:
        sock.close()
        raise
    return stream
