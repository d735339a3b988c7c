# cython: annotation_typing=False
"""The reading half that every implementation of `Stream` shares: what the sink hears and when."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from .stream import Sink


class Delivery:
    """What the sink is told and when: in order, never while paused, `closed` once and last.

    `ready` is true when data may be given to `target` without looking at anything else; otherwise it is given to
    `hold`. `more` is called whenever reading from below may go on.
    """

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
        if not self.ready:
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
        if self._stopped or self.target is None or self._told_blocked == self._blocked:
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
        if self._held or self._eof or self._lost or self._scheduled or self._blocked != self._told_blocked:
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
