# cython: annotation_typing=False
"""A two-way byte stream with backpressure and half-close: TCP as it is, or TLS over it.

Rules that hold for every implementation:

* The owner sets `sink` before the loop can deliver anything, and may replace it later.
* `closed` is called exactly once and is the last call; nothing is delivered after `abort`, save it.
* `eof_received` means that the peer will send no more; the stream stays writable.
* `write_eof` says that we will send no more once what is queued is out; reading goes on.
* `writable(False)` asks the owner to stop writing, `writable(True)` to go on. Nothing is lost when
  the owner writes regardless, but then memory is not bounded: do not.
* `pause_reading` and `resume_reading` may be called in any order and state, any number of times.
"""

from __future__ import annotations

from typing import Protocol

HIGH_WATER = 256 * 1024
"""One read of uvloop: a relay is asked to stop once it has queued more than a single turn's worth."""


class Sink(Protocol):
    """What the owner of a stream receives."""

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> None: ...

    def writable(self, ok: bool) -> None: ...

    def closed(self, exc: Exception | None) -> None: ...


class Stream:
    """The door of a stream. `closing` is true from `close` or `abort` on, and after the peer's reset.

    A class and no protocol, so that compiled callers reach compiled streams without a look-up.
    """

    __slots__ = ()

    @property
    def sink(self) -> Sink:
        raise NotImplementedError

    @sink.setter
    def sink(self, sink: Sink) -> None:
        raise NotImplementedError

    @property
    def closing(self) -> bool:
        raise NotImplementedError

    def is_closing(self) -> bool:
        """The same."""
        return self.closing

    def write(self, data: bytes) -> None:
        raise NotImplementedError

    def write_eof(self) -> None:
        raise NotImplementedError

    def pause_reading(self) -> None:
        raise NotImplementedError

    def resume_reading(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Flush what is queued, then close both ways."""
        raise NotImplementedError

    def abort(self) -> None:
        """Close now; what is queued is dropped, the peer sees a reset."""
        raise NotImplementedError

    def buffered(self) -> int:
        """Octets accepted by `write` that the kernel has not taken yet."""
        raise NotImplementedError
