"""HTTP/2 connections: how they are used, drained and kept alive; tunnels through them."""

from __future__ import annotations

import pytest

from netproxy.codec import h2
from netproxy.codec.events import (
    Data,
    End,
    GoAway,
    PeerSettings,
    PingAck,
    RequestHead,
    Reset,
    ResponseHead,
    Trailers,
)
from netproxy.codec.h2 import Code, H2Client, H2Limits, H2Server, client_engine, server_engine
from netproxy.codec.h2_strict import DRAIN_PING, MAX_STREAM_ID, Flag, Frame, Setting
from netproxy.errors import LocalProtocolError

from .h2_frames import (
    CLIENT_START,
    POST,
    REQUEST,
    RESPONSE,
    SERVER_START,
    Written,
    block,
    codes,
    data,
    goaway,
    headers,
    number,
    ping,
    rst,
    settings,
    written,
)

HOST = [(b"host", b"a.example")]
CONNECT = [(b":method", b"CONNECT"), (b":authority", b"a:1")]
WEBSOCKET = [(b":method", b"CONNECT"), *REQUEST[1:], (b":protocol", b"websocket"), (b"sec-websocket-version", b"13")]


def server(wire: bytes = b"", limits: H2Limits | None = None) -> H2Server:
    engine = server_engine(limits)
    engine.receive(CLIENT_START + wire)
    engine.take_output()
    return engine


def client(wire: bytes = SERVER_START, limits: H2Limits | None = None) -> H2Client:
    engine = client_engine(limits)
    engine.receive(wire)
    engine.take_output()
    return engine


def ask(
    engine: H2Client, method: bytes = b"GET", target: bytes = b"/", *, end: bool = True, protocol: bytes = b""
) -> int:
    stream_id = engine.next_stream_id
    host = target if method == b"CONNECT" and not protocol else b"a.example"
    engine.send(stream_id, RequestHead(stream_id, method, target, [(b"host", host)], protocol=protocol))
    if end:
        engine.send(stream_id, End(stream_id))
    return stream_id


def last_ids(frames: list[Written]) -> list[int]:
    return [number(f.content) for f in frames if f.kind is Frame.GOAWAY]


# --- the pool's side


def test_how_many_streams_a_client_may_open() -> None:
    engine = client(settings((Setting.MAX_CONCURRENT_STREAMS, 2)))
    assert engine.reusable and engine.free_streams == 2 and engine.next_stream_id == 1
    assert [ask(engine), ask(engine)] == [1, 3]
    assert not engine.reusable and engine.free_streams == 0
    with pytest.raises(LocalProtocolError, match="no more streams"):
        ask(engine)
    assert engine.receive(headers(1, RESPONSE, end=True))[-1] == End(1)
    assert engine.free_streams == 1
    assert engine.receive(settings((Setting.MAX_CONCURRENT_STREAMS, 50))) == [PeerSettings(50, False)]
    assert engine.free_streams == 49
    engine.receive(settings((Setting.MAX_CONCURRENT_STREAMS, 0)))
    assert not engine.reusable
    assert client(settings((Setting.MAX_CONCURRENT_STREAMS, 2**32 - 1))).free_streams == 100
    assert client(limits=H2Limits(max_streams=3)).free_streams == 3


def test_streams_beyond_the_limit_are_refused_and_may_be_sent_again() -> None:
    engine = server(headers(1, POST) + headers(3, POST), H2Limits(max_streams=2))
    events = engine.receive(headers(5, end=True))
    assert [(e.stream_id, e.code, e.ours) for e in events if isinstance(e, Reset)] == [(5, Code.REFUSED_STREAM, True)]
    assert codes(written(engine), Frame.RST_STREAM) == [Code.REFUSED_STREAM]
    engine.receive(rst(1))
    assert isinstance(engine.receive(headers(7, end=True))[0], RequestHead)


