"""Tunnels through the HTTP/1 engines (CONNECT, Upgrade), and names as their senders wrote them."""

from __future__ import annotations

import pytest

from netproxy.codec.events import Data, End, Event, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.h1 import H1Client, H1Server, client_engine, server_engine
from netproxy.codec.strict import Rule
from netproxy.errors import LocalProtocolError, RemoteProtocolError

from .playing import CORPUS, cuts_in_two, merged, octets

UPGRADE = b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x/1\r\n\r\n"
CONNECT = b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"
CONNECT_1_0 = b"CONNECT a:1 HTTP/1.0\r\n\r\n"
ASKS = [(b"connection", b"upgrade"), (b"upgrade", b"x/1")]
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x/1\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 OK\r\n\r\n"
GRANTED = {
    UPGRADE: (ResponseHead(1, 101, ASKS), SWITCHED),
    CONNECT: (ResponseHead(1, 200, []), ESTABLISHED),
    CONNECT_1_0: (ResponseHead(1, 200, []), ESTABLISHED),
}
BINARY = bytes(range(256)) + b"\r\n\r\nGET / HTTP/1.1\r\n\r\n"


def sent(engine: H1Server | H1Client, *events: Event) -> bytes:
    return b"".join(b"".join(engine.send(1, event)) for event in events)


def asking(method: bytes = b"GET", *, body: bool = False) -> H1Client:
    """A client whose request asks for a tunnel, complete unless it has a body."""
    engine = client_engine()
    if method == b"CONNECT":
        head = RequestHead(1, method, b"a:1", [(b"host", b"a:1")])
    else:
        head = RequestHead(1, method, b"/", [(b"host", b"a"), *ASKS, *([(b"content-length", b"2")] if body else [])])
    sent(engine, head)
    if not body:
        sent(engine, End(1))
    return engine


# --- servers


@pytest.mark.parametrize("request_", GRANTED, ids=["upgrade", "connect", "connect-1.0"])
def test_what_comes_behind_the_request_is_the_tunnels(request_: bytes) -> None:
    head, octets_sent = GRANTED[request_]
    data = request_ + BINARY
    for parts in [[data], octets(data), *cuts_in_two(data)]:
        engine = server_engine()
        before: list[Event] = []
        after: list[Event] = []
        for part in [*parts, b""]:
            (after if after else before).extend(engine.receive(part))
            if End(1) in before and not after:
                assert sent(engine, head) == octets_sent
                after = [Data(1, b"")]
                after += engine.resume()
        assert [type(event) for event in before] == [RequestHead, End]
        assert merged(after) == [Data(1, BINARY), End(1)]
        assert engine.must_close and not engine.reusable
        assert engine.resume() == []


def test_what_comes_before_the_answer_is_kept_for_the_tunnel() -> None:
    engine = server_engine()
    engine.receive(CONNECT + b"early")
    engine.receive(b"er")
    assert engine.receive(b"") == []
    assert engine.buffered == 7
    sent(engine, ResponseHead(1, 200, []))
    assert engine.resume() == [Data(1, b"earlyer"), End(1)]


def test_a_client_that_has_ended_before_the_tunnel_began() -> None:
    engine = server_engine()
    engine.receive(UPGRADE)
    engine.receive(b"")  # ConnectionClosed
    sent(engine, ResponseHead(1, 101, ASKS))
    assert engine.resume() == [End(1)]
    assert sent(engine, Data(1, b"still"), End(1)) == b"still"


def test_a_full_engine_is_not_full_in_the_tunnel() -> None:
    engine = server_engine()
    engine.receive(UPGRADE + bytes(100_000))
    assert engine.is_full
    sent(engine, ResponseHead(1, 101, ASKS))
    engine.resume()
    assert not engine.is_full
    assert engine.buffered == 0


def test_data_is_passed_through_and_ends_once() -> None:
    engine = server_engine()
    engine.receive(CONNECT)
    sent(engine, ResponseHead(1, 200, []))
    data = b"x" * 1000
    (buffer,) = engine.send(1, Data(1, data))
    assert buffer is data
    assert engine.receive(data) == [Data(1, data)]
    assert sent(engine, Data(1, b""), End(1)) == b""
    for event in (Data(1, b"x"), End(1)):
        with pytest.raises(LocalProtocolError):
            engine.send(1, event)


