"""Opaque relays over streams in memory."""

from __future__ import annotations

import dataclasses

import pytest

from netproxy.codec.h2 import PREFACE
from netproxy.decide.route import Choice
from netproxy.errors import Reason
from netproxy.observe.record import Parties
from netproxy.relay.tcp import TcpRelay

from .streams import HIGH_WATER, WEB, FakeStream, World, play, turns

PARTIES = Parties("source", "shop/client", "spiffe://x", "shop/web-1", "shop/web")


class Relayed:
    def __init__(self, inbound: bool = False, guarded: bool = False) -> None:
        self.world = World()
        self.state = self.world.port.endpoints[0]
        self.state.outstanding += 1
        self.down, self.up = FakeStream(), FakeStream()
        for stream in (self.down, self.up):
            stream.pause_reading()
        self.relay = TcpRelay(
            self.down,
            self.up,
            self.world.services,
            facts=self.world.facts(inbound),
            choice=Choice(WEB, self.state, "", 0.0),
            parties=PARTIES,
            security="none",
            guarded=guarded,
        )

    def over(self, reason: Reason, moved: tuple[int, int]) -> None:
        assert self.world.recorder.connections == [(reason, moved)]
        assert self.state.outstanding == 0
        assert not self.world.services.live
        assert self.world.recorder.open == 0


def test_a_guard_is_off_once_no_request_can_come() -> None:
    async def main() -> None:
        pair = Relayed(inbound=True, guarded=True)
        for octets in (b"\x16", b"\x03\x01\x00\x01\x01" * 3, REQUEST):
            pair.down.peer_sends(octets)
            await turns()
            assert pair.relay._down.guarded is None
        assert pair.up.take_sent().endswith(REQUEST)
        pair.relay.abort()
        await turns()

    play(main)


def test_both_ways_with_half_close() -> None:
    async def main() -> None:
        pair = Relayed()
        pair.down.peer_sends(b"question")
        pair.down.peer_ends()
        await turns()
        assert (pair.up.take_sent(), pair.up.sent_eof) == (b"question", True)
        assert not pair.down.sent_eof
        assert pair.world.services.live
        pair.up.peer_sends(b"an")
        pair.up.peer_sends(b"swer")
        pair.up.peer_ends()
        await turns()
        assert (pair.down.take_sent(), pair.down.sent_eof) == (b"answer", True)
        assert pair.down.closing
        assert pair.up.closing
        assert not pair.down.was_reset
        assert not pair.up.was_reset
        pair.over(Reason.OK, (8, 6))

    play(main)


REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-client-cert: URI=spiffe://evil\r\n\r\n"


@pytest.mark.parametrize("blanks", [b"", b"\n", b"\r\n\r\n", b" "])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_guarded_relay_ends_before_a_field_of_a_request_has_passed(blanks: bytes, cut: int) -> None:
    async def main() -> None:
        pair = Relayed(inbound=True, guarded=True)
        pair.up.peer_sends(b"220 hello\r\n")
        octets = blanks + REQUEST
        if cut:
            pair.down.peer_sends(octets[:cut])
        pair.down.peer_sends(octets[cut:])
        await turns()
        assert pair.down.was_reset
        assert pair.up.was_reset
        assert b"x-forwarded" not in pair.up.take_sent()
        assert pair.world.recorder.connections[0][0] is Reason.PROTOCOL_MISMATCH
        assert not pair.world.services.live

    play(main)


@pytest.mark.parametrize("cut", [0, 3, 16, 23])
def test_a_guarded_relay_ends_before_a_field_of_http2_has_passed(cut: int) -> None:
    async def main() -> None:
        pair = Relayed(inbound=True, guarded=True)
        octets = PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"HEADERS"
        if cut:
            pair.down.peer_sends(octets[:cut])
        pair.down.peer_sends(octets[cut:])
        await turns()
        assert pair.down.was_reset and pair.up.was_reset
        assert b"HEADERS" not in pair.up.take_sent()
        assert pair.world.recorder.connections[0][0] is Reason.PROTOCOL_MISMATCH

    play(main)


def test_a_guarded_relay_holds_nothing_back_and_looks_at_the_beginning_only() -> None:
    async def main() -> None:
        pair = Relayed(inbound=True, guarded=True)
        await turns()
        for piece in (b"U", b"SER a", b"nna\r\n", REQUEST):
            pair.down.peer_sends(piece)
            assert pair.up.take_sent() == piece
        pair.up.peer_sends(REQUEST)
        assert pair.down.take_sent() == REQUEST
        free = Relayed(inbound=True)
        await turns()
        free.down.peer_sends(REQUEST)
        assert free.up.take_sent() == REQUEST

    play(main)


