"""The native HTTP/2 engine against the reference, step by step: same events, frames, refusals and condition.

Nothing may differ. Where both differ from the library as it comes is in `docs.differences`. An engine is free in how it
compresses a header block, and where it cuts its output into pieces.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import hpack
from hypothesis import given, settings
from hypothesis import strategies as st

from netproxy.codec.events import Data, End, Headers, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.h2_native import H2NativeClient, H2NativeServer
from netproxy.codec.h2_reference import H2ReferenceClient, H2ReferenceServer
from netproxy.codec.h2_strict import KIB, PREFACE, Frame, H2Limits
from netproxy.errors import LocalProtocolError, RemoteProtocolError
from tests.unit.codec import h2_frames as h2f

SERVERS = (H2NativeServer, H2ReferenceServer)
CLIENTS = (H2NativeClient, H2ReferenceClient)
SMALL = H2Limits(
    max_header_list_bytes=KIB, max_headers=12, max_streams=3, stream_window=65535, connection_window=65535,
    max_queued_bytes=70_000, resets=5, glitches=60, resets_per_s=2, glitches_per_s=8,
)  # fmt: skip
CONDITION = ("open_streams", "is_draining", "must_close", "settings_acked", "stalled_streams", "reusable")
CLIENT_CONDITION = ("next_stream_id", "free_streams", "connect_protocol")


class Pair:
    """Two engines in the same situation."""

    def __init__(self, kinds: tuple[type[Any], type[Any]], limits: H2Limits | None) -> None:
        self.engines = [kind(limits) for kind in kinds]
        self.readers = [h2f.Reader(), h2f.Reader()]
        self.is_client = isinstance(self.engines[0], CLIENTS)
        self.compare()

    def both(self, call: Callable[[Any], Any], *, take: bool = True) -> Any:
        native, reference = (outcome(call, engine) for engine in self.engines)
        assert native == reference
        if take:
            self.compare()
        return native

    def compare(self) -> None:
        frames = [h2f.written(engine, reader) for engine, reader in zip(self.engines, self.readers, strict=True)]
        assert frames[0] == frames[1]
        native, reference = (condition(engine) for engine in self.engines)
        assert native == reference


def outcome(call: Callable[[Any], Any], engine: Any) -> Any:
    try:
        return call(engine)
    except RemoteProtocolError as exc:
        return ("refused", exc.status, exc.detail)
    except LocalProtocolError as exc:
        return f"misused: {exc}"


def condition(engine: Any) -> list[Any]:
    names = CONDITION + (CLIENT_CONDITION if isinstance(engine, CLIENTS) else ())
    return [getattr(engine, name) for name in names] + [engine.statistics()]


# --- what peers and drivers do, usual and not

HOST = [(b"host", b"a.example")]
REQUESTS: list[Headers] = [
    h2f.REQUEST,
    h2f.POST,
    h2f.POST,
    [*h2f.POST, (b"content-length", b"1002")],
    [*h2f.REQUEST, (b"cookie", b"a"), (b"x", b"y"), (b"cookie", b"b")],
    [*h2f.REQUEST, (b"host", b"a.example"), (b"te", b"trailers")],
    [(b":method", b"HEAD"), *h2f.REQUEST[1:]],
    [(b":method", b"OPTIONS"), *h2f.REQUEST[1:3], (b":path", b"*")],
    [(b":method", b"CONNECT"), (b":authority", b"a:1")],
    [(b":method", b"CONNECT"), *h2f.REQUEST[1:], (b":protocol", b"websocket")],
]
RESPONSES: list[Headers] = [
    [(b":status", b"200")],
    [(b":status", b"200"), (b"content-type", b"text/plain")],
    [(b":status", b"200"), (b"content-length", b"1002")],
    [(b":status", b"204"), (b"content-length", b"2")],
    [(b":status", b"304"), (b"host", b"a")],
    [(b":status", b"100")],
    [(b":status", b"103"), (b"link", b"x")],
    [(b":status", b"404")],
]
TRAILERS: list[Headers] = [
    [(b"grpc-status", b"0")],
    [(b"x", b"y")],
    [],
    [(b"content-length", b"1")],
    [(b":status", b"1")],
]
NAMES = [
    *(
        b"x",
        b"x-y",
        b"host",
        b"cookie",
        b"content-length",
        b"te",
        b"connection",
        b"transfer-encoding",
        b"X",
        b"",
        b"x y",
    ),
    *(b":a", b":status", b":path", b":method", b":scheme", b":authority", b":protocol", b"content-type", b"\xff"),
    *(b"authorization", b"keep-alive", b"upgrade", b"trailer", b"a:b", b"set-cookie", b"etag"),
]
VALUES = [
    *(b"", b"a", b"a.example", b"b", b"0", b"2", b"02", b"-1", b"9" * 19, b"trailers", b"Trailers", b"chunked", b" a"),
    *(b"a\t", b"a\r\nb", b"a\x00", b"\xc3\xa4", b"a b", b"/", b"CONNECT", b"200", b"099", b"websocket", b"v" * 300),
    *(b"*", b"/a#b", b"http", b"1x", b"u@a", b"[::1]:80", b"a:0", b"a:99999", b"\x7f"),
]
DOES = ["head", "head", *["data"] * 5, "end", "end", "trailers", "credit", "credit", "reset", "other", "resume"]
SETTING_VALUES = [0, 1, 2, 100, 4096, 16384, 65535, 70_000, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]
ODD_FRAMES = [
    h2f.frame(Frame.PRIORITY, 0, 3, b"\x00\x00\x00\x01\x10"),
    h2f.frame(77, 255, 7, b"abc"),
    h2f.frame(77, 0, 0),
    h2f.SETTINGS_ACK,
    h2f.ping(b"\x00netprx\x00", ack=True),
    h2f.ping(b"12345678", ack=True),
    h2f.ping(b"abcdefgh", ack=True),
]
BAD_FRAMES = [
    h2f.frame(Frame.PRIORITY, 0, 3, b"\x00\x00\x00\x03\x10"),
    h2f.frame(Frame.PRIORITY, 0, 0, b"\x00\x00\x00\x03\x10"),
    h2f.frame(Frame.PRIORITY, 0, 3, b"\x00"),
    h2f.frame(Frame.PUSH_PROMISE, 4, 1, b"\x00\x00\x00\x02"),
    h2f.frame(Frame.HEADERS, 0x0D, 101, b"\x09abc"),
    h2f.frame(Frame.HEADERS, 0x24, 101, b"abc"),
    h2f.frame(Frame.HEADERS, 4, 101, b"\x80"),
    h2f.frame(Frame.HEADERS, 4, 0, b""),
    h2f.frame(Frame.DATA, 8, 1, b"\x09abc"),
    h2f.frame(Frame.DATA, 0, 0, b""),
    h2f.frame(Frame.SETTINGS, 0, 0, b"abc"),
    h2f.frame(Frame.SETTINGS, 1, 0, b"\x00\x01\x00\x00\x00\x00"),
    h2f.frame(Frame.SETTINGS, 0, 1, b""),
    h2f.settings(*[(77, 1)] * 33),
    h2f.settings((4, 2**31)),
    h2f.settings((8, 0)),
    h2f.continuation(1, b""),
    h2f.headers(101, b"", whole=False) + h2f.ping(),
    h2f.headers(101, b"", whole=False) + h2f.continuation(101, b"", whole=False) * 30,
    h2f.headers(101, b"\x40\x01x\x01y" * 20, whole=False) + h2f.continuation(101, b"\xbe" * 3000),
    h2f.window(0, 0),
    h2f.window(0, 2**31 - 1),
    h2f.goaway(1)[:12],
    h2f.frame(Frame.DATA, 0, 1, b"x" * 16385),
    b"\x00" * 20,
]


class Play:
    """A pair, its peer and its driver, who know what is open and mostly do what is usual."""

    def __init__(self, pair: Pair, rng: random.Random) -> None:
        self.pair = pair
        self.rng = rng
        self.encoder = hpack.Encoder()
        self.now = 1.0
        self.last = -1  # the highest stream
        self.answered: set[int] = set()

    def run(self) -> None:
        rng = self.rng
        actions = [self.open] * 4 + [self.peer] * 8 + [self.driver] * 8
        for _ in range(rng.randint(1, 40)):
            rng.choice(actions)()
            if rng.random() < 0.02:
                rng.choice([self.bad, self.bad, self.goaway, self.eof])()

    def stream(self) -> int:
        return max(1, self.last - 2 * self.rng.choice([0, 0, 0, 1, 2]))

    def fields(self, usual: list[Headers]) -> Headers:
        rng = self.rng
        fields = list(rng.choice(usual))
        if rng.random() < 0.2:
            fields.insert(rng.randint(0, len(fields)), (rng.choice(NAMES), rng.choice(VALUES)))
        if rng.random() < 0.05 and fields:
            del fields[rng.randrange(len(fields))]
        if rng.random() < 0.05:
            fields += [(b"x-%d" % at, b"y" * 100) for at in range(rng.choice([5, 15, 300]))]
        return fields

    def receive(self, octets: bytes) -> None:
        rng = self.rng
        while octets:
            cut = rng.randint(1, 30) if rng.random() < 0.2 else len(octets)
            part, octets = octets[:cut], octets[cut:]
            self.pair.both(lambda engine, part=part: engine.receive(part, self.now), take=rng.random() < 0.9)
        self.now += rng.choice([0, 0, 0.1, 1])

    def head(self, stream_id: int, fields: Headers, *, end: bool) -> None:
        rng = self.rng
        if rng.random() < 0.1:
            self.encoder.header_table_size = rng.choice([0, 100, 4096])
        octets = self.encoder.encode(fields, huffman=rng.random() < 0.5)
        cut = rng.choice([0, 3, len(octets)]) if rng.random() < 0.2 or len(octets) > 16000 else None
        if cut is None:
            self.receive(h2f.headers(stream_id, octets, end=end))
        else:
            octets, rest = octets[:cut], octets[cut:]
            pieces = [rest[at : at + 16000] for at in range(0, len(rest), 16000)] or [b""]
            more = b"".join(h2f.continuation(stream_id, piece, whole=False) for piece in pieces[:-1])
            self.receive(
                h2f.headers(stream_id, octets[:16000], end=end, whole=False)
                + more
                + h2f.continuation(stream_id, pieces[-1])
            )

    def open(self) -> None:
        if self.pair.is_client:
            self.request()
        else:
            self.last += 2
            self.head(self.last, self.fields(REQUESTS), end=self.rng.random() < 0.5)

    def request(self) -> None:
        rng = self.rng
        usual = [
            RequestHead(0, b"GET", b"/", HOST),
            RequestHead(0, b"POST", b"/x", [*HOST, (b"content-length", b"1002")], scheme=b"https"),
            RequestHead(0, b"POST", b"/x", [*HOST, (b"x", b"y"), (b"te", b"trailers")]),
            RequestHead(0, b"HEAD", b"/x", [*HOST, (b"x", b"y"), (b"authorization", b"secret")]),
            RequestHead(0, b"CONNECT", b"a:1", [(b"host", b"a:1")]),
            RequestHead(0, b"CONNECT", b"/", HOST, protocol=b"websocket"),
            RequestHead(0, b"OPTIONS", b"*", [(b"Host", b"a"), (b"X-Y", b"a" * 2000)]),
        ]
        head = rng.choice(usual)
        if rng.random() < 0.2:
            head = head.replace(headers=[*head.headers, (rng.choice(NAMES), rng.choice(VALUES))])
        if rng.random() < 0.05:
            head = head.replace(target=rng.choice(VALUES))
        if rng.random() < 0.05:
            head = head.replace(method=rng.choice(VALUES))
        if rng.random() < 0.05:
            head = head.replace(scheme=rng.choice(VALUES))
        number = self.pair.engines[0].next_stream_id if rng.random() < 0.95 else rng.choice([1, 2, 99])
        self.send(head.replace(stream_id=number))
        self.last = self.pair.engines[0].next_stream_id - 2
        if rng.random() < 0.5:
            self.send(End(self.stream()))

    def peer(self) -> None:
        rng, stream_id = self.rng, self.stream()
        if stream_id > self.last and rng.random() < 0.95:
            return self.open()
        match rng.choice(
            ["data"] * 4 + ["head"] * 3 + ["trailers", "rst", "window", "window", "settings", "ping", "odd"]
        ):
            case "data":
                size = rng.choice([0, 1, 2, 1000, 1002, 16000])
                padding = rng.choice([0, 3, 255]) if rng.random() < 0.2 else None
                self.receive(h2f.data(stream_id, b"x" * size, end=rng.random() < 0.3, padding=padding))
            case "head":
                self.head(stream_id, self.fields(RESPONSES), end=rng.random() < 0.3)
            case "trailers":
                self.head(stream_id, self.fields(TRAILERS), end=rng.random() < 0.9)
            case "rst":
                self.receive(h2f.rst(stream_id, rng.choice([0, 7, 8, 99])))
            case "window" if rng.random() < 0.5:
                self.receive(h2f.window(stream_id, 10**5) + h2f.window(0, 10**5))
            case "window":
                increment = rng.choice(
                    [1, 100, 30_000, 10**6, 0, 2**31 - 1] if rng.random() < 0.3 else [1, 5000, 10**5]
                )
                self.receive(
                    h2f.window(rng.choice([0, stream_id]) if increment < 10**7 and increment else stream_id, increment)
                )
            case "settings":
                entries = [(rng.choice([1, 3, 6, 77]), rng.choice([0, 100, 600, 4096, 70_000]))]
                entries.append((4, rng.choice([0, 1, 20_000, 65535, 200_000])))
                self.receive(h2f.settings(*entries[: rng.randint(0, 2)]))
            case "ping":
                self.receive(h2f.ping())
            case "odd":
                self.receive(rng.choice(ODD_FRAMES))

    def bad(self) -> None:
        if self.rng.random() < 0.5:
            entries = [(self.rng.randint(1, 9), self.rng.choice(SETTING_VALUES))]
            self.receive(h2f.settings(*entries))
        else:
            self.receive(self.rng.choice(BAD_FRAMES))

    def send(self, event: Any) -> None:
        self.pair.both(lambda engine: engine.send(event.stream_id, event), take=self.rng.random() < 0.7)

    def some_fields(self) -> Headers:
        rng = self.rng
        usual = [
            [],
            [(b"content-length", b"1002")],
            [(b"x", b"y"), (b"etag", b"1")],
            [(b"X-Y", b"z"), (b"set-cookie", b"a")],
        ]
        if rng.random() < 0.1:
            return [(rng.choice(NAMES), rng.choice(VALUES))]
        return rng.choice(usual)

    def driver(self) -> None:
        rng, stream_id = self.rng, self.stream()
        if rng.random() < 0.03:
            stream_id = rng.choice([0, 2, 99])
        if not self.pair.is_client and stream_id not in self.answered and rng.random() < 0.9:
            self.answered.add(stream_id)
            self.send(ResponseHead(stream_id, 200, []))
        match rng.choice(DOES):
            case "head" if self.pair.is_client and rng.random() < 0.97:
                self.send(Data(stream_id, b"x" * rng.choice([2, 1000, 1002])))
            case "head":
                if rng.random() < 0.8:
                    status = rng.choice([200, 200, 204, 304, 404, 101, 1000, 100])
                    self.send(ResponseHead(stream_id, status, self.some_fields()))
                else:
                    self.send(Informational(stream_id, rng.choice([100, 103, 101, 200]), self.some_fields()))
            case "data":
                self.send(Data(stream_id, b"y" * rng.choice([0, 2, 1000, 1002, 5000, 16384, 60_000])))
            case "end":
                self.send(End(stream_id))
            case "trailers":
                self.send(Trailers(stream_id, rng.choice(TRAILERS) if rng.random() < 0.5 else [(b"grpc-status", b"0")]))
                self.send(End(stream_id))
            case "credit":
                n = rng.choice([1, 1000, 40_000, 10**6])
                self.pair.both(lambda engine: engine.credit(stream_id, n))
            case "reset":
                code = rng.choice([0, 8])
                self.pair.both(lambda engine: engine.reset(stream_id, "why", code))
            case "other":
                octets = rng.choice([b"12345678", b"abcdefgh", b"1"])
                self.pair.both(lambda engine: engine.ping(octets))
            case "resume":
                if not self.pair.is_client:
                    self.pair.both(lambda engine: engine.resume())

    def goaway(self) -> None:
        if self.rng.random() < 0.5:
            self.pair.both(lambda engine: engine.goaway())
            if self.rng.random() < 0.5:
                self.receive(h2f.ping(b"\x00netprx\x00", ack=True))
        else:
            self.receive(h2f.goaway(self.rng.choice([0, self.stream(), 2**31 - 1]), self.rng.choice([0, 2]), b"why"))

    def eof(self) -> None:
        self.pair.both(lambda engine: engine.receive(b""))


seeds = st.integers(0, 2**64 - 1)
limits = st.sampled_from([None, SMALL])


@settings(max_examples=400)
@given(seeds, limits)
def test_any_frames_and_calls_to_a_server(seed: int, limits: H2Limits | None) -> None:
    play = Play(Pair(SERVERS, limits), random.Random(seed))
    play.receive(h2f.CLIENT_START)
    play.run()


@settings(max_examples=400)
@given(seeds, limits)
def test_any_frames_and_calls_to_a_client(seed: int, limits: H2Limits | None) -> None:
    play = Play(Pair(CLIENTS, limits), random.Random(seed))
    play.receive(h2f.SERVER_START)
    play.run()


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_octets_as_header_blocks(blocks: list[bytes]) -> None:
    pair = Pair(SERVERS, None)
    pair.both(lambda engine: engine.receive(h2f.CLIENT_START))
    for at, block in enumerate(blocks):
        pair.both(lambda engine, at=at, block=block: engine.receive(h2f.headers(2 * at + 1, block, end=True)))


@settings(max_examples=300)
@given(seeds)
def test_header_blocks_with_broken_octets(seed: int) -> None:
    """Blocks as encoders make them, then changed here and there."""
    rng = random.Random(seed)
    encoder = hpack.Encoder()
    pair = Pair(SERVERS, None)
    pair.both(lambda engine: engine.receive(h2f.CLIENT_START))
    for at in range(5):
        fields = [*h2f.REQUEST, *((rng.choice(NAMES), rng.choice(VALUES)) for _ in range(rng.randint(0, 5)))]
        octets = bytearray(encoder.encode(fields, huffman=rng.random() < 0.5))
        if rng.random() < 0.3:
            octets[rng.randrange(len(octets))] = rng.randrange(256)
        if rng.random() < 0.1:
            del octets[rng.randrange(len(octets)) :]
        pair.both(lambda engine, at=at, octets=octets: engine.receive(h2f.headers(2 * at + 1, bytes(octets), end=True)))


@settings(max_examples=200)
@given(st.binary(max_size=40))
def test_any_octets_as_a_start(octets: bytes) -> None:
    for start in (b"", PREFACE, PREFACE + b"\x00\x00\x00\x04\x00"):
        pair = Pair(SERVERS, None)
        pair.both(lambda engine, start=start: engine.receive(start + octets or b"P"))