def test_resets_by_us_have_codes() -> None:
    engine = client()
    ask(engine)
    engine.reset(1, "too slow", Code.CANCEL)
    ask(engine, end=False)
    engine.reset(3, "broken", Code.INTERNAL_ERROR)
    assert codes(written(engine), Frame.RST_STREAM) == [Code.CANCEL, Code.INTERNAL_ERROR]
    # The answer was on its way: its fields are read, for the table, and nothing more.
    table = block(RESPONSE) + b"\x40\x01x\x01y"
    assert engine.receive(headers(1, table) + data(1, b"late", end=True)) == []
    ask(engine)
    assert engine.receive(headers(5, b"\x88\xbe", end=True)) == [ResponseHead(5, 200, [(b"x", b"y")], b"2"), End(5)]


# --- drain


def test_a_server_drains_in_two_steps() -> None:
    engine = server(headers(1, POST))
    engine.goaway()
    frames = written(engine)
    assert last_ids(frames) == [MAX_STREAM_ID]
    assert frames[-1] == Written(Frame.PING, 0, 0, DRAIN_PING)
    assert engine.is_draining and not engine.must_close and not engine.reusable
    # What was sent before the client saw it is taken.
    assert isinstance(engine.receive(headers(3, end=True))[0], RequestHead)
    assert engine.receive(ping(DRAIN_PING, ack=True)) == []
    assert last_ids(written(engine)) == [3]
    # And what comes later is not: the client sends it elsewhere. Its fields are read for the table all the same.
    assert engine.receive(headers(5, block(POST) + b"\x40\x01x\x01y") + data(5, b"x", end=True) + rst(5)) == []
    assert written(engine) == []
    assert engine.receive(data(1, b"x", end=True)) == [Data(1, b"x"), End(1)]
    for stream_id in (1, 3):
        assert not engine.must_close
        engine.send(stream_id, ResponseHead(stream_id, 200, []))
        engine.send(stream_id, End(stream_id))
    assert engine.must_close
    assert [f.kind for f in written(engine)] == [Frame.HEADERS, Frame.HEADERS]


def test_a_server_whose_patience_is_over() -> None:
    engine = server(headers(1, end=True))
    engine.goaway()
    engine.goaway()
    assert last_ids(written(engine)) == [MAX_STREAM_ID, 1]
    engine.goaway()
    engine.receive(ping(DRAIN_PING, ack=True))
    assert last_ids(written(engine)) == []
    engine.reset(1, "patience", Code.CANCEL)
    assert engine.must_close


def test_a_client_drains() -> None:
    engine = client()
    ask(engine)
    engine.goaway()
    engine.goaway()
    assert last_ids(written(engine)) == [0]
    assert not engine.reusable and not engine.must_close
    engine.receive(headers(1, RESPONSE, end=True))
    assert engine.must_close


def test_a_client_whose_server_drains() -> None:
    engine = client()
    assert [ask(engine), ask(engine), ask(engine)] == [1, 3, 5]
    engine.take_output()
    assert engine.receive(goaway(MAX_STREAM_ID)) == [GoAway(MAX_STREAM_ID, 0, "NO_ERROR b''")]
    assert not engine.reusable and engine.is_draining
    events = engine.receive(goaway(1))
    assert events[1:] == [Reset(n, "the peer goes away", Code.REFUSED_STREAM, untouched=True) for n in (3, 5)]
    assert engine.receive(headers(1, RESPONSE) + data(1, b"x"))[-1] == Data(1, b"x")
    assert not engine.must_close
    assert engine.receive(data(1, end=True)) == [End(1)]
    assert engine.must_close


def test_a_server_whose_client_leaves() -> None:
    engine = server(headers(1, end=True))
    engine.receive(goaway(0))
    assert not engine.must_close
    engine.send(1, ResponseHead(1, 200, []))
    engine.send(1, End(1))
    assert engine.must_close


# --- keepalive


def test_pings() -> None:
    engine = client()
    engine.ping(b"keep-ali")
    assert written(engine) == [Written(Frame.PING, 0, 0, b"keep-ali")]
    assert engine.receive(ping(b"other---", ack=True)) == []
    assert engine.receive(ping(b"keep-ali", ack=True)) == [PingAck(b"keep-ali")]
    assert engine.receive(ping(b"keep-ali", ack=True)) == []
    for wrong in (b"short", DRAIN_PING):
        with pytest.raises(LocalProtocolError):
            engine.ping(wrong)
    for _ in range(8):
        engine.ping(b"keep-ali")
    with pytest.raises(LocalProtocolError, match="without answer"):
        engine.ping(b"keep-ali")


