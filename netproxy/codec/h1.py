"""The door to HTTP/1: which engine speaks it, and what every engine offers beyond `events.Engine`.

Only the reference engine exists. Whoever drives an engine does it the same way:

    server   events = receive(data); ... send the response up to End ...; events = resume(); and so on,
             until `must_close` after an End: close. `is_full`: stop reading until the response is finished.
    client   send the request up to End, receive the response up to End; `reusable`: back to the pool, else close.

In a tunnel (see `events`) End is half a close, which the driver passes to the transport: engines write nothing for it.
A server's driver calls `resume` when it has sent the head that begins one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from netproxy.codec.events import Engine, Event
from netproxy.codec.h1_reference import H1ReferenceClient, H1ReferenceServer
from netproxy.codec.strict import H1Limits

__all__ = ["H1Client", "H1Limits", "H1Server", "client_engine", "server_engine"]


class H1Client(Engine, Protocol):
    @property
    def must_close(self) -> bool:
        """Close the connection when the present exchange is over (now, if there is none)."""

    def keep_spelling(self, on: bool) -> None:
        """Shall heads that are read from now on tell how names of fields were written? Off at first."""


class H1Server(Engine, Protocol):
    @property
    def must_close(self) -> bool:
        """Close the connection when the present exchange is over (now, if there is none)."""

    def keep_spelling(self, on: bool) -> None:
        """Shall heads that are read from now on tell how names of fields were written? Off at first."""

    @property
    def buffered(self) -> int:
        """Octets received and not yet turned into events."""

    @property
    def is_full(self) -> bool:
        """The client pipelined all that it may: stop reading until the present response is finished."""

    def resume(self) -> Sequence[Event]:
        """Events of what was held back. To be called after the End of each response, and after the head that begins a
        tunnel; raises like `receive`."""


def server_engine(limits: H1Limits | None = None) -> H1Server:
    return H1ReferenceServer(limits)


def client_engine(limits: H1Limits | None = None) -> H1Client:
    return H1ReferenceClient(limits)
