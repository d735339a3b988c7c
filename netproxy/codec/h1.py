"""The door to HTTP/1: which engine speaks it, and what every engine offers beyond `engine.Engine`.

Two engines with one behaviour: native (compiled, `h1_native`) and reference (h11 behind `strict`). `use` says which
one, for the process: native where it was compiled, unless told otherwise. A driver does it the same way with both:

    server   events = receive(data); ... send the response up to End ...; events = resume(); and so on,
             until `must_close` after an End: close. `is_full`: stop reading until the response is finished.
    client   send the request up to End, receive the response up to End; `reusable`: back to the pool, else close.

In a tunnel (see `events`) End is half a close, which the driver passes to the transport: engines write nothing for it.
A server's driver calls `resume` when it has sent the head that begins one.
"""

from __future__ import annotations

from typing import TypeAlias

from netproxy.codec.choice import EngineChoice, Kind
from netproxy.codec.engine import H1Engine
from netproxy.codec.h1_reference import H1ReferenceClient, H1ReferenceServer
from netproxy.codec.strict import H1Limits

try:
    from netproxy.codec import h1_native
except ImportError:
    h1_native = None  # type: ignore[assignment]  # it was not compiled: no compiler at the installation

__all__ = ["ENGINES", "H1Client", "H1Limits", "H1Server", "chosen", "client_engine", "engine", "server_engine", "use"]


H1Client: TypeAlias = H1Engine
H1Server: TypeAlias = H1Engine
"""What both sides are; `resume`, `buffered` and `is_full` are a server's."""

_choice: EngineChoice[H1Server, H1Client, H1Limits] = EngineChoice(
    "HTTP/1",
    native=None if h1_native is None else Kind(h1_native.H1NativeServer, h1_native.H1NativeClient),
    reference=Kind(H1ReferenceServer, H1ReferenceClient),
)
ENGINES = _choice.names
engine, chosen, use = _choice.engine, _choice.chosen, _choice.use
server_engine, client_engine = _choice.server, _choice.client