def test_pings_are_answered() -> None:
    engine = server()
    engine.receive(ping(b"\x00\x01\x02\x03\x04\x05\x06\x07"))
    assert written(engine) == [Written(Frame.PING, Flag.ACK, 0, b"\x00\x01\x02\x03\x04\x05\x06\x07")]


def test_the_peers_table_size_is_kept_to() -> None:
    engine = server(headers(1, end=True) + headers(3, end=True) + headers(5, end=True))
    fields = [(b"server", b"x" * 100)]
    sizes = []
    for stream_id in (1, 3, 5):
        if stream_id == 5:
            engine.receive(settings((Setting.HEADER_TABLE_SIZE, 0)))
            engine.receive(settings((Setting.HEADER_TABLE_SIZE, 2**32 - 1)))
            engine.take_output()
        engine.send(stream_id, ResponseHead(stream_id, 200, fields))
        sizes.append(sum(map(len, engine.take_output())))
    # The table was emptied in between, and that is told at the start of the next block.
    assert sizes[1] < 20 and sizes[2] >= sizes[0]


# --- tunnels


@pytest.mark.parametrize("fields", [CONNECT, WEBSOCKET], ids=["connect", "extended"])
def test_a_tunnel_through_a_server(fields: list[tuple[bytes, bytes]]) -> None:
    engine = server()
    events = engine.receive(headers(1, fields) + data(1, b"early"))
    assert [type(event) for event in events] == [RequestHead, End]
    assert engine.resume() == []
    engine.send(1, ResponseHead(1, 200, [(b"content-length", b"0")]))
    assert engine.resume() == [Data(1, b"early")]
    assert engine.receive(data(1, b"more")) == [Data(1, b"more")]
    engine.send(1, Data(1, b"down"))
    assert engine.receive(data(1, end=True)) == [End(1)]
    assert engine.open_streams == 1
    engine.send(1, Data(1, b"!"))
    engine.send(1, End(1))
    assert engine.open_streams == 0
    assert written(engine) == [
        Written(Frame.HEADERS, 0, 1, [(b":status", b"200")]),
        Written(Frame.DATA, 0, 1, b"down"),
        Written(Frame.DATA, Flag.END_STREAM, 1, b"!"),
    ]


def test_our_half_of_a_servers_tunnel_may_end_first() -> None:
    engine = server(headers(1, CONNECT))
    engine.send(1, ResponseHead(1, 200, []))
    engine.send(1, End(1))
    assert [f.kind for f in written(engine)] == [Frame.HEADERS]
    assert engine.receive(data(1, b"x", end=True)) == [Data(1, b"x"), End(1)]
    assert engine.open_streams == 0


@pytest.mark.parametrize("ended", [False, True])
def test_a_tunnel_that_a_server_refuses(ended: bool) -> None:
    engine = server(headers(1, CONNECT) + data(1, b"early", end=ended))
    engine.send(1, ResponseHead(1, 403, []))
    engine.send(1, Data(1, b"no"))
    engine.send(1, End(1))
    frames = written(engine)
    assert [f.kind for f in frames] == [Frame.HEADERS, Frame.DATA] + ([] if ended else [Frame.RST_STREAM])
    assert engine.resume() == [] and engine.open_streams == 0 and engine.statistics()["owed"] == 0


def test_trailers_in_a_tunnel() -> None:
    engine = server(headers(1, CONNECT))
    with pytest.raises(LocalProtocolError):
        engine.send(1, Trailers(1, [(b"x", b"y")]))
    engine.send(1, ResponseHead(1, 200, []))
    with pytest.raises(LocalProtocolError):
        engine.send(1, Trailers(1, [(b"x", b"y")]))
    events = engine.receive(headers(1, [(b"x", b"y")], end=True))
    assert isinstance(events[0], Reset) and events[0].ours


