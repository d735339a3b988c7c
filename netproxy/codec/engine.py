# cython: annotation_typing=False
"""What engines are, see `h1` and `h2`. Classes and no protocols, so that compiled drivers reach compiled engines
without a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence

from netproxy.codec.events import Event


class Engine:
    """One side of one connection, see `events`."""

    def send(self, stream_id: int, event: Event) -> Sequence[bytes]:
        raise NotImplementedError

    def credit(self, stream_id: int, n: int) -> Sequence[bytes]:
        raise NotImplementedError

    def goaway(self) -> Sequence[bytes]:
        raise NotImplementedError

    def resume(self) -> list[Event]:
        """Of a server: events of what was held back. To be called after the head that begins a tunnel, and in HTTP/1
        after the End of each response; raises like `receive`."""
        raise NotImplementedError

    @property
    def must_close(self) -> bool:
        """HTTP/1: close the connection when the present exchange is over (now, if there is none). HTTP/2: write what
        there is, then close: broken, ended by the peer, or drained and without streams."""
        raise NotImplementedError

    @property
    def reusable(self) -> bool:
        """True between exchanges, when another one may start on this connection."""
        raise NotImplementedError

    @property
    def buffered(self) -> int:
        """Octets received and not yet turned into events. In HTTP/1 of a server; in HTTP/2 of a frame or header block
        that is not whole yet: it should not stay so for long."""
        raise NotImplementedError

    # The same properties, for who would look them up with every request.

    def is_last(self) -> bool:
        return self.must_close

    def held(self) -> int:
        return self.buffered


class H1Engine(Engine):
    """With what HTTP/1 has beyond it."""

    def receive(self, data: bytes) -> list[Event]:
        raise NotImplementedError

    def encode(self, event: Event) -> bytes:
        """`send`, of stream 1, in one piece."""
        return b"".join(self.send(1, event))

    def reset(self, stream_id: int, reason: str) -> Sequence[bytes]:
        raise NotImplementedError

    def keep_spelling(self, on: bool) -> None:
        """Shall heads that are read from now on tell how names of fields were written? Off at first."""
        raise NotImplementedError

    @property
    def is_full(self) -> bool:
        """Of a server: the client pipelined all that it may; stop reading until the present response is finished."""
        raise NotImplementedError

    def is_reusable(self) -> bool:
        return self.reusable

    def is_stuffed(self) -> bool:
        return self.is_full


class H2Engine(Engine):
    """With what HTTP/2 has beyond it."""

    def receive(self, data: bytes, now: float = 0.0) -> list[Event]:
        raise NotImplementedError

    def take_output(self) -> list[bytes]:
        """All that is to be written, in order. Each buffer is given once."""
        raise NotImplementedError

    def reset(self, stream_id: int, reason: str, code: int = 8) -> Sequence[bytes]:
        """Gives a stream up. `reason` is for people and is not sent."""
        raise NotImplementedError

    def ping(self, data: bytes) -> Sequence[bytes]:
        """Eight octets, of which PingAck tells again. LocalProtocolError while too many wait."""
        raise NotImplementedError

    def is_blocked(self, stream_id: int) -> bool:
        """Octets of it wait for the peer's windows; Writable comes when they have gone."""
        raise NotImplementedError

    def queued(self, stream_id: int) -> int:
        """How many."""
        raise NotImplementedError

    @property
    def stalled_streams(self) -> list[int]:
        """The streams that `is_blocked`."""
        raise NotImplementedError

    @property
    def open_streams(self) -> int:
        raise NotImplementedError

    @property
    def is_draining(self) -> bool:
        """No new streams: we said so, or the peer did."""
        raise NotImplementedError

    @property
    def settings_acked(self) -> bool:
        """The peer has seen our SETTINGS."""
        raise NotImplementedError

    def statistics(self) -> dict[str, int]:
        """Of now: streams, blocked, queued, owed (handed out, not credited), in_window, out_window (of the connection),
        glitches_left, resets_left (see `h2_strict`), buffered (octets of a frame or header block that is not whole)."""
        raise NotImplementedError

    # Of a client.

    @property
    def next_stream_id(self) -> int:
        raise NotImplementedError

    @property
    def free_streams(self) -> int:
        """How many may be opened now."""
        raise NotImplementedError

    @property
    def connect_protocol(self) -> bool:
        """The server knows extended CONNECT."""
        raise NotImplementedError