def test_the_last_octets_reach_a_slow_reader() -> None:
    async def main() -> None:
        pair = Relayed()
        pair.down.peer_stalls()
        pair.up.peer_sends(b"last words")
        pair.up.peer_ends()
        pair.down.peer_ends()
        await turns()
        assert not pair.down.take_sent()
        pair.down.peer_reads()
        await turns()
        assert pair.down.take_sent() == b"last words"
        assert pair.down.sent_eof
        pair.over(Reason.OK, (0, 10))

    play(main)


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_torn_connection_is_torn_on_the_other_side(side: str) -> None:
    async def main() -> None:
        pair = Relayed()
        mine, other = (pair.down, pair.up) if side == "down" else (pair.up, pair.down)
        mine.peer_sends(b"half")
        mine.peer_resets()
        await turns()
        assert other.was_reset
        reason = Reason.DOWNSTREAM_CLOSED if side == "down" else Reason.UPSTREAM_CLOSED
        pair.over(reason, (4, 0) if side == "down" else (0, 4))

    play(main)


def test_a_reset_after_one_end_is_no_clean_end() -> None:
    async def main() -> None:
        pair = Relayed()
        pair.down.peer_ends()
        pair.up.peer_sends(b"half")
        pair.up.peer_resets()
        await turns()
        assert pair.down.was_reset
        pair.over(Reason.UPSTREAM_CLOSED, (0, 4))

    play(main)


@pytest.mark.parametrize("side", ["down", "up"])
def test_backpressure(side: str) -> None:
    async def main() -> None:
        pair = Relayed()
        reader, writer = (pair.down, pair.up) if side == "down" else (pair.up, pair.down)
        await turns()
        reader.peer_stalls()
        sent = 0
        while not writer.paused:
            writer.peer_sends(bytes(300))
            sent += 300
        assert reader.buffered() <= HIGH_WATER + 300
        assert not reader.paused
        reader.peer_reads()
        await turns()
        assert not writer.paused
        assert len(reader.take_sent()) == sent

    play(main)


def test_idle_timeout_counts_from_the_last_octet() -> None:
    async def main() -> None:
        pair = Relayed()
        timeout_s = pair.world.mesh.tcp_idle_timeout_s
        pair.world.check(1.0)
        pair.world.check(timeout_s - 1)
        pair.down.peer_sends(b"x")
        await turns()
        pair.world.check(2.0)
        pair.world.check(timeout_s - 1)
        assert not pair.down.closing
        pair.world.check(1.0)
        assert pair.down.was_reset
        assert pair.up.was_reset
        await turns()
        pair.over(Reason.IDLE_TIMEOUT, (1, 0))

    play(main)


def test_a_policy_that_denies_it_ends_it() -> None:
    async def main() -> None:
        for mode, inbound in (("STRICT", False), ("PERMISSIVE", True)):
            pair = Relayed(inbound)
            pair.world.tables.put(dataclasses.replace(pair.world.shard, mtls=mode))
            pair.world.check(0.5)
            assert not pair.down.closing
        pair = Relayed(inbound=True)
        pair.world.tables.put(dataclasses.replace(pair.world.shard, mtls="STRICT"))
        pair.world.check(0.5)
        await turns()
        pair.over(Reason.MTLS_REQUIRED, (0, 0))

    play(main)


def test_drain_waits_and_abort_does_not() -> None:
    async def main() -> None:
        pair = Relayed()
        pair.relay.drain()
        await turns()
        assert not pair.down.closing
        pair.relay.abort()
        pair.relay.abort()
        await turns()
        pair.over(Reason.DRAINING, (0, 0))

    play(main)


def test_a_stream_that_was_lost_before_the_relay_began() -> None:
    async def main() -> None:
        world = World()
        down, up = FakeStream(), FakeStream()
        down.peer_resets()
        await turns()
        state = world.port.endpoints[0]
        state.outstanding += 1
        choice = Choice(WEB, state, "", 0.0)
        TcpRelay(down, up, world.services, facts=world.facts(), choice=choice, parties=PARTIES, security="none")
        await turns()
        assert up.was_reset
        assert state.outstanding == 0
        assert not world.services.live

    play(main)
