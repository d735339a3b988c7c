"""HTTP/2: what peers do to make us work or hold memory, and where it ends. Counted, not timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netproxy.codec.events import Data, End, Event, RequestHead, RequestRefused, Reset, ResponseHead
from netproxy.codec.h2 import Code, H2Limits, H2Server, client_engine, server_engine
from netproxy.codec.h2_strict import HEADER_BOMB, KIB, Flag, Frame, Rule, Setting
from netproxy.errors import RemoteProtocolError

from .h2_frames import (
    CLIENT_START,
    POST,
    REQUEST,
    RESPONSE,
    SERVER_START,
    block,
    codes,
    continuation,
    data,
    frame,
    goaway,
    headers,
    ping,
    rst,
    settings,
    window,
    written,
)

LIMITS = H2Limits(glitches=50, glitches_per_s=10, resets=20, resets_per_s=5, max_header_list_bytes=4 * KIB)
FIELDS = block(REQUEST)


def kept(name: bytes, value: bytes) -> bytes:
    """A field that goes into the table."""
    more = len(value) - 127
    size = bytes((len(value),)) if more < 0 else bytes((127, 0x80 | more & 127, more >> 7))
    return b"\x40" + bytes((len(name),)) + name + size + value


def server(limits: H2Limits = LIMITS) -> H2Server:
    engine = server_engine(limits)
    engine.receive(CLIENT_START)
    engine.take_output()
    return engine


def flood(engine: H2Server, wire: Callable[[int], bytes], most: int, *, now: float = 0.0) -> int:
    """How many were read before it was too many."""
    for at in range(most):
        try:
            engine.receive(wire(at), now)
        except RemoteProtocolError:
            assert codes(written(engine), Frame.GOAWAY) == [Code.ENHANCE_YOUR_CALM]
            assert engine.must_close
            return at
    return most


FLOODS: dict[str, Callable[[int], bytes]] = {
    "ping": lambda at: ping(),
    "settings": lambda at: settings(),
    "settings with windows": lambda at: settings((Setting.INITIAL_WINDOW_SIZE, at % 2)),
    "unexpected acknowledgements": lambda at: frame(Frame.SETTINGS, Flag.ACK),
    "unexpected pongs": lambda at: ping(ack=True),
    "priority": lambda at: frame(Frame.PRIORITY, 0, 2 * at + 1, b"\x00\x00\x00\x00\x10"),
    "unknown": lambda at: frame(0x55, 0, at),
    "window": lambda at: window(0, 1),
    "goaway": lambda at: goaway(0),
    "empty content": lambda at: data(1),
    "padding": lambda at: data(1, b"", padding=3),
    "content of a stream that is over": lambda at: data(3, b"x"),
    "heads of a stream that is over": lambda at: headers(3, FIELDS),
    "resets of a stream that is over": lambda at: rst(3),
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_of_frames_that_bring_nothing(name: str) -> None:
    engine = server()
    engine.receive(headers(1, POST) + headers(3, POST) + rst(3))
    assert flood(engine, FLOODS[name], 200) <= LIMITS.glitches
    assert engine.statistics()["buffered"] == 0


def test_what_a_flood_makes_us_write_is_bounded() -> None:
    engine = server()
    with pytest.raises(RemoteProtocolError):
        engine.receive(ping() * 10_000)
    assert sum(map(len, engine.take_output())) <= 17 * LIMITS.glitches + 200


def test_time_fills_up_the_budget() -> None:
    """Two pings a second, which is keepalive, may go on for ever."""
    engine = server()
    assert max(flood(engine, lambda at: ping(), 1, now=100 + at / 2) for at in range(1000)) == 1
    assert engine.statistics()["glitches_left"] > 40


def test_work_fills_up_the_budget() -> None:
    """A client that answers every KiB of a download with two updates of windows."""
    engine = server()
    engine.receive(headers(1, end=True) + window(0, 10**9) + window(1, 10**9))
    engine.send(1, ResponseHead(1, 200, []))
    for _ in range(200):
        engine.send(1, Data(1, b"x" * 16 * KIB))
        engine.take_output()
        engine.receive((window(0, KIB) + window(1, KIB)) * 16)


# --- requests that are given up


def test_rapid_reset() -> None:
    """CVE-2023-44487: requests that are reset at once."""
    engine = server()
    assert flood(engine, lambda at: headers(2 * at + 1, FIELDS, end=True) + rst(2 * at + 1), 200) == LIMITS.resets
    assert engine.open_streams == 0


def test_rapid_reset_with_time() -> None:
    engine = server()
    allowed = flood(engine, lambda at: headers(2 * at + 1, FIELDS) + rst(2 * at + 1), 20, now=100)
    assert allowed == 20
    engine = server()
    assert all(not flood_one(engine, at) for at in range(200)), "five a second is what the limit allows"


def flood_one(engine: H2Server, at: int) -> bool:
    engine.receive(headers(2 * at + 1, FIELDS) + rst(2 * at + 1), 100 + at / 5)
    return engine.must_close


def test_requests_that_are_answered_pay_for_some_that_are_not() -> None:
    """Cancelling every second request is usual where clients have deadlines."""
    engine = server()
    for at in range(200):
        stream_id = 4 * at + 1
        engine.receive(
            headers(stream_id, FIELDS, end=True) + headers(stream_id + 2, FIELDS, end=True) + rst(stream_id + 2)
        )
        engine.send(stream_id, ResponseHead(stream_id, 204, []))
        engine.send(stream_id, End(stream_id))
        engine.take_output()


MADE: dict[str, Callable[[int], bytes]] = {
    "window of nothing": lambda stream: window(stream, 0),
    "window above all": lambda stream: window(stream, 2**31 - 1),
    "content behind the end": lambda stream: data(stream, b"x"),
    "head behind the end": lambda stream: headers(stream, FIELDS, end=True),
}


@pytest.mark.parametrize("name", MADE)
def test_rules_broken_to_make_us_reset(name: str) -> None:
    """CVE-2025-8671: the request runs, and it is us who reset it."""
    engine = server()
    assert (
        flood(engine, lambda at: headers(2 * at + 1, FIELDS, end=True) + MADE[name](2 * at + 1), 200) == LIMITS.resets
    )


REFUSED: dict[str, bytes] = {
    "malformed": headers(1, [*REQUEST, (b"X", b"y")], end=True),
    "too large": headers(1, [*REQUEST, (b"x", b"y" * 5000)], end=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_are_refused(name: str) -> None:
    engine = server()
    wire = REFUSED[name]
    assert flood(engine, lambda at: wire[:5] + (2 * at + 1).to_bytes(4, "big") + wire[9:], 200) == LIMITS.resets


def test_more_streams_than_allowed() -> None:
    engine = server(H2Limits(max_streams=3, resets=20))
    events: list[Event] = []
    with pytest.raises(RemoteProtocolError, match="given up"):
        for at in range(100):
            events += engine.receive(headers(2 * at + 1, FIELDS))
    assert len([event for event in events if isinstance(event, RequestHead)]) == 3
    assert all(event.code == Code.REFUSED_STREAM for event in events if isinstance(event, Reset))
    assert codes(written(engine), Frame.RST_STREAM) == [Code.REFUSED_STREAM] * 21


def test_a_server_that_floods_a_client() -> None:
    engine = client_engine(LIMITS)
    engine.receive(SERVER_START)
    engine.send(1, RequestHead(1, b"GET", b"/", [(b"host", b"a")]))
    with pytest.raises(RemoteProtocolError, match="bring nothing"):
        engine.receive(headers(1, [(b":status", b"103")]) * 60)


# --- header blocks


def test_continuations_without_end() -> None:
    """CVE-2024-27316."""
    for size, rule in ((0, Rule.BLOCK_FRAMES), (1, Rule.BLOCK_FRAMES), (2000, Rule.BLOCK_SIZE)):
        engine = server()
        engine.receive(headers(1, FIELDS, whole=False))
        fragment = continuation(1, bytes(size), whole=False)
        with pytest.raises(RemoteProtocolError) as error:
            for _ in range(1000):
                engine.receive(fragment)
                assert engine.statistics()["buffered"] <= LIMITS.max_block_bytes
        assert error.value.detail == rule.detail
        assert codes(written(engine), Frame.GOAWAY) == [Code.ENHANCE_YOUR_CALM]


def test_a_list_above_the_limit_is_431_and_the_connection_stays() -> None:
    engine = server()
    # What it put into the table is known afterwards: the whole block is read.
    big = FIELDS + kept(b"x", b"v" * 5000) + kept(b"z", b"z")
    events = engine.receive(headers(1, big, end=True) + headers(3, FIELDS + b"\xbe", end=True))
    assert events[0] == RequestRefused(1, 431, Rule.LIST_SIZE.detail)
    assert isinstance(events[1], RequestHead) and events[1].headers[-1] == (b"z", b"z")


def test_many_fields_are_431() -> None:
    engine = server(H2Limits(max_headers=20))
    assert engine.receive(headers(1, FIELDS + b"\x00\x01x\x01y" * 16, end=True))[1:] == [End(1)]
    assert isinstance(engine.receive(headers(3, FIELDS + b"\x00\x01x\x01y" * 17, end=True))[0], RequestRefused)


def test_a_header_bomb() -> None:
    """A large field in the table, named again and again: each octet is worth 4,000."""
    engine = server()
    value = b"v" * 3900
    engine.receive(headers(1, FIELDS + kept(b"x", value)))
    bomb = b"\xbe" * (LIMITS.max_block_bytes - 1000)
    with pytest.raises(RemoteProtocolError) as error:
        engine.receive(headers(3, FIELDS + bomb))
    assert error.value.detail == Rule.BOMB.detail
    # A small one is only refused.
    engine = server()
    engine.receive(headers(1, FIELDS + kept(b"x", value)))
    assert isinstance(engine.receive(headers(3, FIELDS + b"\xbe" * (HEADER_BOMB - 1)))[0], RequestRefused)


def test_a_bomb_in_trailers_and_in_answers() -> None:
    engine = server()
    engine.receive(headers(1, POST))
    events = engine.receive(headers(1, [(b"x", b"y" * 5000)], end=True))
    assert events == [Reset(1, Rule.LIST_SIZE.detail, Code.ENHANCE_YOUR_CALM, ours=True)]
    client = client_engine(LIMITS)
    client.receive(SERVER_START)
    client.send(1, RequestHead(1, b"GET", b"/", [(b"host", b"a")]))
    events = list(client.receive(headers(1, [*RESPONSE, (b"x", b"y" * 5000)])))
    assert events == [Reset(1, Rule.LIST_SIZE.detail, Code.ENHANCE_YOUR_CALM, ours=True)]
    assert client.reusable


# --- memory


def test_what_one_connection_holds() -> None:
    """Partial frames and blocks, content that was not credited, content for windows that stay shut."""
    limits = H2Limits(max_streams=4, stream_window=65535, connection_window=100_000, max_queued_bytes=50_000)
    engine = server(limits)
    engine.receive(settings((Setting.INITIAL_WINDOW_SIZE, 0)) + b"".join(headers(n, POST) for n in (1, 3, 5, 7)))
    with pytest.raises(RemoteProtocolError, match="beyond the window"):
        for stream in (1, 3, 5, 7) * 10:
            engine.receive(data(stream, b"x" * 16 * KIB))
            assert engine.statistics()["owed"] <= 100_000
    engine = server(limits)
    engine.receive(settings((Setting.INITIAL_WINDOW_SIZE, 0)) + headers(1, end=True))
    engine.send(1, ResponseHead(1, 200, []))
    engine.send(1, Data(1, b"x" * 50_000))
    assert engine.statistics()["queued"] == 50_000 and engine.stalled_streams == [1]
    engine.receive(data(9, b"x" * 16 * KIB)[:-1])
    assert engine.statistics()["buffered"] <= 16 * KIB + 9
