"""What the HTTP/1 engines do beyond parsing: cycles, framing of what is sent, errors, closing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import pytest

from netproxy.codec.events import (
    ConnectionClosed,
    Data,
    End,
    Event,
    Headers,
    Informational,
    RequestHead,
    ResponseHead,
    Trailers,
)
from netproxy.codec.h1 import H1Client, H1Limits, H1Server, client_engine, server_engine
from netproxy.codec.strict import Rule
from netproxy.errors import LocalProtocolError, RemoteProtocolError

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
GET_1_0 = b"GET / HTTP/1.0\r\n\r\n"
GET_EVENTS = [RequestHead(1, b"GET", b"/", [(b"host", b"a")]), End(1)]
HOST: Headers = [(b"host", b"a")]
CHUNKED: Headers = [(b"transfer-encoding", b"chunked")]
LENGTH_2: Headers = [(b"content-length", b"2")]


def send(engine: H1Server | H1Client, *events: Event) -> bytes:
    return b"".join(b"".join(engine.send(1, event)) for event in events)


def asked(request: bytes = GET, limits: H1Limits | None = None) -> H1Server:
    """A server engine with one request in it."""
    engine = server_engine(limits)
    assert engine.receive(request)[-1] == End(1)
    return engine


def asking(method: bytes = b"GET") -> H1Client:
    """A client engine with one request out."""
    engine = client_engine()
    send(engine, RequestHead(1, method, b"/", HOST), End(1))
    return engine


def head_of(sent: bytes) -> list[bytes]:
    head = sent.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return [head[0], *(line.lower() for line in head[1:])]


# Server: framing of responses


def test_length() -> None:
    engine = asked()
    sent = send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"h"), Data(1, b"i"), End(1))
    assert sent == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    assert engine.reusable and not engine.must_close


@pytest.mark.parametrize("headers", [[], CHUNKED])
def test_unknown_length_is_chunked(headers: Headers) -> None:
    sent = send(asked(), ResponseHead(1, 200, headers), Data(1, b"hi"), Data(1, b""), Data(1, b"x"), End(1))
    assert head_of(sent) == [b"HTTP/1.1 200 OK", b"transfer-encoding: chunked"]
    assert sent.endswith(b"\r\n\r\n2\r\nhi\r\n1\r\nx\r\n0\r\n\r\n")


@pytest.mark.parametrize("headers", [[], CHUNKED])
def test_unknown_length_to_http10_ends_with_the_connection(headers: Headers) -> None:
    engine = asked(GET_1_0)
    sent = send(engine, ResponseHead(1, 200, headers), Data(1, b"hi"), Trailers(1, [(b"x", b"y")]), End(1))
    assert head_of(sent) == [b"HTTP/1.1 200 OK", b"connection: close"]
    assert sent.endswith(b"\r\n\r\nhi")
    assert engine.must_close and not engine.reusable


def test_http10_keep_alive_is_not_kept_alive() -> None:
    """RFC 9112 9.3: a proxy does not keep a connection with an HTTP/1.0 client."""
    engine = asked(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    sent = send(engine, ResponseHead(1, 200, [*LENGTH_2, (b"connection", b"keep-alive")]), Data(1, b"hi"), End(1))
    assert head_of(sent) == [b"HTTP/1.1 200 OK", b"content-length: 2", b"connection: close"]
    assert engine.must_close
    assert engine.receive(GET) == []


def test_trailers() -> None:
    sent = send(asked(), ResponseHead(1, 200, CHUNKED), Data(1, b"x"), Trailers(1, [(b"grpc-status", b"0")]), End(1))
    assert sent.endswith(b"1\r\nx\r\n0\r\ngrpc-status: 0\r\n\r\n")


def test_trailers_are_dropped_where_nothing_is_chunked() -> None:
    sent = send(asked(), ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), Trailers(1, [(b"x", b"y")]), End(1))
    assert sent.endswith(b"\r\n\r\nhi")


def test_head_keeps_the_length_and_drops_the_content() -> None:
    engine = asked(GET.replace(b"GET", b"HEAD"))
    sent = send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), End(1))
    assert sent == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    assert engine.reusable


def test_no_content() -> None:
    engine = asked()
    sent = send(engine, ResponseHead(1, 204, [(b"content-length", b"0")]), Data(1, b"hi"), End(1))
    assert sent == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert engine.reusable


def test_not_modified_keeps_its_fields() -> None:
    sent = send(asked(), ResponseHead(1, 304, [(b"etag", b'"x"'), (b"content-length", b"9")]), End(1))
    assert sent == b'HTTP/1.1 304 Not Modified\r\netag: "x"\r\ncontent-length: 9\r\n\r\n'


def test_data_is_passed_through() -> None:
    engine = asked()
    data = b"x" * 1000
    engine.send(1, ResponseHead(1, 200, [(b"content-length", b"1000")]))
    (buffer,) = engine.send(1, Data(1, data))
    assert buffer is data


# Server: informational, upgrade, CONNECT, expect


def test_informational() -> None:
    engine = asked()
    assert send(engine, Informational(1, 100, [])) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sent = send(engine, Informational(1, 103, [(b"link", b"</a>"), (b"content-length", b"0")]))
    assert sent == b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), End(1))
    assert engine.reusable


def test_no_informational_to_http10() -> None:
    engine = asked(GET_1_0)
    assert send(engine, Informational(1, 100, [])) == b""
    assert send(engine, ResponseHead(1, 200, LENGTH_2))


def test_expect_is_left_to_the_caller() -> None:
    engine = server_engine()
    expecting = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert len(engine.receive(expecting)) == 1
    assert send(engine, Informational(1, 100, [])).startswith(b"HTTP/1.1 100 ")
    assert engine.receive(b"hi") == [Data(1, b"hi"), End(1)]
    send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), End(1))
    assert engine.reusable


def test_upgrade_is_an_ordinary_request() -> None:
    engine = asked(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), End(1))
    assert engine.receive(GET) == GET_EVENTS


def test_101_is_no_informational() -> None:
    engine = asked(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    with pytest.raises(LocalProtocolError):
        send(engine, Informational(1, 101, []))


def test_a_connect_that_is_refused_ends_the_connection() -> None:
    engine = asked(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
    assert engine.receive(GET) == []
    sent = send(engine, ResponseHead(1, 501, [(b"content-length", b"0")]), End(1))
    assert b"connection: close" in sent
    assert engine.must_close
    assert engine.resume() == []
    assert engine.receive(GET) == []


# Server: cycles


def test_pipelined_requests_wait_for_their_turn() -> None:
    engine = server_engine()
    assert engine.receive(GET * 3 + GET[:5]) == GET_EVENTS
    assert engine.buffered == 2 * len(GET) + 5
    assert engine.resume() == []
    for left in (1, 0):
        assert not engine.reusable
        send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), End(1))
        assert engine.resume() == GET_EVENTS
        assert engine.buffered == left * len(GET) + 5
    send(engine, ResponseHead(1, 204, []), End(1))
    assert engine.resume() == []
    assert not engine.reusable, "a request has begun"
    assert engine.receive(GET[5:]) == GET_EVENTS


def test_a_full_engine_says_so() -> None:
    engine = server_engine(H1Limits(max_pipelined_bytes=2 * len(GET)))
    engine.receive(GET * 2)
    assert not engine.is_full
    engine.receive(GET)
    assert engine.is_full
    send(engine, ResponseHead(1, 204, []), End(1))
    engine.resume()
    assert not engine.is_full


def test_an_error_in_a_pipelined_request_does_not_reach_back() -> None:
    engine = asked(GET + b"BAD\r\n")
    sent = send(engine, ResponseHead(1, 200, LENGTH_2), Data(1, b"hi"), End(1))
    assert b"close" not in sent
    with pytest.raises(RemoteProtocolError):
        engine.resume()
    assert b"connection: close" in send(engine, ResponseHead(1, 400, LENGTH_2))


def test_a_response_may_be_over_before_its_request() -> None:
    engine = server_engine()
    engine.receive(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
    send(engine, ResponseHead(1, 204, []), End(1))
    assert not engine.reusable and not engine.must_close
    assert engine.receive(b"cd" + GET) == [Data(1, b"cd"), End(1), *GET_EVENTS]


def test_close_of_the_client() -> None:
    engine = asked(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close\r\n\r\n")
    assert engine.must_close
    sent = send(engine, ResponseHead(1, 200, [*LENGTH_2, (b"connection", b"Keep-Alive, x-foo")]))
    assert head_of(sent) == [b"HTTP/1.1 200 OK", b"content-length: 2", b"connection: x-foo, close"]


def test_close_of_ours() -> None:
    engine = asked(GET * 2)
    send(engine, ResponseHead(1, 204, [(b"connection", b"close")]), End(1))
    assert engine.must_close and not engine.reusable
    assert engine.resume() == []
    assert engine.buffered == 0


def test_goaway() -> None:
    engine = asked()
    send(engine, ResponseHead(1, 200, LENGTH_2))
    assert engine.goaway() == []
    send(engine, Data(1, b"hi"), End(1))
    assert not engine.must_close and not engine.reusable
    assert engine.receive(GET) == GET_EVENTS
    assert b"connection: close" in send(engine, ResponseHead(1, 204, []))
    assert engine.must_close


# Server: end of stream


def test_eof_between_requests() -> None:
    engine = server_engine()
    assert engine.reusable
    assert engine.receive(b"") == [ConnectionClosed()]
    assert engine.receive(b"") == []
    assert engine.must_close and not engine.reusable


def test_eof_after_a_request_leaves_time_to_answer() -> None:
    engine = asked()
    assert engine.receive(b"") == [ConnectionClosed()]
    assert b"connection: close" in send(engine, ResponseHead(1, 204, []), End(1))


def test_eof_behind_pipelined_requests() -> None:
    engine = asked(GET + GET)
    assert engine.receive(b"") == []
    assert b"close" not in send(engine, ResponseHead(1, 204, []), End(1))
    assert engine.resume() == [*GET_EVENTS, ConnectionClosed()]
    assert b"connection: close" in send(engine, ResponseHead(1, 204, []), End(1))
    assert engine.resume() == []


def test_eof_in_a_request() -> None:
    engine = server_engine()
    engine.receive(GET[:5])
    with pytest.raises(RemoteProtocolError, match="closed in the middle"):
        engine.receive(b"")


def test_octets_after_eof() -> None:
    engine = server_engine()
    engine.receive(b"")
    with pytest.raises(RemoteProtocolError):
        engine.receive(GET)


# Server: errors


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        (b"GET / HTTP/2.0\r\n", 505),
        (b"\x16\x03\x01", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400),
    ],
)
@pytest.mark.parametrize("before", [b"", GET])
@pytest.mark.parametrize("headers", [LENGTH_2, [*LENGTH_2, (b"connection", b"keep-alive")], []])
def test_an_error_can_be_answered(octets: bytes, status: int, before: bytes, headers: Headers) -> None:
    engine = server_engine()
    if before:
        engine.receive(before)
        send(engine, ResponseHead(1, 204, []), End(1))
    with pytest.raises(RemoteProtocolError) as caught:
        engine.receive(octets)
    assert caught.value.status == status
    assert engine.must_close and not engine.reusable
    sent = send(engine, ResponseHead(1, status, headers), Data(1, b"no"), End(1))
    assert sent.startswith(b"HTTP/1.1 %d " % status)
    assert head_of(sent).count(b"connection: close") == 1
    assert b"keep-alive" not in sent
    with pytest.raises(RemoteProtocolError):
        engine.receive(GET)


def test_a_head_that_never_came_can_be_answered() -> None:
    engine = server_engine()
    engine.receive(GET[:5])
    sent = send(engine, ResponseHead(1, 408, [(b"content-length", b"0")]), End(1))
    assert b"connection: close" in sent
    assert engine.receive(GET[5:]) == []


def test_a_late_head_is_not_read_under_its_answer() -> None:
    engine = server_engine()
    engine.receive(GET[:5])
    send(engine, ResponseHead(1, 408, LENGTH_2))
    assert engine.receive(GET[5:]) == []
    assert send(engine, Data(1, b"no"), End(1)) == b"no"


def test_an_answer_to_a_broken_head_knows_nothing_of_the_request_before() -> None:
    engine = asked(GET.replace(b"GET", b"HEAD"))
    send(engine, ResponseHead(1, 200, LENGTH_2), End(1))
    engine.receive(GET[:5])
    sent = send(engine, ResponseHead(1, 408, LENGTH_2), Data(1, b"no"), End(1))
    assert b"connection: close" in sent
    assert sent.endswith(b"\r\n\r\nno")
    assert engine.must_close


def test_an_error_after_the_response_began() -> None:
    engine = server_engine()
    engine.receive(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    send(engine, ResponseHead(1, 200, LENGTH_2))
    with pytest.raises(RemoteProtocolError):
        engine.receive(b"x\r\n")
    with pytest.raises(LocalProtocolError):
        send(engine, ResponseHead(1, 400, []))


SPLITTING: list[Headers] = [
    [(b"x", b"a\r\nSet-Cookie: b")],
    [(b"x", b"a\nb")],
    [(b"x", b"a\x00")],
    [(b"x", b" a")],
    [(b"x\r\ny", b"a")],
    [(b"x y", b"a")],
    [(b"", b"a")],
    [(b":status", b"200")],
    [*LENGTH_2, *CHUNKED],
    [*LENGTH_2, *LENGTH_2],
    [*CHUNKED, *CHUNKED],
    [(b"content-length", b"+2")],
    [(b"transfer-encoding", b"gzip, chunked")],
]


@pytest.mark.parametrize("headers", SPLITTING)
def test_nothing_illegal_is_sent(headers: Headers) -> None:
    for engine, event in (
        (asked(), ResponseHead(1, 200, headers)),
        (asked(), Informational(1, 103, headers)),
        (client_engine(), RequestHead(1, b"POST", b"/", HOST + headers)),
    ):
        with pytest.raises(LocalProtocolError):
            send(engine, event)
        with pytest.raises(LocalProtocolError, match="after"):
            send(engine, event)
        assert engine.must_close and not engine.reusable


@pytest.mark.parametrize("trailers", [*SPLITTING[:8], LENGTH_2, [(b"Host", b"a")]])
def test_no_illegal_trailers_are_sent(trailers: Headers) -> None:
    engine = asked()
    send(engine, ResponseHead(1, 200, []))
    with pytest.raises(LocalProtocolError):
        send(engine, Trailers(1, trailers))


@pytest.mark.parametrize(
    "events",
    [
        [Data(1, b"x")],
        [End(1)],
        [Trailers(1, [])],
        [RequestHead(1, b"GET", b"/", HOST)],
        [ConnectionClosed()],
        [ResponseHead(2, 200, [])],
        [ResponseHead(1, 100, [])],
        [ResponseHead(1, 200, LENGTH_2), Data(1, b"too much")],
        [ResponseHead(1, 200, LENGTH_2), Data(1, b"x"), End(1)],
        [ResponseHead(1, 200, []), ResponseHead(1, 200, [])],
        [ResponseHead(1, 200, []), Informational(1, 103, [])],
        [ResponseHead(1, 200, []), Trailers(1, []), Data(1, b"x")],
        [ResponseHead(1, 200, []), Trailers(1, []), Trailers(1, [])],
        [ResponseHead(1, 200, []), End(1), End(1)],
    ],
)
def test_wrong_order(events: list[Event]) -> None:
    engine = asked()
    *before, last = events
    send(engine, *before)
    with pytest.raises(LocalProtocolError):
        engine.send(last.stream_id if isinstance(last, ResponseHead) else 1, last)


def test_reset() -> None:
    for engine in (asked(), asking()):
        assert engine.reset(1, "gone") == []
        assert engine.must_close and not engine.reusable
        assert engine.receive(b"anything") == []
        assert engine.credit(1, 10) == []
        with pytest.raises(LocalProtocolError):
            send(engine, End(1))


# Client


def test_client_reuses_its_connection() -> None:
    engine = client_engine()
    for _ in range(3):
        assert engine.reusable
        sent = send(engine, RequestHead(1, b"POST", b"/x", [*HOST, *LENGTH_2]), Data(1, b"hi"), End(1))
        assert sent == b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi"
        assert not engine.reusable
        assert engine.receive(b"HTTP/1.1 204 x\r\n\r\n") == [ResponseHead(1, 204, []), End(1)]
    assert engine.receive(b"") == [ConnectionClosed()]
    assert not engine.reusable and engine.must_close


def test_client_sends_chunks_and_trailers() -> None:
    engine = client_engine()
    sent = send(
        engine, RequestHead(1, b"PUT", b"/", HOST + CHUNKED), Data(1, b"hi"), Trailers(1, [(b"x", b"y")]), End(1)
    )
    assert sent.endswith(b"\r\n\r\n2\r\nhi\r\n0\r\nx: y\r\n\r\n")


def test_client_without_framing_has_no_content() -> None:
    engine = client_engine()
    send(engine, RequestHead(1, b"GET", b"/", HOST))
    with pytest.raises(LocalProtocolError):
        send(engine, Data(1, b"x"))


def test_early_response() -> None:
    engine = client_engine()
    send(engine, RequestHead(1, b"PUT", b"/", HOST + LENGTH_2))
    assert engine.receive(b"HTTP/1.1 204 x\r\n\r\n")[-1] == End(1)
    assert not engine.reusable
    assert send(engine, Data(1, b"hi"), End(1)) == b"hi"
    assert engine.reusable


def test_until_close() -> None:
    engine = asking()
    assert engine.receive(b"HTTP/1.1 200 OK\r\n\r\nab") == [ResponseHead(1, 200, []), Data(1, b"ab")]
    assert engine.must_close
    assert engine.receive(b"cd") == [Data(1, b"cd")]
    assert engine.receive(b"") == [End(1)]
    assert not engine.reusable


@pytest.mark.parametrize("octets", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx"])
def test_upstream_closes_too_early(octets: bytes) -> None:
    engine = asking()
    with pytest.raises(RemoteProtocolError) as caught:
        if octets:
            engine.receive(octets)
        engine.receive(b"")
    assert caught.value.status == 502
    with pytest.raises(LocalProtocolError):
        send(engine, End(1))


def test_nobody_asked() -> None:
    engine = client_engine()
    with pytest.raises(RemoteProtocolError, match="answer no request") as caught:
        engine.receive(b"HTTP/1.1 408 Request Timeout\r\n")
    assert caught.value.detail == Rule.UNSOLICITED.detail
    assert not engine.reusable and engine.must_close


def test_upstream_switches_protocols_unasked() -> None:
    with pytest.raises(RemoteProtocolError, match="101"):
        asking().receive(b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n")


@pytest.mark.parametrize(
    "head",
    [
        RequestHead(1, b"CONNECT", b"a", HOST),
        RequestHead(1, b"CONNECT", b"a:80", HOST + LENGTH_2),
        RequestHead(1, b"GET", b"/a b", HOST),
        RequestHead(1, b"GET", b"/a\r\nX: y", HOST),
        RequestHead(1, b"GET", b"*", HOST),
        RequestHead(1, b"G T", b"/", HOST),
        RequestHead(1, b"", b"/", HOST),
        RequestHead(1, b"GET", b"/", []),
        RequestHead(1, b"GET", b"/", HOST + HOST),
        RequestHead(1, b"GET", b"/", [(b"host", b"u@a")]),
    ],
)
def test_illegal_request(head: RequestHead) -> None:
    with pytest.raises(LocalProtocolError):
        send(client_engine(), head)


def test_client_does_not_pipeline() -> None:
    with pytest.raises(LocalProtocolError):
        send(asking(), RequestHead(1, b"GET", b"/", HOST))


def test_client_goaway() -> None:
    engine = asking()
    engine.goaway()
    assert engine.must_close
    assert engine.receive(b"HTTP/1.1 204 x\r\n\r\n")[-1] == End(1)
    assert not engine.reusable


@pytest.mark.parametrize("make", [server_engine, asking])
def test_what_is_refused_leaves_no_ring(make: Callable[[], H1Server | H1Client]) -> None:
    """Else what bad peers make us hold, buffers and all, would wait for a full collection."""

    def refused() -> None:
        engine = make()
        for _ in range(2):
            with contextlib.suppress(RemoteProtocolError):
                engine.receive(b"GET\r\n\r\n")

    refused()
    gc.collect()
    gc.disable()
    try:
        refused()
        assert gc.collect() == 0
    finally:
        gc.enable()
