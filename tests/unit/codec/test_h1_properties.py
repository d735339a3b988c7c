"""Properties of the HTTP/1 engines over generated messages and over broken ones."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from netproxy.codec.events import Data, End, Event, Headers, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.h1 import H1Client, H1Server, client_engine, server_engine
from netproxy.codec.strict import FORBIDDEN_TRAILERS

from .playing import CORPUS, Outcome, agree, merged, octets, play_client, play_server

TCHARS = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
SPECIAL = {b"host", b"content-length", b"transfer-encoding", b"connection"}
SEEDS = [path.read_bytes() for path in sorted(CORPUS.glob("*/req-*.http"))]
RESPONSE_SEEDS = [path.read_bytes() for path in sorted(CORPUS.glob("*/resp-*.http"))]
FRAGMENTS = [
    *(
        b"\r\n",
        b"\r",
        b"\n",
        b" ",
        b"\t",
        b":",
        b";",
        b",",
        b"\x00",
        b"\x0b",
        b"\x7f",
        b"\xff",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
    ),
    *(b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.0\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 x\r\n\r\n"),
    *(b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n", b"5;a=b\r\n", b"hello"),
]

names = st.text(TCHARS, min_size=1, max_size=8).map(str.encode).filter(lambda name: name not in SPECIAL)
values = st.binary(max_size=12).map(lambda v: bytes(o for o in v if o == 9 or (o >= 32 and o != 127)).strip(b" \t"))
fields = st.lists(st.tuples(names, values), max_size=4)
trailer_fields = st.lists(st.tuples(names.filter(lambda name: name not in FORBIDDEN_TRAILERS), values), max_size=3)
bodies = st.lists(st.binary(min_size=1, max_size=20), max_size=4)
methods = st.text(TCHARS.upper(), min_size=1, max_size=8).map(str.encode).filter(lambda m: m != b"CONNECT")
targets = st.text([chr(o) for o in range(0x21, 0x7F) if chr(o) != "#"], max_size=12).map(lambda t: b"/" + t.encode())


class Content(NamedTuple):
    framing: Headers
    events: list[Event]


@st.composite
def contents(draw: st.DrawFn, *, empty_without_framing: bool) -> Content:
    kind = draw(st.sampled_from(["none", "length", "chunked"]))
    parts: list[Event] = [Data(1, part) for part in draw(bodies)]
    if kind == "chunked":
        trailers = draw(trailer_fields)
        return Content([(b"transfer-encoding", b"chunked")], parts + ([Trailers(1, trailers)] if trailers else []))
    if kind == "length" or not empty_without_framing:
        size = sum(len(part.data) for part in parts if isinstance(part, Data))
        return Content([(b"content-length", b"%d" % size)], parts)
    return Content([], [])


@st.composite
def requests(draw: st.DrawFn) -> list[Event]:
    content = draw(contents(empty_without_framing=True))
    headers = [(b"host", b"a.example:80"), *draw(fields), *content.framing]
    return [RequestHead(1, draw(methods), draw(targets), headers), *content.events, End(1)]


@st.composite
def responses(draw: st.DrawFn) -> list[Event]:
    content = draw(contents(empty_without_framing=False))
    head = ResponseHead(
        1, draw(st.integers(200, 999).filter(lambda s: s not in (204, 304))), [*draw(fields), *content.framing]
    )
    first = [Informational(1, 103, draw(fields)) for _ in range(draw(st.integers(0, 2)))]
    return [*first, head, *content.events, End(1)]


def carry(
    source: H1Server | H1Client, target: H1Server | H1Client, events: list[Event], sizes: list[int]
) -> list[Event]:
    """Encodes with one engine and decodes with the other, cut up as `sizes` says."""
    wire = b"".join(b"".join(source.send(1, event)) for event in events)
    return merged(event for part in cut(wire, sizes) for event in target.receive(part))


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    parts = []
    for size in sizes:
        if data:
            parts.append(data[:size])
            data = data[size:]
    return [*parts, data] if data else parts


sizes = st.lists(st.integers(1, 40), max_size=12)


@given(st.lists(st.tuples(requests(), responses(), sizes), min_size=1, max_size=3))
def test_what_is_encoded_is_decoded(exchanges: list[tuple[list[Event], list[Event], list[int]]]) -> None:
    client, server = client_engine(), server_engine()
    for request, response, cuts in exchanges:
        assert carry(client, server, request, cuts) == merged(request)
        head = request[0]
        assert isinstance(head, RequestHead)
        expected = merged(response)
        if head.method == b"HEAD":
            expected = [event for event in expected if not isinstance(event, Data | Trailers)]
        assert carry(server, client, response, cuts) == expected
        assert client.reusable and server.reusable


@given(st.lists(requests(), min_size=1, max_size=4), sizes)
def test_pipelined_requests_come_out_one_by_one(messages: list[list[Event]], cuts: list[int]) -> None:
    wire = b""
    for message in messages:
        client = client_engine()
        wire += b"".join(b"".join(client.send(1, event)) for event in message)
    played = play_server(cut(wire, cuts), eof=False)
    assert played.events == [event for message in messages for event in merged(message)]


@st.composite
def broken(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A message of the corpus, mutated; or fragments; or noise."""
    kind = draw(st.sampled_from(["seed", "seed", "seed", "fragments", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "fragments":
        return b"".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=8)))
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        insert = draw(st.one_of(st.just(b""), st.binary(max_size=2), st.sampled_from(FRAGMENTS)))
        data = data[:at] + insert + data[at + draw(st.integers(0, 3)) :]
    return data


def check(finest: Outcome, others: list[Outcome]) -> None:
    # Anything but RemoteProtocolError would have come through, so would the engines' own assertion that h11 and
    # strict agree. "h11:" would be a message that strict let pass and h11 did not.
    assert not finest.detail.startswith("h11")
    for other in others:
        assert agree(finest, other)


@given(broken(SEEDS), sizes)
def test_any_octets_to_a_server(data: bytes, cuts: list[int]) -> None:
    check(play_server(octets(data)), [play_server([data] if data else []), play_server(cut(data, cuts))])


@given(broken(RESPONSE_SEEDS), sizes, st.sampled_from([b"GET", b"HEAD"]))
def test_any_octets_to_a_client(data: bytes, cuts: list[int], method: bytes) -> None:
    # Up to the end of the response: what comes behind it raises or not, depending on whether it came with it.
    finest = play_client(method, octets(data))
    others = [play_client(method, [data] if data else []), play_client(method, cut(data, cuts))]
    if End(1) in finest.events:
        assert [other.events for other in others] == [finest.events] * 2
    else:
        check(finest, others)
