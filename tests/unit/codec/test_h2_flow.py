"""HTTP/2: windows both ways, and how a relay feels the other side through them."""

from __future__ import annotations

import pytest

from netproxy.codec.events import Data, End, RequestHead, Reset, ResponseHead, Trailers, Writable
from netproxy.codec.h2 import Code, H2Client, H2Limits, H2Server, client_engine, server_engine
from netproxy.codec.h2_strict import DATA_FRAME, KIB, Flag, Frame, Rule, Setting
from netproxy.errors import LocalProtocolError, RemoteProtocolError

from .h2_frames import (
    CLIENT_START,
    POST,
    RESPONSE,
    SERVER_START,
    Written,
    codes,
    data,
    headers,
    number,
    rst,
    settings,
    window,
    written,
)

HOST = [(b"host", b"a.example")]
INITIAL = 65535
SMALL = H2Limits(stream_window=INITIAL, connection_window=INITIAL)


def server(*streams: int, limits: H2Limits | None = None, start: bytes = CLIENT_START, end: bool = False) -> H2Server:
    engine = server_engine(limits)
    engine.receive(start + b"".join(headers(stream, POST, end=end) for stream in streams))
    engine.take_output()
    return engine


def answering(*streams: int, start: bytes = CLIENT_START, limits: H2Limits | None = None) -> H2Server:
    engine = server(*streams, start=start, end=True, limits=limits)
    for stream in streams:
        engine.send(stream, ResponseHead(stream, 200, []))
    engine.take_output()
    return engine


def upload(engine: H2Server | H2Client, stream_id: int, size: int) -> None:
    for at in range(0, size, DATA_FRAME):
        engine.receive(data(stream_id, b"x" * min(DATA_FRAME, size - at)))


def windows(frames: list[Written]) -> list[tuple[int, int]]:
    return [(f.stream_id, number(f.content)) for f in frames if f.kind is Frame.WINDOW_UPDATE]


def sizes(frames: list[Written]) -> list[tuple[int, int]]:
    return [(f.stream_id, len(f.content)) for f in frames if f.kind is Frame.DATA]


# --- in


def test_only_what_was_credited_is_given_back() -> None:
    engine = server(1, limits=SMALL)
    upload(engine, 1, INITIAL)
    assert windows(written(engine)) == []
    with pytest.raises(RemoteProtocolError, match="beyond the window"):
        engine.receive(data(1, b"x"))
    assert codes(written(engine), Frame.GOAWAY) == [Code.FLOW_CONTROL_ERROR]


def test_windows_are_given_back_in_halves() -> None:
    engine = server(1, limits=SMALL)
    upload(engine, 1, 40_000)
    engine.credit(1, 20_000)
    assert windows(written(engine)) == []
    engine.credit(1, 15_000)
    assert windows(written(engine)) == [(1, 35_000), (0, 35_000)]
    engine.credit(1, 10**9)  # there were 5,000 left
    assert engine.statistics()["owed"] == 0
    upload(engine, 1, INITIAL - 5_000)


def test_the_connections_window_is_shared() -> None:
    engine = server(1, 3, limits=SMALL)
    upload(engine, 1, 40_000)
    with pytest.raises(RemoteProtocolError, match="beyond the window"):
        upload(engine, 3, 40_000)


def test_padding_needs_no_credit() -> None:
    engine = server(1, limits=SMALL)
    for _ in range(400):
        engine.receive(data(1, b"", padding=255))
    updates = windows(written(engine))
    assert {stream for stream, _ in updates} == {0, 1} and sum(n for _, n in updates) > 150_000


def test_octets_of_a_stream_that_is_over_still_count() -> None:
    """Else a peer could fill us with finished streams."""
    engine = server(1, limits=SMALL)
    engine.receive(data(1, b"x" * DATA_FRAME))
    engine.receive(data(1, b"x" * DATA_FRAME))
    engine.receive(data(1, b"x" * DATA_FRAME, end=True))
    engine.send(1, ResponseHead(1, 200, []))
    engine.send(1, End(1))
    assert engine.open_streams == 0
    engine.take_output()
    assert (
        engine.statistics()["owed"] == 3 * DATA_FRAME and engine.statistics()["in_window"] == INITIAL - 3 * DATA_FRAME
    )
    engine.credit(1, DATA_FRAME)
    assert windows(written(engine)) == []
    engine.credit(1, DATA_FRAME)
    assert windows(written(engine)) == [(0, 2 * DATA_FRAME)]
    engine.reset(1, "what is left is not wanted")
    engine.credit(1, DATA_FRAME)
    assert engine.statistics()["owed"] == 0 and written(engine) == []