@pytest.mark.parametrize(
    "event", [Trailers(1, []), Informational(1, 103, []), ResponseHead(1, 200, []), RequestHead(1, b"GET", b"/", [])]
)
def test_there_is_no_http_in_a_tunnel(event: Event) -> None:
    engine = server_engine()
    engine.receive(UPGRADE)
    sent(engine, ResponseHead(1, 101, ASKS))
    with pytest.raises(LocalProtocolError):
        engine.send(1, event)


def test_framing_is_no_part_of_an_answer_that_grants_a_tunnel() -> None:
    for request_, (head, octets_sent) in GRANTED.items():
        engine = server_engine()
        engine.receive(request_)
        assert sent(engine, head.replace(headers=[(b"content-length", b"7"), *head.headers])) == octets_sent


@pytest.mark.parametrize(
    ("request_", "head"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", ResponseHead(1, 101, ASKS)),
        (b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x/1\r\n\r\n", ResponseHead(1, 101, ASKS)),
        (UPGRADE.replace(b"1.1", b"1.0"), ResponseHead(1, 101, ASKS)),
        (UPGRADE, ResponseHead(1, 101, [])),
        (UPGRADE, ResponseHead(1, 101, [(b"upgrade", b"x/1")])),
        (CONNECT, ResponseHead(1, 101, ASKS)),
        (UPGRADE[:-2] + b"Content-Length: 2\r\n\r\nx", ResponseHead(1, 101, ASKS)),
    ],
)
def test_no_tunnel_that_was_not_asked_for(request_: bytes, head: ResponseHead) -> None:
    engine = server_engine()
    engine.receive(request_)
    with pytest.raises(LocalProtocolError):
        sent(engine, head)


def test_a_tunnel_behind_a_body_and_behind_another_request() -> None:
    engine = server_engine()
    engine.receive(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + UPGRADE[:-2] + b"Content-Length: 2\r\n\r\nhitunnel")
    sent(engine, ResponseHead(1, 204, []), End(1))
    assert engine.resume()[1:] == [Data(1, b"hi"), End(1)]
    sent(engine, Informational(1, 100, []), ResponseHead(1, 101, ASKS))
    assert engine.resume() == [Data(1, b"tunnel")]


def test_an_upgrade_that_is_not_granted_is_followed_by_the_next_request() -> None:
    engine = server_engine()
    engine.receive(UPGRADE * 2)
    sent(engine, ResponseHead(1, 204, []), End(1))
    assert [type(event) for event in engine.resume()] == [RequestHead, End]
    sent(engine, ResponseHead(1, 101, ASKS))
    assert engine.receive(b"x") == [Data(1, b"x")]


# --- clients


@pytest.mark.parametrize("method", [b"GET", b"CONNECT"])
def test_what_comes_behind_the_answer_is_the_tunnels(method: bytes) -> None:
    head = ESTABLISHED if method == b"CONNECT" else b"HTTP/1.1 103 x\r\n\r\n" + SWITCHED
    data = head + BINARY
    for parts in [[data], octets(data), *cuts_in_two(data)]:
        engine = asking(method)
        events = merged(event for part in [*parts, b""] for event in engine.receive(part))
        assert isinstance(events[-3], ResponseHead)
        assert events[-3].status == (200 if method == b"CONNECT" else 101)
        assert events[-2:] == [Data(1, BINARY), End(1)]
        assert engine.must_close and not engine.reusable
        assert engine.receive(b"") == []
        assert sent(engine, Data(1, b"\r\n"), End(1)) == b"\r\n"


def test_a_connect_that_is_refused_is_an_ordinary_answer() -> None:
    engine = asking(b"CONNECT")
    assert engine.receive(b"HTTP/1.1 407 x\r\nContent-Length: 2\r\n\r\nno")[-2:] == [Data(1, b"no"), End(1)]
    assert engine.reusable


def test_an_upgrade_that_is_not_granted_is_an_ordinary_answer() -> None:
    engine = asking()
    assert engine.receive(b"HTTP/1.1 200 x\r\nContent-Length: 2\r\n\r\nno")[-2:] == [Data(1, b"no"), End(1)]
    assert engine.reusable


@pytest.mark.parametrize(
    ("engine", "head"),
    [
        (asking(body=True), SWITCHED),
        (asking(b"CONNECT"), SWITCHED),
        (asking(), SWITCHED.replace(b"1.1 101", b"1.0 101")),
        (asking(), b"HTTP/1.1 101 x\r\nupgrade: x/1\r\n\r\n"),
        (asking(), b"HTTP/1.1 101 x\r\nconnection: upgrade\r\n\r\n"),
    ],
    ids=["request not complete", "to CONNECT", "version", "no connection", "no protocol"],
)
def test_a_switch_that_is_wrong(engine: H1Client, head: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        engine.receive(head)
    assert (caught.value.status, caught.value.detail) == (502, Rule.SWITCH.detail)


def test_octets_after_the_end_of_a_tunnel() -> None:
    engine = asking()
    engine.receive(SWITCHED)
    assert engine.receive(b"") == [End(1)]
    with pytest.raises(RemoteProtocolError):
        engine.receive(b"x")


# --- how names were written


def test_spelling_is_kept_on_request() -> None:
    data = b"GET / HTTP/1.1\r\nHOST: a\r\nX-a: 1\r\nx-A: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTrail: 1\r\n\r\n"
    for parts in [[data], octets(data), *cuts_in_two(data)]:
        engine = server_engine()
        engine.keep_spelling(True)
        events = [event for part in parts for event in engine.receive(part)]
        head = events[0]
        assert isinstance(head, RequestHead)
        assert head.spelling == {b"host": b"HOST", b"x-a": b"X-a", b"transfer-encoding": b"Transfer-Encoding"}
        assert [name for name, _ in head.headers] == [b"host", b"x-a", b"x-a", b"transfer-encoding"]
        assert events[1:] == [Trailers(1, [(b"trail", b"1")]), End(1)]
    client = client_engine()
    client.keep_spelling(True)
    assert (
        sent(client, head.replace(headers=[(b"new", b"3"), *head.headers]))
        == b"GET / HTTP/1.1\r\nnew: 3\r\nHOST: a\r\nX-a: 1\r\nX-a: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    sent(client, End(1))
    (answer,) = client.receive(b"HTTP/1.1 200 x\r\nETag: 1\r\nCONTENT-LENGTH: 2\r\n\r\n")
    assert isinstance(answer, ResponseHead)
    assert sent(engine, answer) == b"HTTP/1.1 200 OK\r\nETag: 1\r\nCONTENT-LENGTH: 2\r\n\r\n"


@pytest.mark.parametrize("path", sorted((CORPUS / "accept").glob("*.http")), ids=lambda path: path.stem)
def test_spelling_changes_nothing_else(path) -> None:
    kind, method, *_ = path.stem.split("-")

    def heads(keep: bool) -> list[Event]:
        if kind == "req":
            server = server_engine()
            server.keep_spelling(keep)
            return list(server.receive(path.read_bytes()))
        engine = client_engine()
        engine.keep_spelling(keep)
        asks = ASKS if method == "UPGRADE" else []
        target = b"a:1" if method == "CONNECT" else b"/"
        sent(engine, RequestHead(1, method.encode(), target, [(b"host", b"a"), *asks]), End(1))
        return list(engine.receive(path.read_bytes()))

    plain = heads(False)
    for event, spelled in zip(plain, heads(True), strict=True):
        if isinstance(spelled, RequestHead | ResponseHead):
            assert spelled.spelling is not None
            assert {name: name.lower() for name in spelled.spelling.values()} == {
                value: key for key, value in spelled.spelling.items()
            }
            assert set(spelled.spelling) == {name for name, _ in spelled.headers}
            assert spelled.replace(spelling=None) == event
        else:
            assert spelled == event
