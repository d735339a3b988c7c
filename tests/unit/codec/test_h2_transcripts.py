"""HTTP/2 exchanges frame by frame: what is received, whole and cut up, and what is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netproxy.codec.events import (
    Data,
    End,
    Event,
    GoAway,
    Headers,
    Informational,
    PeerSettings,
    RequestHead,
    RequestRefused,
    Reset,
    ResponseHead,
    Trailers,
)
from netproxy.codec.h2 import PREFACE, Code, H2Client, H2Limits, H2Server, client_engine, server_engine
from netproxy.codec.h2_strict import Flag, Frame, Rule, Setting
from netproxy.errors import LocalProtocolError

from .h2_frames import (
    CLIENT_START,
    POST,
    REQUEST,
    RESPONSE,
    SERVER_START,
    Outcome,
    Reader,
    Written,
    block,
    codes,
    continuation,
    data,
    frame,
    goaway,
    headers,
    merged,
    ping,
    play,
    rst,
    settings,
    window,
    written,
)
from .playing import cuts_in_two, octets

HOST = (b"host", b"a.example")
STARTED = PeerSettings(100, False)


def head(
    stream_id: int = 1, method: bytes = b"GET", target: bytes = b"/", fields: Headers | None = None
) -> RequestHead:
    return RequestHead(stream_id, method, target, [HOST, *(fields or [])], b"2", None, b"http")


def asked(*requests: RequestHead) -> H2Client:
    """A client that has sent these requests, without their ends."""
    engine = client_engine()
    play(engine, [SERVER_START])
    for request in requests or (head(),):
        engine.send(request.stream_id, request)
    engine.take_output()
    return engine


def served(*fields: Headers, end: bool = True) -> H2Server:
    """A server that has received these requests."""
    engine = server_engine()
    play(engine, [CLIENT_START, *(headers(2 * at + 1, one, end=end) for at, one in enumerate(fields or (REQUEST,)))])
    engine.take_output()
    return engine


# --- received: whole, in two, octet by octet, with more behind

TO_SERVERS: dict[str, tuple[bytes, list[Event]]] = {
    "get": (headers(1, end=True), [head(), End(1)]),
    "huffman": (headers(1, block([*REQUEST, (b"x", b"some value")], huffman=True), end=True),
                [head(fields=[(b"x", b"some value")]), End(1)]),
    "post": (headers(1, POST) + data(1, b"he") + data(1, b"llo", end=True),
             [head(method=b"POST"), Data(1, b"hello"), End(1)]),
    "end apart": (headers(1, POST) + data(1, b"hi") + data(1, end=True),
                  [head(method=b"POST"), Data(1, b"hi"), End(1)]),
    "padded": (headers(1, POST) + data(1, b"hi", padding=5) + data(1, b"", padding=0) + data(1, end=True, padding=255),
               [head(method=b"POST"), Data(1, b"hi"), End(1)]),
    "padded and prioritised head": (
        frame(Frame.HEADERS, Flag.END_STREAM | Flag.END_HEADERS | Flag.PADDED | Flag.PRIORITY, 1,
              b"\x03" + b"\x00\x00\x00\x03\x10" + block(REQUEST) + bytes(3)),
        [head(), End(1)]),
    "content-length": (headers(1, [*POST, (b"content-length", b"2")]) + data(1, b"h") + data(1, b"i", end=True),
                       [head(method=b"POST", fields=[(b"content-length", b"2")]), Data(1, b"hi"), End(1)]),
    "no content by length": (headers(1, [*POST, (b"content-length", b"0")], end=True),
                             [head(method=b"POST", fields=[(b"content-length", b"0")]), End(1)]),
    "trailers": (headers(1, POST) + data(1, b"hi") + headers(1, [(b"x", b"y")], end=True),
                 [head(method=b"POST"), Data(1, b"hi"), Trailers(1, [(b"x", b"y")]), End(1)]),
    "no trailers in trailers": (headers(1, POST) + headers(1, [], end=True), [head(method=b"POST"), End(1)]),
    "continuations": (
        headers(1, block(REQUEST)[:5], end=True, whole=False) + continuation(1, block(REQUEST)[5:], whole=False)
        + continuation(1, b""),
        [head(), End(1)]),
    "cookies": (
        headers(1, [*REQUEST, (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2"), (b"cookie", b"c=3")], end=True),
                [head(fields=[(b"cookie", b"a=1; b=2; c=3"), (b"x", b"y")]), End(1)]),
    "empty cookies": (
        headers(1, [*REQUEST, *((b"cookie", crumb) for crumb in (b"", b"a=1", b"", b"b=2", b""))], end=True),
        [head(fields=[(b"cookie", b"a=1; b=2")]), End(1)]),
    "host as authority": (headers(1, [*REQUEST[:2], REQUEST[3], (b"x", b"y"), HOST], end=True),
                          [head(fields=[(b"x", b"y")]), End(1)]),
    "host and authority": (headers(1, [*REQUEST, HOST], end=True), [head(), End(1)]),
    "te": (headers(1, [*REQUEST, (b"te", b"trailers")], end=True), [head(fields=[(b"te", b"trailers")]), End(1)]),
    "options": (headers(1, [(b":method", b"OPTIONS"), *REQUEST[1:3], (b":path", b"*")], end=True),
                [head(1, b"OPTIONS", b"*"), End(1)]),
    "connect": (headers(1, [(b":method", b"CONNECT"), (b":authority", b"a:1")]) + data(1, b"early"),
                [RequestHead(1, b"CONNECT", b"a:1", [(b"host", b"a:1")], b"2"), End(1)]),
    "extended connect": (headers(1, [(b":method", b"CONNECT"), *REQUEST[1:], (b":protocol", b"websocket")]),
                         [RequestHead(1, b"CONNECT", b"/", [HOST], b"2", None, b"http", b"websocket"), End(1)]),
    "two at once": (headers(1, POST) + headers(3, end=True) + data(1, b"hi", end=True),
                    [head(method=b"POST"), head(3), End(3), Data(1, b"hi"), End(1)]),
    "numbers left out": (headers(5, end=True), [head(5), End(5)]),
    "reset": (headers(1, POST) + rst(1), [head(method=b"POST"), Reset(1, "the peer reset the stream: CANCEL", 8)]),
    "unknown and deprecated frames": (
        frame(99, 255, 7, b"abc") + frame(Frame.PRIORITY, 0, 5, b"\x00\x00\x00\x01\x10") + headers(1, end=True),
        [head(), End(1)]),
    "settings and pings": (settings((Setting.MAX_CONCURRENT_STREAMS, 5), (99, 1)) + ping() + headers(1, end=True),
                           [PeerSettings(5, False), head(), End(1)]),
    "goaway": (goaway(0, 2, b"why"), [GoAway(0, 2, "INTERNAL_ERROR b'why'")]),
    "reserved bit of a window": (frame(Frame.WINDOW_UPDATE, 0, 0, b"\x80\x00\x00\x07") + headers(1, end=True),
                                 [head(), End(1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TO_SERVERS)
def test_what_a_server_receives(name: str) -> None:
    wire, expected = TO_SERVERS[name]
    whole = CLIENT_START + wire
    for parts in ([whole], octets(whole), *cuts_in_two(wire)):
        if parts[0][:3] != b"PRI" and parts[0] != b"P":
            parts = [CLIENT_START, *parts]
        assert play(server_engine(), parts) == Outcome([STARTED, *expected])
    more = play(server_engine(), [whole + headers(7, POST) + b"\x00\x00"])
    assert more == Outcome([STARTED, *expected, head(7, b"POST")])


def test_a_list_that_is_too_large() -> None:
    wire = headers(1, block(REQUEST) + block([(b"x", b"y")]) * 300, end=True) + headers(3, end=True)
    assert play(server_engine(), [CLIENT_START + wire]).events[1:] == [
        RequestRefused(1, 431, Rule.LIST_SIZE.detail), head(3), End(3),
    ]  # fmt: skip


TO_CLIENTS: dict[str, tuple[bytes, list[Event]]] = {
    "head only": (headers(1, RESPONSE, end=True), [ResponseHead(1, 200, [], b"2"), End(1)]),
    "content": (headers(1, [*RESPONSE, (b"content-length", b"2")]) + data(1, b"hi", end=True),
                [ResponseHead(1, 200, [(b"content-length", b"2")], b"2"), Data(1, b"hi"), End(1)]),
    "informational": (headers(1, [(b":status", b"103"), (b"link", b"x")]) + headers(1, RESPONSE, end=True),
                      [Informational(1, 103, [(b"link", b"x")]), ResponseHead(1, 200, [], b"2"), End(1)]),
    "trailers": (headers(1, RESPONSE) + data(1, b"hi") + headers(1, [(b"grpc-status", b"0")], end=True),
                 [ResponseHead(1, 200, [], b"2"), Data(1, b"hi"), Trailers(1, [(b"grpc-status", b"0")]), End(1)]),
    "304": (headers(1, [(b":status", b"304"), (b"content-length", b"9")], end=True),
            [ResponseHead(1, 304, [(b"content-length", b"9")], b"2"), End(1)]),
    "refused": (rst(1, Code.REFUSED_STREAM),
                [Reset(1, "the peer reset the stream: REFUSED_STREAM", 7, untouched=True)]),
    "refused too late": (headers(1, RESPONSE) + rst(1, Code.REFUSED_STREAM),
                         [ResponseHead(1, 200, [], b"2"), Reset(1, "the peer reset the stream: REFUSED_STREAM", 7)]),
    "rest not wanted": (headers(1, RESPONSE, end=True) + rst(1, Code.NO_ERROR),
                        [ResponseHead(1, 200, [], b"2"), End(1), Reset(1, "the peer reset the stream: NO_ERROR", 0)]),
    "goaway": (goaway(0), [GoAway(0, 0, "NO_ERROR b''"), Reset(1, "the peer goes away", 7, untouched=True)]),
    "goaway behind it": (goaway(1) + headers(1, RESPONSE, end=True),
                         [GoAway(1, 0, "NO_ERROR b''"), ResponseHead(1, 200, [], b"2"), End(1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TO_CLIENTS)
def test_what_a_client_receives(name: str) -> None:
    wire, expected = TO_CLIENTS[name]
    for parts in ([wire], octets(wire), *cuts_in_two(wire), [wire + b"\x00\x00"]):
        assert play(asked(head(method=b"POST")), parts) == Outcome(expected)
    more = play(asked(head(method=b"POST")), [wire + ping() + b"\x00\x00"])
    assert more == Outcome(expected)


def test_the_end_of_the_stream() -> None:
    engine = asked(head(1), head(3))
    engine.receive(headers(1, RESPONSE, end=True))
    events = engine.receive(b"")
    assert [type(event).__name__ for event in events] == ["Reset", "Reset", "ConnectionClosed"]
    assert engine.must_close and not engine.reusable and engine.receive(b"x") == []


# --- refused

REFUSED_HEADS: dict[str, tuple[Headers, Rule]] = {
    "upper case": ([*REQUEST, (b"X", b"y")], Rule.FIELD_NAME),
    "empty name": ([*REQUEST, (b"", b"y")], Rule.FIELD_NAME),
    "blank in a name": ([*REQUEST, (b"x y", b"")], Rule.FIELD_NAME),
    "colon in a name": ([*REQUEST, (b"x:y", b"")], Rule.FIELD_NAME),
    "CR LF": ([*REQUEST, (b"x", b"a\r\nb: c")], Rule.FIELD_VALUE),
    "NUL": ([*REQUEST, (b"x", b"a\x00")], Rule.FIELD_VALUE),
    "leading blank": ([*REQUEST, (b"x", b" a")], Rule.FIELD_VALUE),
    "trailing tab": ([*REQUEST, (b"x", b"a\t")], Rule.FIELD_VALUE),
    "control in a pseudo-field": ([(b":method", b"GET\x00"), *REQUEST[1:]], Rule.FIELD_VALUE),
    "connection": ([*REQUEST, (b"connection", b"close")], Rule.CONNECTION_FIELD),
    "keep-alive": ([*REQUEST, (b"keep-alive", b"1")], Rule.CONNECTION_FIELD),
    "proxy-connection": ([*REQUEST, (b"proxy-connection", b"close")], Rule.CONNECTION_FIELD),
    "transfer-encoding": ([*REQUEST, (b"transfer-encoding", b"chunked")], Rule.CONNECTION_FIELD),
    "upgrade": ([*REQUEST, (b"upgrade", b"x")], Rule.CONNECTION_FIELD),
    "te": ([*REQUEST, (b"te", b"gzip")], Rule.TE),
    "unknown pseudo-field": ([*REQUEST, (b":x", b"y")], Rule.PSEUDO),
    "status in a request": ([*REQUEST, (b":status", b"200")], Rule.PSEUDO),
    "pseudo-field twice": ([*REQUEST, (b":path", b"/")], Rule.PSEUDO),
    "pseudo-field behind a field": ([*REQUEST[:3], (b"x", b"y"), REQUEST[3]], Rule.PSEUDO),
    "no method": (REQUEST[1:], Rule.PSEUDO_MISSING),
    "no scheme": ([REQUEST[0], *REQUEST[2:]], Rule.PSEUDO_MISSING),
    "no path": (REQUEST[:3], Rule.PSEUDO_MISSING),
    "no authority": ([*REQUEST[:2], REQUEST[3]], Rule.AUTHORITY),
    "host differs": ([*REQUEST, (b"host", b"b.example")], Rule.AUTHORITY),
    "host twice": ([*REQUEST, HOST, HOST], Rule.AUTHORITY),
    "userinfo": ([*REQUEST[:2], (b":authority", b"u@a"), REQUEST[3]], Rule.AUTHORITY),
    "empty authority": ([*REQUEST[:2], (b":authority", b""), REQUEST[3]], Rule.AUTHORITY),
    "method": ([(b":method", b"G T"), *REQUEST[1:]], Rule.METHOD),
    "scheme": ([REQUEST[0], (b":scheme", b"1"), *REQUEST[2:]], Rule.SCHEME),
    "empty path": ([*REQUEST[:3], (b":path", b"")], Rule.PATH),
    "path without slash": ([*REQUEST[:3], (b":path", b"x")], Rule.PATH),
    "fragment": ([*REQUEST[:3], (b":path", b"/#a")], Rule.PATH),
    "absolute form": ([*REQUEST[:3], (b":path", b"http://a.example/")], Rule.PATH),
    "blank in the path": ([*REQUEST[:3], (b":path", b"/a b")], Rule.PATH),
    "octets in the path": ([*REQUEST[:3], (b":path", b"/\xc3\xa4")], Rule.PATH),
    "asterisk": ([*REQUEST[:3], (b":path", b"*")], Rule.PATH),
    "connect without port": ([(b":method", b"CONNECT"), (b":authority", b"a")], Rule.CONNECT),
    "connect with path": ([(b":method", b"CONNECT"), *REQUEST[1:]], Rule.PSEUDO_MISSING),
    "connect with content": (
        [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"content-length", b"1")],
        Rule.CONNECT,
    ),
    "protocol without connect": ([*REQUEST, (b":protocol", b"websocket")], Rule.PROTOCOL),
    "content-length": ([*REQUEST, (b"content-length", b"+1")], Rule.CONTENT_LENGTH),
    "content-length twice": ([*REQUEST, (b"content-length", b"0"), (b"content-length", b"0")], Rule.CONTENT_LENGTH),
    "content missing": ([*REQUEST, (b"content-length", b"1")], Rule.CONTENT),
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_a_request_that_breaks_a_rule_leaves_the_others_alone(name: str) -> None:
    fields, rule = REFUSED_HEADS[name]
    engine = server_engine()
    wire = CLIENT_START + headers(1, POST) + headers(3, fields, end=True) + data(1, b"hi", end=True)
    expected = [STARTED, head(method=b"POST"), Reset(3, rule.detail, rule.code, ours=True), Data(1, b"hi"), End(1)]
    assert play(engine, [wire]) == Outcome(expected)
    assert codes(written(engine), Frame.RST_STREAM) == [rule.code]
    behind = Outcome([*expected, head(5), End(5)])
    assert play(server_engine(), [wire + headers(5, end=True) + b"\x00"]) == behind
    for parts in (octets(wire), *cuts_in_two(wire)):
        assert play(server_engine(), parts) == Outcome(expected)


REFUSED_RESPONSES: dict[str, tuple[bytes, Rule]] = {
    "no status": (headers(1, [(b"x", b"y")]), Rule.PSEUDO_MISSING),
    "status": (headers(1, [(b":status", b"20")]), Rule.STATUS),
    "status below 100": (headers(1, [(b":status", b"099")]), Rule.STATUS),
    "request fields": (headers(1, [*RESPONSE, (b":path", b"/")]), Rule.PSEUDO),
    "101": (headers(1, [(b":status", b"101")]), Rule.INFORMATIONAL),
    "100 as the end": (headers(1, [(b":status", b"100")], end=True), Rule.INFORMATIONAL),
    "content first": (data(1, b"hi"), Rule.NO_HEAD),
    "too little": (headers(1, [*RESPONSE, (b"content-length", b"3")]) + data(1, b"hi", end=True), Rule.CONTENT),
    "too much": (headers(1, [*RESPONSE, (b"content-length", b"1")]) + data(1, b"hi"), Rule.CONTENT),
    "too little before trailers": (
        headers(1, [*RESPONSE, (b"content-length", b"3")]) + headers(1, [(b"x", b"y")], end=True), Rule.CONTENT),
    "content of 204": (headers(1, [(b":status", b"204")]) + data(1, b"hi"), Rule.CONTENT),
    "second head": (headers(1, RESPONSE) + headers(1, RESPONSE), Rule.TRAILERS_NOT_LAST),
    "head as trailers": (headers(1, RESPONSE) + headers(1, RESPONSE, end=True), Rule.PSEUDO),
    "trailer field": (headers(1, RESPONSE) + headers(1, [(b"content-length", b"0")], end=True), Rule.TRAILER_FIELD),
    "content behind the end": (headers(1, RESPONSE, end=True) + data(1, b"x"), Rule.STREAM_CLOSED),
    "head behind the end": (headers(1, RESPONSE, end=True) + headers(1, RESPONSE, end=True), Rule.STREAM_CLOSED),
    "window of nothing": (window(1, 0), Rule.WINDOW_ZERO),
    "window above all": (window(1, 2**31 - 1), Rule.WINDOW_OVERFLOW),
    "list too large": (headers(1, block(RESPONSE) + block([(b"x", b"y")]) * 300), Rule.LIST_SIZE),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_RESPONSES)
def test_an_answer_that_breaks_a_rule_leaves_the_others_alone(name: str) -> None:
    wire, rule = REFUSED_RESPONSES[name]
    for parts in ([wire], octets(wire), *cuts_in_two(wire)):
        engine = asked(head(1, b"POST"), head(3))
        assert play(engine, parts).events[-1] == Reset(1, rule.detail, rule.code, ours=True)
        assert codes(written(engine), Frame.RST_STREAM) == [rule.code]
        assert play(engine, [headers(3, RESPONSE)]) == Outcome([ResponseHead(3, 200, [], b"2")])
        # What is still on its way is ignored.
        assert play(engine, [data(1, b"late"), rst(1)]) == Outcome([])
        assert written(engine) == []
    behind = play(asked(head(1, b"POST"), head(3)), [wire + headers(3, RESPONSE) + b"\x00"])
    assert behind.events[-2:] == [Reset(1, rule.detail, rule.code, ours=True), ResponseHead(3, 200, [], b"2")]


def test_content_of_an_answer_to_head() -> None:
    engine = asked(head(method=b"HEAD"))
    wire = headers(1, [*RESPONSE, (b"content-length", b"9")])
    assert play(engine, [wire, data(1, end=True)]).events[-1] == End(1)
    engine = asked(head(method=b"HEAD"))
    assert play(engine, [wire, data(1, b"x")]).events[-1] == Reset(1, Rule.NO_CONTENT.detail, 1, ours=True)


BROKEN: dict[str, tuple[bytes, Rule]] = {
    "no preface": (b"GET / HTTP/1.1\r\n\r\n", Rule.PREFACE),
    "no settings": (PREFACE + ping(), Rule.NO_SETTINGS),
    "acknowledgement first": (PREFACE + frame(Frame.SETTINGS, Flag.ACK), Rule.NO_SETTINGS),
    "frame too large": (CLIENT_START + frame(Frame.DATA, 0, 1, bytes(16385)), Rule.FRAME_SIZE),
    "settings of a stream": (CLIENT_START + frame(Frame.SETTINGS, 0, 1), Rule.STREAM_ZERO),
    "settings in part": (CLIENT_START + frame(Frame.SETTINGS, 0, 0, b"abc"), Rule.FRAME_SIZE),
    "acknowledgement with settings": (CLIENT_START + frame(Frame.SETTINGS, 1, 0, bytes(6)), Rule.FRAME_SIZE),
    "many settings": (CLIENT_START + settings(*[(99, 0)] * 33), Rule.SETTING_COUNT),
    "push": (CLIENT_START + settings((Setting.ENABLE_PUSH, 2)), Rule.SETTING),
    "initial window": (CLIENT_START + settings((Setting.INITIAL_WINDOW_SIZE, 2**31)), Rule.SETTING_WINDOW),
    "frame size": (CLIENT_START + settings((Setting.MAX_FRAME_SIZE, 16383)), Rule.SETTING),
    "connect protocol": (CLIENT_START + settings((Setting.ENABLE_CONNECT_PROTOCOL, 2)), Rule.SETTING),
    "ping of a stream": (CLIENT_START + frame(Frame.PING, 0, 1, bytes(8)), Rule.STREAM_ZERO),
    "ping in part": (CLIENT_START + frame(Frame.PING, 0, 0, bytes(7)), Rule.FRAME_SIZE),
    "goaway in part": (CLIENT_START + frame(Frame.GOAWAY, 0, 0, bytes(7)), Rule.FRAME_SIZE),
    "goaway of a stream": (CLIENT_START + frame(Frame.GOAWAY, 0, 1, bytes(8)), Rule.STREAM_ZERO),
    "data of stream 0": (CLIENT_START + data(0, b"x"), Rule.STREAM_ZERO),
    "data of an idle stream": (CLIENT_START + data(1, b"x"), Rule.IDLE),
    "data of our streams": (CLIENT_START + data(2, b"x"), Rule.IDLE),
    "padding": (CLIENT_START + headers(1, POST) + frame(Frame.DATA, Flag.PADDED, 1, b"\x03ab"), Rule.PADDING),
    "padding of nothing": (CLIENT_START + headers(1, POST) + frame(Frame.DATA, Flag.PADDED, 1, b""), Rule.PADDING),
    "padding of a head": (CLIENT_START + frame(Frame.HEADERS, Flag.PADDED | 4, 1, b"\x03ab"), Rule.PADDING),
    "head of stream 0": (CLIENT_START + headers(0), Rule.STREAM_ZERO),
    "head of our streams": (CLIENT_START + headers(2), Rule.STREAM_ID),
    "priority cut off": (CLIENT_START + frame(Frame.HEADERS, Flag.PRIORITY | 4, 1, b"\x00\x00"), Rule.FRAME_SIZE),
    "priority of itself": (CLIENT_START + frame(Frame.PRIORITY, 0, 1, b"\x00\x00\x00\x01\x10"), Rule.DEPENDS_ON_ITSELF),
    "head that depends on itself": (
        CLIENT_START + frame(Frame.HEADERS, Flag.PRIORITY | 4, 1, b"\x80\x00\x00\x01\x10"), Rule.DEPENDS_ON_ITSELF),
    "priority in part": (CLIENT_START + frame(Frame.PRIORITY, 0, 1, b"\x00\x00\x00\x03"), Rule.FRAME_SIZE),
    "reset of an idle stream": (CLIENT_START + rst(1), Rule.IDLE),
    "reset in part": (CLIENT_START + headers(1) + frame(Frame.RST_STREAM, 0, 1, b"\x00"), Rule.FRAME_SIZE),
    "reset of stream 0": (CLIENT_START + rst(0), Rule.STREAM_ZERO),
    "push promise": (CLIENT_START + headers(1) + frame(Frame.PUSH_PROMISE, 4, 1, b"\x00\x00\x00\x02"), Rule.PUSH),
    "window of an idle stream": (CLIENT_START + window(1, 1), Rule.IDLE),
    "window of nothing": (CLIENT_START + window(0, 0), Rule.WINDOW_ZERO),
    "window above all": (CLIENT_START + window(0, 2**31 - 1), Rule.WINDOW_OVERFLOW),
    "windows above all by settings": (
        CLIENT_START + headers(1) + window(1, 2**31 - 1 - 65535) + settings((Setting.INITIAL_WINDOW_SIZE, 65536)),
        Rule.SETTING_WINDOW),
    "window in part": (CLIENT_START + frame(Frame.WINDOW_UPDATE, 0, 0, b"\x00"), Rule.FRAME_SIZE),
    "naked continuation": (CLIENT_START + continuation(1, b""), Rule.INTERLEAVED),
    "interrupted block": (CLIENT_START + headers(1, b"", whole=False) + ping(), Rule.INTERLEAVED),
    "continued by another": (CLIENT_START + headers(1, b"", whole=False) + continuation(3, b""), Rule.INTERLEAVED),
    "unknown index": (CLIENT_START + headers(1, b"\xbe"), Rule.HPACK),
    "index 0": (CLIENT_START + headers(1, b"\x80"), Rule.HPACK),
    "cut off": (CLIENT_START + headers(1, b"\x40\x05abc"), Rule.HPACK),
    "integer too long": (CLIENT_START + headers(1, b"\xff\xff\xff\xff\xff\xff\xff\x00"), Rule.HPACK),
    "huffman padding": (CLIENT_START + headers(1, b"\x40\x82\xff\xff\x00"), Rule.HPACK),
    "table too large": (CLIENT_START + headers(1, b"\x3f\xe2\x1f" + block(REQUEST)), Rule.HPACK),
    "table size behind a field": (CLIENT_START + headers(1, b"\x82\x20"), Rule.HPACK),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_ends_the_connection(name: str) -> None:
    wire, rule = BROKEN[name]
    for parts in ([wire], octets(wire), *cuts_in_two(wire), [wire + headers(9, end=True)]):
        engine = server_engine()
        assert play(engine, parts).detail == rule.detail
        frames = written(engine)
        assert frames[-1].kind is Frame.GOAWAY and codes(frames, Frame.GOAWAY) == [rule.code]
        assert engine.must_close and engine.open_streams == 0
        assert engine.receive(wire) == [] and engine.take_output() == []
        with pytest.raises(LocalProtocolError):
            engine.send(1, End(1))


BROKEN_ANSWERS: dict[str, tuple[bytes, Rule]] = {
    "push": (settings((Setting.ENABLE_PUSH, 1)), Rule.SETTING),
    "connect protocol taken back": (settings((Setting.ENABLE_CONNECT_PROTOCOL, 0)), Rule.SETTING),
    "answer to nothing": (headers(3, RESPONSE), Rule.IDLE),
    "pushed answer": (headers(2, RESPONSE), Rule.STREAM_ID),
    "content of nothing": (data(3, b"x"), Rule.IDLE),
    "push promise": (frame(Frame.PUSH_PROMISE, 4, 1, b"\x00\x00\x00\x02"), Rule.PUSH),
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_what_ends_a_clients_connection(name: str) -> None:
    wire, rule = BROKEN_ANSWERS[name]
    for parts in ([wire], octets(wire), *cuts_in_two(wire), [wire + headers(1, RESPONSE)]):
        engine = asked()
        assert play(engine, parts) == Outcome([], rule.detail)
        assert codes(written(engine), Frame.GOAWAY) == [rule.code]
        assert engine.must_close and engine.receive(wire) == []


# --- sent


def test_how_a_server_starts() -> None:
    engine = server_engine(H2Limits(max_streams=7))
    frames = written(engine)
    assert frames[0].kind is Frame.SETTINGS
    expected = {1: 4096, 2: 0, 3: 7, 4: 65536, 5: 16384, 6: 65536, 8: 1}
    assert dict(frames[0].content) == expected
    assert frames[1:] == [Written(Frame.WINDOW_UPDATE, 0, 0, (2**20 - 65535).to_bytes(4, "big"))]
    assert not engine.settings_acked
    engine.receive(CLIENT_START)
    assert engine.settings_acked
    assert written(engine) == [Written(Frame.SETTINGS, Flag.ACK, 0, [])]


def test_how_a_client_starts() -> None:
    engine = client_engine()
    octets_written = b"".join(engine.take_output())
    assert octets_written.startswith(PREFACE)
    assert dict(Reader().frames(octets_written)[0].content)[2] == 0


def test_a_request() -> None:
    engine = client_engine()
    reader = Reader()
    written(engine, reader)
    fields = [(b"Accept", b"*/*"), HOST, (b"te", b"trailers"), (b"authorization", b"secret")]
    for stream_id in (1, 3):
        engine.send(stream_id, RequestHead(stream_id, b"GET", b"/x?y", fields, scheme=b"https"))
        engine.send(stream_id, End(stream_id))
        expected = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a.example"), (b":path", b"/x?y"),
                    (b"accept", b"*/*"), (b"te", b"trailers"), (b"authorization", b"secret")]  # fmt: skip
        assert written(engine, reader) == [Written(Frame.HEADERS, Flag.END_STREAM, stream_id, expected)]


def test_an_answer() -> None:
    engine = served()
    reader = Reader()
    engine.send(1, Informational(1, 103, [(b"link", b"x")]))
    engine.send(1, ResponseHead(1, 200, [(b"content-length", b"2")]))
    engine.send(1, Data(1, b"hi"))
    engine.send(1, End(1))
    assert written(engine, reader) == [
        Written(Frame.HEADERS, 0, 1, [(b":status", b"103"), (b"link", b"x")]),
        Written(Frame.HEADERS, 0, 1, [(b":status", b"200"), (b"content-length", b"2")]),
        Written(Frame.DATA, Flag.END_STREAM, 1, b"hi"),
    ]
    assert engine.open_streams == 0


@pytest.mark.parametrize("taken", [False, True])
def test_where_the_end_goes(taken: bool) -> None:
    """Into the last frame, unless that is gone."""
    engine = served()
    engine.send(1, ResponseHead(1, 404, []))
    first = written(engine) if taken else []
    engine.send(1, End(1))
    frames = first + written(engine)
    assert [(f.kind, f.flags) for f in frames] == (
        [(Frame.HEADERS, 0), (Frame.DATA, Flag.END_STREAM)] if taken else [(Frame.HEADERS, Flag.END_STREAM)]
    )


def test_trailers_end_the_message() -> None:
    engine = served()
    engine.send(1, ResponseHead(1, 200, []))
    engine.send(1, Data(1, b"hi"))
    engine.send(1, Trailers(1, [(b"Grpc-Status", b"0")]))
    engine.send(1, End(1))
    assert written(engine)[1:] == [
        Written(Frame.DATA, 0, 1, b"hi"),
        Written(Frame.HEADERS, Flag.END_STREAM, 1, [(b"grpc-status", b"0")]),
    ]


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304)])
def test_content_where_there_is_none_is_dropped(method: bytes, status: int) -> None:
    engine = served([(b":method", method), *REQUEST[1:]])
    engine.send(1, ResponseHead(1, status, [(b"content-length", b"2")]))
    engine.send(1, Data(1, b"hi"))
    engine.send(1, Trailers(1, [(b"x", b"y")]))
    engine.send(1, End(1))
    assert [(f.kind, f.flags) for f in written(engine)] == [(Frame.HEADERS, Flag.END_STREAM)]


def test_an_answer_before_the_request_is_over() -> None:
    engine = served(POST, end=False)
    engine.send(1, ResponseHead(1, 413, []))
    engine.send(1, End(1))
    frames = written(engine)
    assert [(f.kind, f.flags) for f in frames] == [(Frame.HEADERS, Flag.END_STREAM), (Frame.RST_STREAM, 0)]
    assert codes(frames, Frame.RST_STREAM) == [Code.NO_ERROR]
    assert engine.open_streams == 0
    assert play(engine, [data(1, b"late", end=True)]) == Outcome([])
    assert written(engine) == []


def test_a_refused_request_is_answered() -> None:
    engine = server_engine(H2Limits(max_header_list_bytes=1024))
    outcome = play(engine, [CLIENT_START, headers(1, [*POST, (b"x", b"y" * 2000)]), data(1, b"more")])
    assert outcome.events[1:] == [RequestRefused(1, 431, Rule.LIST_SIZE.detail)]
    engine.take_output()
    engine.send(1, ResponseHead(1, 431, []))
    engine.send(1, Data(1, b"too large"))
    engine.send(1, End(1))
    frames = written(engine)
    assert [f.kind for f in frames] == [Frame.HEADERS, Frame.DATA, Frame.RST_STREAM]
    assert play(engine, [headers(3, end=True)]).events == [head(3), End(3)]


LOCAL_ERRORS: dict[str, tuple[Callable[[], H2Server | H2Client], list[Event]]] = {
    "no such stream": (served, [ResponseHead(3, 200, [])]),
    "request by a server": (served, [RequestHead(1, b"GET", b"/", [HOST])]),
    "answer by a client": (asked, [ResponseHead(1, 200, [])]),
    "content before the head": (served, [Data(1, b"x")]),
    "end before the head": (served, [End(1)]),
    "second head": (served, [ResponseHead(1, 200, []), ResponseHead(1, 200, [])]),
    "1xx behind the head": (served, [ResponseHead(1, 200, []), Informational(1, 100, [])]),
    "101": (served, [ResponseHead(1, 101, [])]),
    "1xx as a head": (served, [ResponseHead(1, 103, [])]),
    "status": (served, [ResponseHead(1, 1000, [])]),
    "connection": (served, [ResponseHead(1, 200, [(b"connection", b"close")])]),
    "transfer-encoding": (served, [ResponseHead(1, 200, [(b"Transfer-Encoding", b"chunked")])]),
    "field name": (served, [ResponseHead(1, 200, [(b"a b", b"")])]),
    "pseudo-field": (served, [ResponseHead(1, 200, [(b":status", b"200")])]),
    "field value": (served, [ResponseHead(1, 200, [(b"a", b"b\r\n")])]),
    "too much": (served, [ResponseHead(1, 200, [(b"content-length", b"1")]), Data(1, b"hi")]),
    "too little": (served, [ResponseHead(1, 200, [(b"content-length", b"3")]), Data(1, b"hi"), End(1)]),
    "trailer field": (served, [ResponseHead(1, 200, []), Trailers(1, [(b"content-length", b"0")])]),
    "content behind trailers": (served, [ResponseHead(1, 200, []), Trailers(1, [(b"x", b"y")]), Data(1, b"x")]),
    "the number of the next stream": (asked, [RequestHead(5, b"GET", b"/", [HOST])]),
    "no host": (asked, [RequestHead(3, b"GET", b"/", [])]),
    "two hosts": (asked, [RequestHead(3, b"GET", b"/", [HOST, HOST])]),
    "target": (asked, [RequestHead(3, b"GET", b"http://a/", [HOST])]),
    "method": (asked, [RequestHead(3, b"G T", b"/", [HOST])]),
    "scheme": (asked, [RequestHead(3, b"GET", b"/", [HOST], scheme=b"1")]),
    "te": (asked, [RequestHead(3, b"GET", b"/", [HOST, (b"te", b"gzip")])]),
    "behind the end": (asked, [End(1), Data(1, b"x")]),
    "protocol without connect": (asked, [RequestHead(3, b"GET", b"/", [HOST], protocol=b"x")]),
    "an event of the engine": (served, [Reset(1, "")]),
}


@pytest.mark.parametrize("name", LOCAL_ERRORS)
def test_what_may_not_be_sent_changes_nothing(name: str) -> None:
    make, events = LOCAL_ERRORS[name]
    engine = make()
    for event in events[:-1]:
        engine.send(event.stream_id, event)  # type: ignore[union-attr]
    before = (written(engine), engine.open_streams)
    with pytest.raises(LocalProtocolError):
        engine.send(events[-1].stream_id, events[-1])  # type: ignore[union-attr]
    assert written(engine) == [] and engine.open_streams == before[1] and not engine.must_close
    engine.reset(1, "gave up")
    assert [f.kind for f in written(engine)] == ([] if before[1] == 0 else [Frame.RST_STREAM])


def test_streams_that_are_over_are_not_written_to() -> None:
    engine = served(POST, end=False)
    engine.receive(rst(1))
    for event in (ResponseHead(1, 200, []), Data(1, b"x"), End(1)):
        assert engine.send(1, event) == ()
    engine.reset(1, "late")
    assert written(engine) == []


def test_a_large_head_is_continued() -> None:
    engine = served()
    big = [(b"x-%d" % at, b"v" * 5000) for at in range(8)]
    engine.send(1, ResponseHead(1, 200, big))
    engine.send(1, End(1))
    wire = b"".join(engine.take_output())
    assert [wire[3], wire[4]] == [Frame.HEADERS, Flag.END_STREAM]
    assert Reader().frames(wire) == [Written(Frame.HEADERS, Flag.END_STREAM, 1, [(b":status", b"200"), *big])]
    assert merged(asked().receive(wire)) == [ResponseHead(1, 200, big, b"2"), End(1)]
