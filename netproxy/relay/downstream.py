# cython: annotation_typing=False
"""The door from a request to the client that asked: a connection of HTTP/1, or one of many streams of HTTP/2.

Begins with `attach`, in the constructor of the exchange. Then, as the exchange says: any `hold` and `send`, at most one
`answer` in the place of a response, and at most one of `exchange_done`, `tunnel_done` and `reset` at the end. None of
them when the other side has said `downstream_gone`, but `exchange_done`, which does nothing then.

The other side tells the exchange what comes in order (`request_data`, `request_trailers`, `request_end`), never while
it holds more than a bound, and `downstream_writable`, `downstream_gone`, `bad_request`, `check`, `abort`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..codec.events import Data, End, Event
from ..errors import Grpc, LocalProtocolError, Reason
from .exchange import problem
from .services import Facts, Services

if TYPE_CHECKING:
    from .request import Exchange


class Downstream:
    """A class and no protocol, so that a compiled exchange reaches a compiled connection without a look-up."""

    def begin(self, facts: Facts, services: Services, protocol: str, now: float) -> None:
        """For constructors: one of its own would be a look-up."""
        self.facts = facts
        self.services = services
        self.protocol = protocol
        """As metrics and the access log name it: ``http/1.1``, ``http/2``."""
        self.activity = now
        """When something moved last."""

    def takes_more(self) -> bool:
        """Does the client take more? What is sent regardless is kept, so only what is under way should be."""
        raise NotImplementedError

    def attach(self, exchange: Exchange) -> None:
        raise NotImplementedError

    def hold(self, why: int, on: bool) -> None:
        """Bring no more content of the request while there is any reason, of `request`."""
        raise NotImplementedError

    def touch(self) -> None:
        """Something moved."""
        raise NotImplementedError

    def send(self, event: Event) -> None:
        """Of stream 1, whatever its number is to the client. Raises LocalProtocolError."""
        raise NotImplementedError

    def announce_close(self) -> None:
        """The rest of the request is not wanted: the next head of a response says so, where it can."""
        raise NotImplementedError

    def begin_tunnel(self) -> None:
        """The head that grants it was sent. What the client has sent behind its request already is for the tunnel."""
        raise NotImplementedError

    def end_sending(self) -> None:
        """The tunnel's way to the client is over."""
        raise NotImplementedError

    def tunnel_done(self) -> None:
        """Both ways are over. What is still queued goes out first."""
        raise NotImplementedError

    def exchange_done(self, must_close: bool) -> None:
        """The response is complete, at `activity`. `must_close`: where one request follows the other, none may follow
        this one."""
        raise NotImplementedError

    def reset(self) -> None:
        """The response can't be completed, and the client must see that."""
        raise NotImplementedError


def answer(
    downstream: Downstream,
    reason: Reason,
    detail: str,
    decided_by: str,
    tried: Sequence[str],
    status: int = 0,
    *,
    as_grpc: Grpc | None = None,
) -> int:
    """Our own complete response. Returns its status."""
    date = downstream.services.stamps.date(downstream.services.now())
    head, body = problem(reason, detail, decided_by, tried, status=status, date=date, as_grpc=as_grpc)
    try:
        downstream.send(head)
        if body:
            downstream.send(Data(1, body))
        downstream.send(End(1))
    except LocalProtocolError:
        downstream.reset()
    return head.status
