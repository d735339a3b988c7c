"""The native HTTP/1 engine against the reference, step by step: events, octets, refusals and condition are the same.

Nothing may differ. Where both differ from the library as it comes is in `docs.differences`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netproxy.codec.events import Data, End, Event, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.fields import NAMING, seen_in
from netproxy.codec.h1_native import H1NativeClient, H1NativeServer
from netproxy.codec.h1_reference import H1ReferenceClient, H1ReferenceServer
from netproxy.codec.strict import H1Limits, connection_options
from netproxy.errors import LocalProtocolError, RemoteProtocolError

from ..unit.codec.playing import CORPUS, NEXT_REQUEST, NEXT_RESPONSE, cuts_in_two, merged, octets
from ..unit.codec.test_h1_properties import RESPONSE_SEEDS, SEEDS, broken, cut, requests, responses, sizes

SMALL = H1Limits(max_head_bytes=200, max_headers=4, max_trailer_bytes=60, max_pipelined_bytes=80)
SERVERS = (H1ReferenceServer, H1NativeServer)
CLIENTS = (H1ReferenceClient, H1NativeClient)
HOST = [(b"host", b"a")]


class Pair:
    """Both engines in the same condition. Every call is made on both and must give the same."""

    def __init__(self, kinds: tuple[Any, Any], limits: H1Limits | None, keep_spelling: bool) -> None:
        self.engines = [kind(limits) for kind in kinds]
        for engine in self.engines:
            engine.keep_spelling(keep_spelling)

    def both(self, call: Callable[[Any], Any]) -> Any:
        first, second = (outcome(call, engine) for engine in self.engines)
        assert second == first
        assert condition(self.engines[1]) == condition(self.engines[0])
        for event in second if isinstance(second, list) else ():
            if isinstance(event, RequestHead | ResponseHead):
                check_seen(event)
        return first

    def receive(self, data: bytes) -> Any:
        return self.both(lambda engine: merged(engine.receive(data)))

    def send(self, event: Event) -> Any:
        return self.both(lambda engine: b"".join(engine.send(1, event)))

    def resume(self) -> Any:
        return self.both(lambda engine: merged(engine.resume()))


def outcome(call: Callable[[Any], Any], engine: Any) -> Any:
    """What it returned; of an error of theirs status and words, of ours only that it is one."""
    try:
        return call(engine)
    except RemoteProtocolError as exc:
        return ("refused", exc.status, exc.detail)
    except LocalProtocolError:
        return "misused"


def check_seen(head: RequestHead | ResponseHead) -> None:
    """What the native engine has noticed is what a look at the fields finds. It knows more of Connection fields that
    name nothing: those may be thought to name something, not the other way round."""
    expected = seen_in(head.headers)
    assert head.seen & ~NAMING == expected & ~NAMING
    assert not head.seen & NAMING or expected & NAMING
    if not head.seen & NAMING:
        assert set(connection_options(head.headers)) <= {b"close", b"keep-alive"}


def condition(engine: Any) -> tuple[Any, ...]:
    both = (engine.must_close, engine.reusable)
    assert (engine.is_last(), engine.is_reusable()) == both
    if not isinstance(engine, SERVERS):
        return both
    assert (engine.held(), engine.is_stuffed()) == (engine.buffered, engine.is_full)
    return (*both, engine.buffered, engine.is_full)


# --- octets

limits = st.sampled_from([None, SMALL])
ANSWERS: list[list[Event]] = [
    [ResponseHead(1, 404, [(b"content-length", b"0")]), End(1)],
    [ResponseHead(1, 200, []), Data(1, b"hi"), Trailers(1, [(b"x", b"y")]), End(1)],
    [Informational(1, 100, []), ResponseHead(1, 204, []), End(1)],
    [ResponseHead(1, 200, [(b"connection", b"close")]), Data(1, b"hi"), End(1)],
    [ResponseHead(1, 101, [(b"connection", b"upgrade"), (b"upgrade", b"x")]), Data(1, b"hi"), End(1)],
    [],
]
answers = st.sampled_from(ANSWERS)


def play_server(parts: list[bytes], answer: list[Event], limits: H1Limits | None, keep: bool) -> None:
    pair = Pair(SERVERS, limits, keep)
    for part in [*parts, b""]:
        events = pair.receive(part)
        for _ in range(8):
            if not isinstance(events, list) or End(1) not in events:
                break
            for event in answer:
                if pair.send(event) == "misused":
                    return
            events = pair.resume()


def play_client(method: bytes, parts: list[bytes], limits: H1Limits | None, keep: bool) -> None:
    pair = Pair(CLIENTS, limits, keep)
    headers = HOST + ([(b"connection", b"upgrade"), (b"upgrade", b"x")] if method == b"UP" else [])
    pair.send(RequestHead(1, method, b"a:1" if method == b"CONNECT" else b"/", headers))
    pair.send(End(1))
    for part in [*parts, b""]:
        pair.receive(part)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*.http")), ids=lambda path: path.stem)
def test_corpus(path: Any) -> None:
    data = path.read_bytes()
    for tail in (b"", NEXT_REQUEST if path.stem.startswith("req") else NEXT_RESPONSE):
        for parts in ([data + tail], *cuts_in_two(data + tail), octets(data + tail)):
            if path.stem.startswith("req"):
                play_server(parts, [ResponseHead(1, 404, [(b"content-length", b"0")]), End(1)], None, True)
            else:
                play_client(path.stem.split("-")[1].encode(), parts, None, True)


LINES = [
    *(b"accept: " + b"x" * size for size in range(1, 100)),  # those of 8 to 96 octets are kept
    *(name + b": v" for name in (b"a", b"te", b"via", b"Date", b"HOST", b"x-Forwarded_client.cert")),
    *(b"Connection: " + value for value in (b"close", b" Close ", b"keep-alive", b"te", b"x, close", b"", b"host")),
    *(b"content-length:" + value for value in (b"0", b" 00", b"1x", b"\t0")),
    *(b"transfer-encoding: " + value for value in (b"chunked", b"Chunked", b"gzip")),
    *(b"user-agent:" + blank + b"same" + blank for blank in (b"", b" ", b"\t")),
    *(b"accept: a" + bytes((octet,)) + b"bcdefgh" for octet in range(256)),
]


@pytest.mark.parametrize("keep", [False, True])
def test_a_line_that_came_before_reads_the_same(keep: bool) -> None:
    for line in LINES:
        request = b"GET / HTTP/1.1\r\nhost: a\r\n" + line + b"\r\n" + line.upper() + b"\r\n\r\n"
        for _ in range(3):
            play_server([request], ANSWERS[0], None, keep)
            play_client(b"GET", [b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\n"], None, keep)


@settings(max_examples=400)
@given(st.lists(broken(SEEDS), max_size=3), sizes, answers, limits, st.booleans())
def test_any_octets_to_a_server(
    pieces: list[bytes], cuts: list[int], answer: list[Event], limits: H1Limits | None, keep: bool
) -> None:
    play_server(cut(b"".join(pieces), cuts), answer, limits, keep)


@settings(max_examples=400)
@given(
    st.lists(broken(RESPONSE_SEEDS), max_size=2), sizes, st.sampled_from([b"GET", b"HEAD", b"CONNECT", b"UP"]),
    limits, st.booleans(),
)  # fmt: skip
def test_any_octets_to_a_client(
    pieces: list[bytes], cuts: list[int], method: bytes, limits: H1Limits | None, keep: bool
) -> None:
    play_client(method, cut(b"".join(pieces), cuts), limits, keep)


# --- events

names = st.sampled_from(
    [b"host", b"Host", b"content-length", b"Content-Length", b"transfer-encoding", b"connection", b"upgrade", b"x", b"",
     b"x y", b"te", b"expect", b"x\r\n", b":a", b"\xff"]
)  # fmt: skip
values = st.sampled_from(
    [b"", b"a", b"0", b"2", b"02", b"-1", b"+2", b"9" * 19, b"9" * 20, b"chunked", b"Chunked", b"gzip, chunked",
     b"close", b"Keep-Alive, close", b"upgrade", b"a:80", b"u@a", b" a", b"a\t", b"a\r\nb: c", b"a\x00", b"\xc3\xa4",
     b"[::1]:80"]
)  # fmt: skip
fields = st.lists(st.tuples(names, values), max_size=3)
targets = st.sampled_from([b"/", b"/a?b#c", b"*", b"a:80", b"a", b"http://a/b", b"/a b", b"", b"/\xff", b"http://u@a/"])
heads = st.one_of(
    st.builds(
        RequestHead, st.just(1), st.sampled_from([b"GET", b"HEAD", b"CONNECT", b"OPTIONS", b"G T", b""]), targets,
        st.one_of(st.just(HOST), fields, fields.map(lambda more: HOST + more)),
    ),
    st.builds(ResponseHead, st.just(1), st.sampled_from([100, 101, 199, 200, 204, 304, 404, 999, 1000]), fields),
    st.builds(Informational, st.just(1), st.sampled_from([100, 101, 103, 200]), fields),
)  # fmt: skip
bodies = st.one_of(
    st.just(End(1)), st.builds(Data, st.just(1), st.sampled_from([b"", b"a", b"ab", b"x" * 300])),
    st.builds(Trailers, st.just(1), fields),
)  # fmt: skip
steps = st.lists(st.one_of(heads, bodies, bodies, st.sampled_from(["goaway", "resume"])), max_size=8)
_REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nh", b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\nhi",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nhi", b"GET / HT", b"BAD\r\n", b"",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
]  # fmt: skip


@settings(max_examples=600)
@given(st.sampled_from(_REQUESTS), steps)
def test_any_events_to_a_server(request: bytes, steps: list[Any]) -> None:
    pair = Pair(SERVERS, None, False)
    if request:
        pair.receive(request)
    play(pair, steps)


@settings(max_examples=600)
@given(steps, st.sampled_from([b"HTTP/1.1 204 x\r\n\r\n", b"HTTP/1.1 200 x\r\nContent-Length: 1\r\n\r\na", b"x"]))
def test_any_events_to_a_client(steps: list[Any], response: bytes) -> None:
    pair = Pair(CLIENTS, None, False)
    play(pair, steps)
    pair.receive(response)
    play(pair, steps)


def play(pair: Pair, steps: list[Any]) -> None:
    for step in steps:
        if step == "goaway":
            pair.both(lambda engine: engine.goaway())
        elif step == "resume":
            if isinstance(pair.engines[0], SERVERS):
                pair.resume()
        elif pair.send(step) == "misused":
            pair.send(End(1))
            return


@given(st.lists(st.tuples(requests(), responses()), min_size=1, max_size=3), sizes)
def test_what_one_encodes_the_other_decodes(exchanges: list[tuple[list[Event], list[Event]]], cuts: list[int]) -> None:
    for ours, theirs in ((0, 1), (1, 0)):
        client, server = CLIENTS[ours](), SERVERS[theirs]()
        for request, response in exchanges:
            for source, target, events in ((client, server, request), (server, client, response)):
                wire = b"".join(b"".join(source.send(1, event)) for event in events)
                seen = merged(event for part in cut(wire, cuts) for event in target.receive(part))
                head = request[0]
                if target is client and isinstance(head, RequestHead) and head.method == b"HEAD":
                    events = [event for event in events if not isinstance(event, Data | Trailers)]
                assert seen == merged(events)