@pytest.mark.parametrize("who", ["they", "we"])
def test_a_stream_that_is_given_up_owes_nothing(who: str) -> None:
    engine = server(1, limits=SMALL)
    upload(engine, 1, 40_000)
    if who == "they":
        engine.receive(rst(1))
    else:
        engine.reset(1, "gave up")
    assert windows(written(engine)) == [(0, 40_000)]
    engine.credit(1, 40_000)
    assert written(engine) == []


def test_late_content_of_a_stream_that_we_reset_is_credited_by_itself() -> None:
    engine = server(1, limits=SMALL)
    engine.reset(1, "gave up", Code.NO_ERROR)
    upload(engine, 1, 3 * DATA_FRAME)
    frames = written(engine)
    assert sum(n for stream, n in windows(frames) if stream == 0) >= 2 * DATA_FRAME
    assert codes(frames, Frame.RST_STREAM) == [Code.NO_ERROR]


def test_content_of_a_refused_request_is_credited_by_itself() -> None:
    engine = server_engine(H2Limits(max_header_list_bytes=KIB, connection_window=INITIAL))
    engine.receive(CLIENT_START + headers(1, [*POST, (b"x", b"y" * 2000)]))
    engine.take_output()
    upload(engine, 1, 3 * DATA_FRAME)
    assert [stream for stream, _ in windows(written(engine))] == [0]


def test_no_window_for_a_stream_whose_content_is_over() -> None:
    engine = server(1, limits=SMALL)
    upload(engine, 1, 40_000)
    engine.receive(data(1, end=True))
    engine.credit(1, 40_000)
    assert windows(written(engine)) == [(0, 40_000)]


# --- out


def test_content_within_the_window_goes_out_in_frames() -> None:
    engine = answering(1)
    engine.send(1, Data(1, b"x" * 40_000))
    assert not engine.is_blocked(1)
    assert sizes(written(engine)) == [(1, DATA_FRAME), (1, DATA_FRAME), (1, 40_000 - 2 * DATA_FRAME)]


def test_content_beyond_the_window_waits() -> None:
    engine = answering(1)
    content = bytes(range(256)) * 400  # 102,400
    engine.send(1, Data(1, content))
    assert engine.is_blocked(1) and engine.stalled_streams == [1]
    assert engine.queued(1) == len(content) - INITIAL
    engine.send(1, Data(1, b"more"))
    out = b"".join(f.content for f in written(engine))
    assert engine.receive(window(0, 100_000)) == []
    assert engine.receive(window(1, 10_000)) == []
    out += b"".join(f.content for f in written(engine))
    assert len(out) == INITIAL + 10_000 and engine.is_blocked(1)
    assert engine.receive(window(1, 100_000)) == [Writable(1)]
    out += b"".join(f.content for f in written(engine))
    assert out == content + b"more"
    assert not engine.is_blocked(1) and engine.queued(1) == 0 and engine.stalled_streams == []


@pytest.mark.parametrize("trailers", [False, True])
def test_the_end_waits_behind_the_content(trailers: bool) -> None:
    engine = answering(1)
    engine.send(1, Data(1, b"x" * 70_000))
    if trailers:
        engine.send(1, Trailers(1, [(b"x", b"y")]))
    engine.send(1, End(1))
    assert all(f.flags == 0 for f in written(engine)) and engine.open_streams == 1
    # Told also now, since what was queued has yet to be credited on the other side.
    assert engine.receive(window(0, 10_000) + window(1, 10_000)) == [Writable(1)]
    frames = written(engine)
    assert [f.flags & Flag.END_STREAM for f in frames] == ([0, 1] if trailers else [1])
    assert engine.open_streams == 0


def test_streams_take_turns() -> None:
    engine = answering(1, 3, 5)
    for stream in (1, 3, 5):
        engine.send(stream, Data(stream, b"x" * 60_000))
    assert sizes(written(engine))[-1] == (3, INITIAL - 60_000)
    assert engine.stalled_streams == [3, 5]
    engine.receive(window(0, 3 * DATA_FRAME))
    assert sizes(written(engine)) == [(3, DATA_FRAME), (5, DATA_FRAME), (3, DATA_FRAME)]
    assert engine.receive(window(0, 10**6)) == [Writable(3), Writable(5)]


