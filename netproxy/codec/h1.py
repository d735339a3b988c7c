"""The door to HTTP/1: which engine speaks it, and what every engine offers beyond `events.Engine`.

Two engines with one behaviour: native (compiled, `h1_native`) and reference (h11 behind `strict`). `use` says which
one, for the process: native where it was compiled, unless told otherwise. A driver does it the same way with both:

    server   events = receive(data); ... send the response up to End ...; events = resume(); and so on,
             until `must_close` after an End: close. `is_full`: stop reading until the response is finished.
    client   send the request up to End, receive the response up to End; `reusable`: back to the pool, else close.

In a tunnel (see `events`) End is half a close, which the driver passes to the transport: engines write nothing for it.
A server's driver calls `resume` when it has sent the head that begins one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from netproxy.codec.choice import EngineChoice, Kind
from netproxy.codec.events import Engine, Event
from netproxy.codec.h1_reference import H1ReferenceClient, H1ReferenceServer
from netproxy.codec.strict import H1Limits

try:
    from netproxy.codec import h1_native
except ImportError:
    h1_native = None  # type: ignore[assignment]  # it was not compiled: no compiler at the installation

__all__ = ["ENGINES", "H1Client", "H1Limits", "H1Server", "chosen", "client_engine", "engine", "server_engine", "use"]


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


_choice: EngineChoice[H1Server, H1Client, H1Limits] = EngineChoice(
    "HTTP/1",
    native=None if h1_native is None else Kind(h1_native.H1NativeServer, h1_native.H1NativeClient),
    reference=Kind(H1ReferenceServer, H1ReferenceClient),
)
ENGINES = _choice.names
engine, chosen, use = _choice.engine, _choice.chosen, _choice.use
server_engine, client_engine = _choice.server, _choice.client
