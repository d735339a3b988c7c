"""The fake stream keeps the contract of `netproxy.stream`."""

from __future__ import annotations

import pytest

from netproxy.errors import LocalProtocolError

from .streams import HIGH_WATER, FakeStream, play, turns


class Log:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)

    def eof_received(self) -> None:
        self.calls.append("eof")

    def writable(self, ok: bool) -> None:
        self.calls.append(ok)

    def closed(self, exc: Exception | None) -> None:
        self.calls.append(("closed", type(exc)))


def test_what_comes_while_paused_or_without_a_sink_comes_later_in_order() -> None:
    async def main() -> None:
        log, stream = Log(), FakeStream()
        stream.peer_sends(b"a")
        stream.sink = log
        assert not log.calls
        await turns()
        stream.pause_reading()
        stream.peer_sends(b"b")
        stream.peer_ends()
        await turns()
        assert log.calls == [b"a"]
        stream.resume_reading()
        assert log.calls == [b"a"]
        await turns()
        assert log.calls == [b"a", b"b", "eof"]

    play(main)


@pytest.mark.parametrize("how", ["close", "abort", "peer_resets"])
def test_closed_comes_once_and_last(how: str) -> None:
    async def main() -> None:
        log = Log()
        stream = FakeStream(log)
        getattr(stream, how)()
        assert stream.closing
        assert not log.calls
        stream.peer_sends(b"late")
        stream.peer_ends()
        stream.abort()
        stream.close()
        stream.write(b"late")
        await turns()
        assert log.calls == [("closed", ConnectionResetError if how == "peer_resets" else type(None))]
        assert not stream.sent

    play(main)


def test_close_flushes_and_abort_drops() -> None:
    async def main() -> None:
        for how, expected in (("close", b"data"), ("abort", b"")):
            log = Log()
            stream = FakeStream(log)
            stream.peer_stalls()
            stream.write(b"data")
            getattr(stream, how)()
            await turns()
            assert bool(log.calls) is (how == "abort")
            stream.peer_reads()
            await turns()
            assert stream.sent == expected
            assert len(log.calls) == 1

    play(main)


def test_writable_and_half_close() -> None:
    async def main() -> None:
        log = Log()
        stream = FakeStream(log)
        stream.peer_stalls()
        stream.write(bytes(HIGH_WATER))
        assert not log.calls
        stream.write(b"x")
        assert log.calls == [False]
        stream.write_eof()
        with pytest.raises(LocalProtocolError):
            stream.write(b"x")
        stream.peer_reads()
        assert log.calls == [False, True]
        assert stream.sent_eof
        stream.peer_sends(b"answer")
        assert log.calls[-1] == b"answer"

    play(main)