@pytest.mark.parametrize("protocol", [b"", b"websocket"])
def test_a_tunnel_through_a_client(protocol: bytes) -> None:
    engine = client()
    assert engine.connect_protocol
    ask(engine, b"CONNECT", b"/" if protocol else b"a:1", protocol=protocol)
    frames = written(engine)
    assert [(f.kind, f.flags) for f in frames] == [(Frame.HEADERS, 0)]
    names = [name for name, _ in frames[0].content]
    assert names == (
        [b":method", b":scheme", b":authority", b":path", b":protocol"] if protocol else [b":method", b":authority"]
    )
    with pytest.raises(LocalProtocolError, match="before the tunnel"):
        engine.send(1, Data(1, b"early"))
    assert engine.receive(headers(1, RESPONSE) + data(1, b"down")) == [ResponseHead(1, 200, [], b"2"), Data(1, b"down")]
    engine.send(1, Data(1, b"up"))
    engine.send(1, End(1))
    assert written(engine) == [Written(Frame.DATA, Flag.END_STREAM, 1, b"up")]
    assert engine.receive(data(1, end=True)) == [End(1)] and engine.open_streams == 0


@pytest.mark.parametrize("end_first", [False, True])
def test_a_tunnel_that_is_refused_to_a_client(end_first: bool) -> None:
    engine = client()
    ask(engine, b"CONNECT", b"a:1", end=end_first)
    engine.take_output()
    engine.receive(headers(1, [(b":status", b"403")]))
    if not end_first:
        engine.send(1, End(1))
    assert [(f.kind, f.flags) for f in written(engine)] == [(Frame.DATA, Flag.END_STREAM)]
    assert engine.receive(data(1, b"no", end=True)) == [Data(1, b"no"), End(1)]
    assert engine.open_streams == 0


def test_extended_connect_needs_the_servers_word() -> None:
    engine = client(settings())
    assert not engine.connect_protocol
    with pytest.raises(LocalProtocolError, match="extended CONNECT"):
        ask(engine, b"CONNECT", b"/", protocol=b"websocket")
    server_without = server(limits=H2Limits(connect_protocol=False))
    events = server_without.receive(headers(1, WEBSOCKET))
    assert isinstance(events[0], Reset) and "8441" in events[0].detail


def test_a_websocket_from_http_2_to_http_1_and_back() -> None:
    engine = server()
    head = engine.receive(headers(1, WEBSOCKET))[0]
    assert isinstance(head, RequestHead)
    as_upgrade = h2.websocket_from_connect(head, bytes(range(16)))
    assert (as_upgrade.method, as_upgrade.target, as_upgrade.http_version) == (b"GET", b"/", b"1.1")
    assert as_upgrade.headers == [
        *HOST,
        (b"sec-websocket-version", b"13"),
        (b"connection", b"upgrade"),
        (b"upgrade", b"websocket"),
        (b"sec-websocket-key", b"AAECAwQFBgcICQoLDA0ODw=="),
    ]
    switched = [(b"connection", b"upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-accept", b"x"), (b"a", b"b")]
    assert h2.connect_answer_from_websocket(ResponseHead(1, 101, switched)) == ResponseHead(
        1, 200, [(b"a", b"b")], b"2"
    )


def test_a_websocket_from_http_1_to_http_2_and_back() -> None:
    # The example of RFC 6455 section 1.3.
    key = (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ==")
    asked = RequestHead(1, b"GET", b"/", [*HOST, (b"connection", b"upgrade"), (b"upgrade", b"websocket"), key])
    head = h2.connect_from_websocket(asked, b"websocket")
    assert head == RequestHead(1, b"CONNECT", b"/", HOST, b"2", protocol=b"websocket")
    answer = h2.websocket_answer_from_connect(ResponseHead(1, 200, [], b"2"), asked, b"websocket")
    assert answer.status == 101
    assert answer.headers[-1] == (b"sec-websocket-accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")


def test_engines() -> None:
    with pytest.raises(ValueError, match="no HTTP/2 engine"):
        h2.use("other")
    assert h2.chosen("auto") == h2.ENGINES[0] and h2.chosen("reference") == "reference"
    with pytest.raises(ValueError, match="stream_window"):
        H2Limits(stream_window=1000)
