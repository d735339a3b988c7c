"""The bounds of `Strict`: each exactly at its limit and one above, whole and octet by octet."""

from __future__ import annotations

import pytest

from netproxy.codec.events import Data, End, RequestHead
from netproxy.codec.strict import (
    CHUNKED,
    MAX_CHUNK_LINE,
    UNTIL_CLOSE,
    H1Limits,
    Rule,
    State,
    Strict,
)
from netproxy.errors import RemoteProtocolError

from .playing import Outcome, octets, play_client, play_server

LIMITS = H1Limits(max_head_bytes=100, max_headers=4, max_trailer_bytes=40)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def play(data: bytes, limits: H1Limits = LIMITS) -> Outcome:
    whole = play_server([data], eof=False, limits=limits)
    finest = play_server(octets(data), eof=False, limits=limits)
    assert whole[1:] == finest[1:]
    return finest


def padded_head(size: int, *, end: bytes = b"\r\n\r\n") -> bytes:
    head = GET + b"X: "
    return head + b"y" * (size - len(head) - len(end)) + end


def test_head_size() -> None:
    assert play(padded_head(100)).events[-1] == End(1)
    assert play(padded_head(101))[1:3] == (431, Rule.HEAD_SIZE.detail)


@pytest.mark.parametrize(
    "data", [b"G" * 101, b"GET /" + b"a" * 96, padded_head(120, end=b""), GET + b"X: " + b"\r" * 80]
)
def test_head_without_end(data: bytes) -> None:
    assert not play(data[:100]).status
    assert play(data)[1:3] == (431, Rule.HEAD_SIZE.detail)


def test_empty_lines_before_a_request_do_not_count_as_head() -> None:
    assert play(b"\r\n\r\n" + padded_head(100)).events[-1] == End(1)


def test_field_count() -> None:
    assert play(GET + b"a:\r\n" * 3 + b"\r\n").events[-1] == End(1)
    assert play(GET + b"a:\r\n" * 4 + b"\r\n")[1:3] == (431, Rule.FIELD_COUNT.detail)


def test_trailer_count_and_size() -> None:
    assert play(CHUNKED_HEAD + b"0\r\n" + b"a:\r\n" * 4 + b"\r\n").events[-1] == End(1)
    assert play(CHUNKED_HEAD + b"0\r\n" + b"a:\r\n" * 5 + b"\r\n")[1:3] == (431, Rule.FIELD_COUNT.detail)
    fits = b"0\r\na: " + b"b" * 33 + b"\r\n\r\n"
    assert play(CHUNKED_HEAD + fits).events[-1] == End(1)
    assert play(CHUNKED_HEAD + fits.replace(b"b\r", b"bb\r"))[1:3] == (431, Rule.TRAILER_SIZE.detail)
    assert play(CHUNKED_HEAD + b"0\r\n" + b"a" * 41)[1:3] == (431, Rule.TRAILER_SIZE.detail)


def test_chunk_line_size() -> None:
    line = b"5;" + b"a" * (MAX_CHUNK_LINE - 4)
    assert play(CHUNKED_HEAD + line + b"\r\nhello\r\n0\r\n\r\n").events[-1] == End(1)
    assert play(CHUNKED_HEAD + line + b"a\r\nhello")[1:3] == (400, Rule.CHUNK_LINE_SIZE.detail)
    assert play(CHUNKED_HEAD + line + b"aaa")[1:3] == (400, Rule.CHUNK_LINE_SIZE.detail)


def test_many_small_chunks_with_long_extensions() -> None:
    chunk = b"1;" + b"a" * 100 + b"\r\nx\r\n"
    assert play(CHUNKED_HEAD + chunk * 100 + b"0\r\n\r\n").events[-1] == End(1)
    assert play(CHUNKED_HEAD + chunk * 300)[1:3] == (400, Rule.CHUNK_OVERHEAD.detail)


def test_small_chunks_without_extensions_are_fine() -> None:
    events = play(CHUNKED_HEAD + b"1\r\nx\r\n" * 3000 + b"0\r\n\r\n").events
    assert events[1:] == [Data(1, b"x" * 3000), End(1)]


def test_small_chunks_of_one_read_are_one_event() -> None:
    strict = Strict(LIMITS)
    strict.push(CHUNKED_HEAD + b"1\r\nx\r\n" * 3)
    assert strict.next() is not None
    piece = strict.next()
    assert piece is not None
    assert (piece.raw, piece.end) == (b"1\r\nx\r\n" * 3, False)
    assert strict.next() is None


def test_a_bad_response_is_always_a_502() -> None:
    assert play_client(b"GET", [b"HTTP/1.1 200 OK\r\n" + b"a:\r\n" * 5], limits=LIMITS)[1:3] == (
        502,
        Rule.FIELD_COUNT.detail,
    )


def test_a_partial_line_is_searched_once() -> None:
    strict = Strict(LIMITS)
    for sent, octet in enumerate(octets(b"GET / HTTP/1.1"), start=1):
        strict.push(octet)
        assert strict.next() is None
        assert strict._scan == sent


@pytest.mark.parametrize(
    ("method", "head", "length"),
    [
        (b"GET", b"200 OK\r\nContent-Length: 7", 7),
        (b"GET", b"200 OK\r\nTransfer-Encoding: chunked", CHUNKED),
        (b"GET", b"200 OK", UNTIL_CLOSE),
        (b"HEAD", b"200 OK\r\nContent-Length: 7", 0),
        (b"HEAD", b"200 OK", 0),
        (b"GET", b"204 x\r\nContent-Length: 7", 0),
        (b"GET", b"304 x\r\nTransfer-Encoding: chunked", 0),
        (b"CONNECT", b"200 OK\r\nContent-Length: 7", 0),
        (b"CONNECT", b"400 x\r\nContent-Length: 7", 7),
    ],
)
def test_response_body_length(method: bytes, head: bytes, length: int) -> None:
    strict = Strict(H1Limits(), responses=True)
    strict.expect(method)
    strict.push(b"HTTP/1.1 " + head + b"\r\n\r\n")
    piece = strict.next()
    assert piece is not None and piece.head is not None
    assert piece.head.length == length
    assert piece.end is (length == 0 and not piece.head.tunnel)


def test_nothing_is_read_while_a_message_waits() -> None:
    strict = Strict(H1Limits())
    strict.push(GET + b"\r\n" + b"\x00 anything")
    first = strict.next()
    assert first is not None and first.end
    assert (strict.next(), strict.buffered, strict.state) == (None, 10, State.WAIT)
    strict.next_message()
    with pytest.raises(RemoteProtocolError):
        strict.next()


def test_defaults() -> None:
    assert play(GET + b"a:\r\n" * 255 + b"\r\n", H1Limits()).events[-1] == End(1)
    assert play(GET + b"a:\r\n" * 256 + b"\r\n", H1Limits()).status == 431
    head = play_server([padded_head(64 * 1024)], limits=H1Limits()).events[0]
    assert isinstance(head, RequestHead)
