# cython: annotation_typing=False
"""What was sent of a request, held for as long as it may be sent again.

A connection that was used before may be closed by its endpoint just when the next request goes out on it. Such a
request is sent again, once, on a fresh connection, if nothing came back and its method is idempotent (RFC 9110 section
9.2.2). One that is not idempotent is not: that nothing of it was read can't be proved once the kernel has it. But an
endpoint of HTTP/2 may say that it has not begun with it (RFC 9113 section 8.7): then it is sent again, whatever it is.
"""

from __future__ import annotations

from ..codec.events import Data, End, Event, RequestHead, Trailers

MAX_BODY = 64 * 1024
"""Octets of content that are held. What is larger is not sent again."""
_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))


def replay_of(head: RequestHead, reused: bool, shared: bool) -> Replay | None:
    """Of the connection that it goes out on. None: it will not be sent again, whatever happens."""
    reused = reused and head.method in _IDEMPOTENT
    if not reused and not shared:
        return None
    replay = Replay.__new__(Replay)
    replay._begin(head, reused)
    return replay


class Replay:
    def _begin(self, head: RequestHead, reused: bool) -> None:
        self._reused = reused
        self._head: RequestHead | None = head
        self._body: bytearray | None = None
        self._rest: list[Event] | None = None

    def keep(self, event: Event) -> None:
        """Called with all that is sent."""
        if self._head is None:
            return
        if type(event) is Data:
            # Copied into one piece: a body of single octets must not cost an object for each.
            if self._body is None:
                self._body = bytearray()
            self._body += event.data
            if len(self._body) > MAX_BODY:
                self.give_up()
        elif type(event) is End or type(event) is Trailers:
            if self._rest is None:
                self._rest = []
            self._rest.append(event)

    def give_up(self) -> None:
        self._head = None
        self._body = self._rest = None

    def take(self, *, untouched: bool) -> list[Event] | None:
        """All that was sent, to be sent again; None when it may not. There is no second time."""
        if self._head is None or not (self._reused or untouched):
            return None
        events: list[Event] = [self._head]
        if self._body:
            events.append(Data(1, bytes(self._body)))
        events += self._rest or ()
        self.give_up()
        return events
