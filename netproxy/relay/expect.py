"""``Expect: 100-continue``: a client that waits before it sends the content of its request (RFC 9110 section 10.1.1).

The request goes to the upstream at once, with its expectation, and whichever comes first ends the waiting:

* the upstream's 100, which is passed on (whatever other 1xx comes before it is passed on, too);
* its final answer, which is passed on with ``connection: close``, and the connection is closed: whether the client
  sends the content after such an answer is up to it, so nobody could say what its next octets are;
* the content, from a client that does not wait;
* silence for `expect_continue_timeout_s`: then we say 100, once, and a later one of the upstream is dropped. Servers
  that don't know the expectation wait for the content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

CONTINUE = b"100-continue"


class Expectation:
    __slots__ = ("_said", "_say", "_timer", "_waiting")

    def __init__(self, say: Callable[[], None]) -> None:
        """`say`: what says 100 to the client."""
        self._say = say
        self._waiting = True
        self._said = False
        self._timer: asyncio.TimerHandle | None = None

    def head_sent(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        """The upstream has the head, or another one has: its time begins."""
        if self._waiting:
            self._cancel()
            self._timer = loop.call_later(timeout_s, self._expired)

    def over(self) -> None:
        self._waiting = False
        self._cancel()

    def passes(self, status: int) -> bool:
        """Shall this 1xx of the upstream go on to the client?"""
        if status != 100:
            return True
        self.over()
        return not self._said

    def _expired(self) -> None:
        self.over()
        self._said = True
        self._say()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
