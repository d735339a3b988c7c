# cython: annotation_typing=False
"""What every HTTP/1 engine is, see `h1`. A class and no protocol, so that compiled drivers reach the compiled engine
without a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence

from netproxy.codec.events import Event


class H1Engine:
    """As `events.Engine`, with what HTTP/1 has beyond it."""

    def receive(self, data: bytes) -> list[Event]:
        raise NotImplementedError

    def send(self, stream_id: int, event: Event) -> list[bytes]:
        raise NotImplementedError

    def encode(self, event: Event) -> bytes:
        """`send`, of stream 1, in one piece."""
        return b"".join(self.send(1, event))

    def credit(self, stream_id: int, n: int) -> Sequence[bytes]:
        raise NotImplementedError

    def reset(self, stream_id: int, reason: str) -> Sequence[bytes]:
        raise NotImplementedError

    def goaway(self) -> Sequence[bytes]:
        raise NotImplementedError

    def keep_spelling(self, on: bool) -> None:
        """Shall heads that are read from now on tell how names of fields were written? Off at first."""
        raise NotImplementedError

    @property
    def must_close(self) -> bool:
        """Close the connection when the present exchange is over (now, if there is none)."""
        raise NotImplementedError

    @property
    def reusable(self) -> bool:
        """True between exchanges, when another one may start on this connection."""
        raise NotImplementedError

    def resume(self) -> list[Event]:
        """Of a server: events of what was held back. To be called after the End of each response, and after the head
        that begins a tunnel; raises like `receive`."""
        raise NotImplementedError

    @property
    def buffered(self) -> int:
        """Of a server: octets received and not yet turned into events."""
        raise NotImplementedError

    @property
    def is_full(self) -> bool:
        """Of a server: the client pipelined all that it may; stop reading until the present response is finished."""
        raise NotImplementedError

    # The same properties, for who would look them up with every request.

    def is_last(self) -> bool:
        return self.must_close

    def is_reusable(self) -> bool:
        return self.reusable

    def is_stuffed(self) -> bool:
        return self.is_full

    def held(self) -> int:
        return self.buffered
