"""What an input is played to: native and reference step by step, then native and the library as it comes.

An input is CONTROL octets and what the peer sends:

    0  which side we are            1  limits: the usual, or small
    2  HTTP/1: keep spelling; HTTP/2: how much the driver does
    3  HTTP/1: what is answered, or the method that was asked with; HTTP/2: how the connection starts
    4  HTTP/1: cut whole, octet by octet, or at random
    5-7 (HTTP/2: 4-7)  what the random of cuts and driver starts from

`AssertionError`, or anything else that comes out of a target, is a finding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from netproxy.codec.events import End, Event, RequestHead, ResponseHead
from netproxy.codec.h1_native import H1NativeClient, H1NativeServer
from netproxy.codec.h2_native import H2NativeClient, H2NativeServer
from netproxy.codec.h2_strict import PREFACE, Frame, H2Limits
from netproxy.codec.strict import H1Limits
from netproxy.errors import RemoteProtocolError

from ..differential import libraries, test_h1, test_h2
from ..differential.libraries import frames_of
from ..unit.codec import h2_frames as h2f
from ..unit.codec.playing import CORPUS, merged, octets
from ..unit.codec.test_h2_transcripts import (
    BROKEN,
    BROKEN_ANSWERS,
    REFUSED_HEADS,
    REFUSED_RESPONSES,
    TO_CLIENTS,
    TO_SERVERS,
)
from .mutate import CONTROL

H1_METHODS = (b"GET", b"HEAD", b"CONNECT", b"UP")
H1_KINDS: tuple[Any, Any] = (H1NativeServer, H1NativeClient)
H2_KINDS: tuple[Any, Any] = (H2NativeServer, H2NativeClient)
SERVER, CLIENT = 0, 1
SHARE = 5


@dataclass(frozen=True)
class Input:
    control: bytes
    wire: bytes

    @classmethod
    def read(cls, data: bytes) -> Input:
        return cls(data[:CONTROL].ljust(CONTROL, b"\0"), data[CONTROL:])

    @property
    def side(self) -> int:
        return self.control[0] & 1

    @property
    def method(self) -> bytes:
        """Of a client of HTTP/1. UP: a GET that would have a protocol x."""
        return H1_METHODS[self.control[3] % len(H1_METHODS)]

    @property
    def is_small(self) -> bool:
        return self.control[1] % 4 == 3


# --- HTTP/1


def run_h1(data: bytes) -> None:
    case = Input.read(data)
    limits = test_h1.SMALL if case.is_small else None
    keep = bool(case.control[2] & 1)
    parts = _cut(case)
    if case.side == SERVER:
        answer = test_h1.ANSWERS[case.control[3] % len(test_h1.ANSWERS)]
        test_h1.play_server(parts, answer, limits, keep)
    else:
        test_h1.play_client(case.method, parts, limits, keep)
    hold_against_h11(case, limits or H1Limits())


def hold_against_h11(case: Input, limits: H1Limits) -> None:
    if case.side == SERVER:
        events, detail = _read_requests(H1_KINDS[SERVER](limits), case.wire)
        libraries.judge_h1(events, detail, libraries.h11_server(case.wire))
    else:
        events, detail = _read_answer(H1_KINDS[CLIENT](limits), case.method, case.wire)
        libraries.judge_h1(events, detail, libraries.h11_client(case.method, case.wire), case.method)


def _cut(case: Input) -> list[bytes]:
    wire, rng = case.wire, random.Random(case.control[5:])
    match case.control[4] % 4:
        case 0:
            return [wire] if wire else []
        case 1 if len(wire) <= 600:
            return octets(wire)
        case _:
            parts = []
            while wire:
                size = rng.choice((1, 2, 7, 40, 300))
                parts.append(wire[:size])
                wire = wire[size:]
            return parts


def _read_requests(engine: Any, wire: bytes) -> tuple[list[Event], str]:
    """Each is answered by an empty 404 when it is whole."""
    seen: list[Event] = []
    try:
        # Octet by octet: events of a call that raises are lost, and there are none before them here.
        for part in (*octets(wire), b""):
            events = engine.receive(part)
            while events:
                seen += events
                if End(1) not in events:
                    break
                engine.send(1, ResponseHead(1, 404, [(b"content-length", b"0")]))
                engine.send(1, End(1))
                events = engine.resume()
    except RemoteProtocolError as exc:
        return merged(seen), exc.detail
    return merged(seen), ""


def _read_answer(engine: Any, method: bytes, wire: bytes) -> tuple[list[Event], str]:
    upgrade = [(b"connection", b"upgrade"), (b"upgrade", b"x")] if method == b"UP" else []
    target = b"a:1" if method == b"CONNECT" else b"/"
    engine.send(1, RequestHead(1, method, target, [(b"host", b"a"), *upgrade]))
    engine.send(1, End(1))
    seen: list[Event] = []
    try:
        for part in (*octets(wire), b""):
            seen += engine.receive(part)
    except RemoteProtocolError as exc:
        return merged(seen), exc.detail
    return merged(seen), ""


def h1_seeds() -> Iterator[bytes]:
    accept = sorted(CORPUS.glob("accept/*.http"))
    # What is refused at once leads nowhere: what is taken has to be as likely, though there is less of it.
    for path in (*accept * SHARE, *sorted(CORPUS.glob("reject/*.http"))):
        kind, method, *_ = path.stem.split("-")
        control = bytearray(CONTROL)
        if kind != "req":
            name = b"UP" if method == "UPGRADE" else method.encode()
            control[0], control[3] = CLIENT, H1_METHODS.index(name) if name in H1_METHODS else 0
        yield bytes(control) + path.read_bytes()


# --- HTTP/2


def run_h2(data: bytes) -> None:
    case = Input.read(data)
    limits = test_h2.SMALL if case.is_small else None
    rng = random.Random(case.control[4:])
    kinds = test_h2.SERVERS if case.side == SERVER else test_h2.CLIENTS
    play = test_h2.Play(test_h2.Pair(kinds, limits), rng)
    start = h2f.CLIENT_START if case.side == SERVER else h2f.SERVER_START
    match case.control[3] % 16:
        case 14:
            start = b""
        case 15:
            start = PREFACE if case.side == SERVER else h2f.settings()
    if start:
        play.receive(start)
    if case.side == CLIENT:
        for _ in range(3):
            play.request()
    frames = frames_of(case.wire)
    for raw in [*frames, case.wire[sum(map(len, frames)) :]]:
        if not raw:
            continue
        stream_id = int.from_bytes(raw[5:9], "big")
        if case.side == SERVER and raw[3:4] == bytes((Frame.HEADERS,)) and stream_id & 1 and stream_id < 1000:
            play.last = max(play.last, stream_id)
        play.receive(raw)
        for _ in range(case.control[2] % 4):
            play.driver()
    if case.control[2] & 16:
        play.eof()
    hold_against_h2(case, limits or H2Limits())


def hold_against_h2(case: Input, limits: H2Limits) -> None:
    engine = H2_KINDS[case.side](limits)
    library = libraries.h2_connection(limits, client=case.side == CLIENT)
    start = h2f.CLIENT_START if case.side == SERVER else h2f.SERVER_START
    engine.receive(start)
    library.receive_data(start)
    if case.side == CLIENT:
        for stream_id, method in ((1, b"POST"), (3, b"HEAD"), (5, b"GET")):
            engine.send(stream_id, RequestHead(stream_id, method, b"/", [(b"host", b"a.example")]))
            library.send_headers(stream_id, [(b":method", method), *h2f.REQUEST[1:]])
            if stream_id != 1:
                engine.send(stream_id, End(stream_id))
                library.end_stream(stream_id)
    engine.take_output()
    library.clear_outbound_data_buffer()
    libraries.judge_h2(engine, library, case.wire)


def h2_seeds() -> Iterator[bytes]:
    server, client = bytes(CONTROL), bytes((CLIENT, *bytes(CONTROL - 1)))
    for wire, _ in (*list(TO_SERVERS.values()) * SHARE, *BROKEN.values()):
        yield server + wire.removeprefix(h2f.CLIENT_START)
    for fields, _ in REFUSED_HEADS.values():
        yield server + h2f.headers(1, fields, end=True)
    for wire, _ in (*list(TO_CLIENTS.values()) * SHARE, *REFUSED_RESPONSES.values(), *BROKEN_ANSWERS.values()):
        yield client + wire
