"""Plays octets to an HTTP/1 engine, cut up in any way, and says what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from netproxy.codec.events import Data, End, Event, RequestHead, ResponseHead
from netproxy.codec.h1 import client_engine, server_engine
from netproxy.codec.strict import H1Limits
from netproxy.errors import RemoteProtocolError

CORPUS = Path(__file__).resolve().parents[2] / "corpus" / "http1"
NEXT_REQUEST = b"GET /next HTTP/1.1\r\nHost: n\r\n\r\n"
NEXT_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Outcome(NamedTuple):
    """Events with neighbouring Data merged, and the error they ended with."""

    events: list[Event]
    status: int = 0
    detail: str = ""
    must_close: bool = False


def merged(events: Iterable[Event]) -> list[Event]:
    out: list[Event] = []
    for event in events:
        if isinstance(event, Data) and out and isinstance(out[-1], Data):
            out[-1] = Data(1, out[-1].data + event.data)
        else:
            out.append(event)
    return out


def play_server(parts: Sequence[bytes], *, eof: bool = True, limits: H1Limits | None = None) -> Outcome:
    """Every request is answered by an empty 404 as soon as it is whole."""
    engine = server_engine(limits)
    seen: list[Event] = []
    try:
        for part in [*parts, b""] if eof else parts:
            events = engine.receive(part)
            while events:
                seen += events
                answered = False
                if End(1) in events:
                    engine.send(1, ResponseHead(1, 404, [(b"content-length", b"0")]))
                    engine.send(1, End(1))
                    answered = True
                events = engine.resume() if answered else []
    except RemoteProtocolError as exc:
        return Outcome(merged(seen), exc.status, exc.detail, engine.must_close)
    return Outcome(merged(seen), must_close=engine.must_close)


def play_client(method: bytes, parts: Sequence[bytes], *, eof: bool = True, limits: H1Limits | None = None) -> Outcome:
    """The response to one request without content; the end of stream comes only if it is not whole by then.

    Method UPGRADE: a GET that would have a protocol x.
    """
    engine = client_engine(limits)
    upgrade = [(b"connection", b"upgrade"), (b"upgrade", b"x")] if method == b"UPGRADE" else []
    target = b"a:1" if method == b"CONNECT" else b"/"
    engine.send(1, RequestHead(1, b"GET" if upgrade else method, target, [(b"host", b"a"), *upgrade]))
    engine.send(1, End(1))
    seen: list[Event] = []
    try:
        for part in parts:
            seen += engine.receive(part)
        if eof and End(1) not in seen:
            seen += engine.receive(b"")
    except RemoteProtocolError as exc:
        return Outcome(merged(seen), exc.status, exc.detail, engine.must_close)
    return Outcome(merged(seen), must_close=engine.must_close)


def octets(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def cuts_in_two(data: bytes) -> list[list[bytes]]:
    return [[data[:i], data[i:]] for i in range(1, len(data))]


def agree(finest: Outcome, other: Outcome) -> bool:
    """What comes octet by octet is the most that can come; a call that raises loses only what it found itself."""
    if other[1:] != finest[1:]:
        return False
    if not finest.status:
        return finest.events == other.events
    return _atoms(finest.events)[: len(_atoms(other.events))] == _atoms(other.events)


def _atoms(events: list[Event]) -> list[object]:
    atoms: list[object] = []
    for event in events:
        atoms += event.data if isinstance(event, Data) else [event]
    return atoms