def test_a_stream_without_window_does_not_hold_up_the_others() -> None:
    engine = answering(1, 3, start=CLIENT_START + settings((Setting.INITIAL_WINDOW_SIZE, 10)))
    engine.send(1, Data(1, b"x" * 100))
    engine.send(3, Data(3, b"y" * 10))
    assert sizes(written(engine)) == [(1, 10), (3, 10)]
    assert engine.stalled_streams == [1]


def test_settings_change_the_windows_of_open_streams() -> None:
    engine = answering(1, start=CLIENT_START + settings((Setting.INITIAL_WINDOW_SIZE, 0)))
    engine.send(1, Data(1, b"x" * 100))
    assert sizes(written(engine)) == []
    events = engine.receive(settings((Setting.INITIAL_WINDOW_SIZE, 60)))
    assert Writable(1) not in events and sizes(written(engine)) == [(1, 60)]
    # Below what was sent already: the window is negative now, and has to come up first.
    engine.receive(settings((Setting.INITIAL_WINDOW_SIZE, 20)))
    engine.receive(window(1, 40))
    assert sizes(written(engine)) == []
    assert engine.receive(window(1, 40)) == [Writable(1)]
    assert sizes(written(engine)) == [(1, 40)]


def test_what_may_be_queued_is_bounded() -> None:
    engine = answering(1, limits=H2Limits(max_queued_bytes=KIB))
    engine.send(1, Data(1, b"x" * INITIAL))
    engine.send(1, Data(1, b"x" * KIB))
    with pytest.raises(LocalProtocolError, match="queued"):
        engine.send(1, Data(1, b"x"))
    engine.receive(window(0, 10**6) + window(1, 10**6))
    engine.send(1, Data(1, b"x"))


def test_a_window_that_stays_shut_can_be_seen_and_given_up() -> None:
    engine = answering(1, start=CLIENT_START + settings((Setting.INITIAL_WINDOW_SIZE, 0)))
    engine.send(1, Data(1, b"x" * 1000))
    engine.send(1, End(1))
    assert engine.stalled_streams == [1] and engine.statistics()["queued"] == 1000
    engine.reset(1, "idle")
    assert engine.stalled_streams == [] and engine.statistics()["queued"] == 0
    assert codes(written(engine), Frame.RST_STREAM) == [Code.CANCEL]


def test_a_reset_drops_what_waits() -> None:
    engine = answering(1)
    engine.send(1, Data(1, b"x" * 100_000))
    engine.take_output()
    assert engine.receive(rst(1)) == [Reset(1, "the peer reset the stream: CANCEL", 8)]
    engine.receive(window(0, 10**6))
    assert written(engine) == [] and engine.stalled_streams == []


def test_an_overflow_of_one_streams_window_resets_it() -> None:
    engine = answering(1)
    assert engine.receive(window(1, 2**31 - 1)) == [Reset(1, Rule.WINDOW_OVERFLOW.detail, 3, ours=True)]


def test_both_legs_of_a_relay() -> None:
    """A large answer to a slow reader: what is held is no more than the windows."""
    down = answering(1, start=CLIENT_START)
    up = client_engine()
    up.receive(SERVER_START)
    up.send(1, RequestHead(1, b"GET", b"/", HOST))
    up.send(1, End(1))
    up.take_output()
    up.receive(headers(1, RESPONSE))
    window_up, total, seen, owed = up_window(), 1_000_000, 0, 0
    while seen < total:
        sent = min(DATA_FRAME, window_up, total - seen)
        for event in up.receive(data(1, b"x" * sent)) if sent else ():
            assert isinstance(event, Data)
            down.send(1, event)
            owed += len(event.data)
        window_up -= sent
        if not sent:  # the origin waits for us, and we for the client, which reads now
            assert down.is_blocked(1) and owed <= 2 * up_window()
            got = sum(size for _, size in sizes(written(down)))
            events = down.receive(window(0, got) + window(1, got)) if got else []
            if Writable(1) in events or not down.is_blocked(1):
                up.credit(1, owed)
                owed = 0
        elif not down.is_blocked(1):
            up.credit(1, owed)
            owed = 0
        window_up += sum(n for stream, n in windows(written(up)) if stream == 1)
        seen += sent
    assert down.statistics()["queued"] <= up_window()


def up_window() -> int:
    return H2Limits().stream_window
