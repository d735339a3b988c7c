from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import dns.message
import dns.rcode
import pytest

from netproxy.addr import WorkloadKey
from netproxy.dns.forward import _STRANGE, Forwarder, Sockets, is_answer
from netproxy.errors import Reason, UpstreamError
from netproxy.upstream.connect import SocketStock, StockKey
from tests.unit.dns.resolver import Counts, LoopbackSockets, Resolver, answers, forwarder, resolver
from tests.unit.dns.shards import CLIENT

QUERY = dns.message.make_query("Outside.Example", "A", id=7).to_wire()
HERE = "127.0.0.1"
NOBODY = "127.0.0.2"
"""Refuses: the resolver listens on one address only."""


def run(main: Callable[[Resolver, Forwarder, Counts], Awaitable[None]], **mesh: object) -> None:
    """No descriptor may be left."""

    async def guarded() -> None:
        counts = Counts()
        async with resolver() as there:
            made = forwarder(there.port, counts, **mesh)
            await main(there, made, counts)
            assert made.outstanding == 0

    with asyncio.Runner() as runner:
        runner.get_loop()
        gc.collect()  # what other tests left
        before = len(os.listdir("/proc/self/fd"))
        runner.run(guarded())
        assert len(os.listdir("/proc/self/fd")) == before


def text(wire: bytes) -> list[str]:
    return [rdata.to_text() for rrset in dns.message.from_wire(wire).answer for rdata in rrset]


@pytest.mark.parametrize(("stream", "wanted"), [(False, "192.0.2.1"), (True, "192.0.2.2")])
def test_the_answer_has_the_clients_id_and_the_query_another(stream: bool, wanted: str) -> None:
    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        for n in range(3):
            answer = await forward.ask(CLIENT, [HERE], QUERY, stream=stream)
            assert dns.message.from_wire(QUERY).is_response(dns.message.from_wire(answer))
            assert text(answer) == [wanted]
            assert there.asked[n].id == 1000 + n
            assert there.asked[n].question[0].name.labels[0] == b"Outside", "as the client spelled it"
        assert not counts

    run(main)


def test_only_an_answer_to_the_query_counts() -> None:
    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        def odd(wire: bytes) -> list[bytes]:
            (good,) = answers("192.0.2.9")(wire)
            other_id = bytes([good[0] ^ 1]) + good[1:]
            other_name = good.replace(b"Example", b"Elsewhe")
            other_type = good.replace(b"\x00\x00\x01\x00\x01\xc0", b"\x00\x00\x1c\x00\x01\xc0")
            assert len({good, other_id, other_name, other_type}) == 4
            no_response = good[:2] + b"\1\0" + good[4:]
            no_question = good[:4] + b"\0\0" + good[6:]
            return [b"x" * 11, other_id, other_name, other_type, no_response, no_question, wire, good.lower()]

        there.reply = odd
        answer = await forward.ask(CLIENT, [HERE], QUERY, stream=False)
        assert text(answer) == ["192.0.2.9"]
        assert counts == {"dns_mismatched": 7}
        there.reply = lambda wire: [b"x"] * (_STRANGE + 1)
        with pytest.raises(UpstreamError, match="no answer to the query"):
            await forward.ask(CLIENT, [HERE, HERE], QUERY, stream=False)
        there.by_tcp = lambda wire: [b"x"]
        with pytest.raises(UpstreamError, match="no answer to the query"):
            await forward.ask(CLIENT, [HERE], QUERY, stream=True)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_one_is_asked(stream: bool) -> None:
    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        assert text(await forward.ask(CLIENT, [NOBODY, HERE], QUERY, stream=stream))
        with pytest.raises(UpstreamError, match=f"{NOBODY}.*refused") as caught:
            await forward.ask(CLIENT, [NOBODY], QUERY, stream=stream)
        assert caught.value.reason is Reason.DNS_FAILED
        # One that fails gives way; if nobody knows better its word is passed on.
        asked = len(there.asked)
        there.reply = there.by_tcp = answers(rcode=dns.rcode.REFUSED)
        answer = await forward.ask(CLIENT, [HERE, NOBODY], QUERY, stream=stream)
        assert dns.message.from_wire(answer).rcode() == dns.rcode.REFUSED
        assert len(there.asked) == asked + 1
        # NXDOMAIN is an answer.
        there.reply = there.by_tcp = answers(rcode=dns.rcode.NXDOMAIN)
        answer = await forward.ask(CLIENT, [HERE, HERE], QUERY, stream=stream)
        assert dns.message.from_wire(answer).rcode() == dns.rcode.NXDOMAIN
        assert len(there.asked) == asked + 2
        assert not counts

    run(main)


def test_the_only_one_is_asked_twice() -> None:
    """A datagram may be lost."""

    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        loop = asyncio.get_running_loop()
        real, late_s = loop.time, [0.0]
        loop.time = lambda: real() + late_s[0]  # type: ignore[method-assign]

        def silent(wire: bytes) -> list[bytes]:
            late_s[0] += 2.1  # of 4 s, of which each try may take half
            return []

        there.reply = lambda wire: answers("192.0.2.1")(wire) if len(there.asked) > 1 else silent(wire)
        assert text(await forward.ask(CLIENT, [HERE], QUERY, stream=False)) == ["192.0.2.1"]
        assert counts == {"dns_timeouts": 1}
        there.reply = silent
        with pytest.raises(UpstreamError, match="in time"):
            await forward.ask(CLIENT, [HERE], QUERY, stream=False)
        assert counts == {"dns_timeouts": 3}

    run(main)


def test_a_connection_that_ends_within_the_answer() -> None:
    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        there.by_tcp = lambda wire: []
        with pytest.raises(UpstreamError, match="ended within"):
            await forward.ask(CLIENT, [HERE], QUERY, stream=True)

    run(main)


def test_who_waits_is_bounded() -> None:
    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        held: list[bytes] = []
        there.reply = lambda wire: held.append(wire) or []  # type: ignore[func-returns-value]
        tasks = [asyncio.create_task(forward.ask(CLIENT, [HERE], QUERY, stream=False)) for _ in range(3)]
        while len(held) < 2:
            await asyncio.sleep(0)
        assert forward.is_full(CLIENT) and not forward.is_full(WorkloadKey("shop/other"))
        with pytest.raises(UpstreamError) as caught:
            await tasks[2]
        assert caught.value.reason is Reason.OVERLOADED
        assert counts == {"dns_limit": 1}
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        assert not forward.is_full(CLIENT)

    run(main, dns_max_outstanding=4)


def test_without_a_resolver() -> None:
    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        with pytest.raises(UpstreamError, match="no resolver"):
            await forward.ask(CLIENT, [], QUERY, stream=False)

    run(main)


def test_no_socket_is_to_be_had() -> None:
    class Failing(LoopbackSockets):
        async def take(self, *arguments: Any) -> socket.socket:
            raise UpstreamError(Reason.CONNECT_FAILED, "no socket in the namespace")

    async def main(there: Resolver, forward: Forwarder, counts: Counts) -> None:
        forward._sockets = Failing()
        with pytest.raises(UpstreamError, match="no socket"):
            await forward.ask(CLIENT, [HERE], QUERY, stream=False)

    run(main)


def test_malformed_questions_match_nothing() -> None:
    good = QUERY
    response = bytes([*good[:2], good[2] | 0x80, *good[3:]])
    assert is_answer(response, good)
    assert is_answer(response[:12] + response[12:].lower(), good)
    for wrong in (response[:-1], response[:12] + b"\xc0\x0c\0\1\0\1", response[:12], response[:12] + b"\x3f"):
        assert not is_answer(wrong, good)
    update = bytes([*response[:2], response[2] | 0x28, *response[3:]])
    assert not is_answer(update, good)


# -- the fake passes the contract of what it stands for ------------------------------------------------------


def stock() -> SocketStock:
    def ask(key: StockKey, n: int) -> None:
        kind = socket.SOCK_DGRAM if key.kind == "dgram" else socket.SOCK_STREAM
        family = socket.AF_INET6 if key.family == 6 else socket.AF_INET
        fds = [socket.socket(family, kind | socket.SOCK_NONBLOCK).detach() for _ in range(n)]
        asyncio.get_running_loop().call_soon(made.deliver, key, fds, "")

    made = SocketStock(ask)
    return made


@pytest.mark.parametrize("make", [stock, LoopbackSockets])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", ["stream", "dgram"])
def test_sockets_are_fresh_and_do_not_block(make: Callable[[], Sockets], family: int, kind: Any) -> None:
    async def main() -> None:
        sockets = make()
        taken = [await sockets.take(CLIENT, family, kind) for _ in range(2)]
        assert taken[0].fileno() != taken[1].fileno()
        for sock in taken:
            assert sock.family == (socket.AF_INET6 if family == 6 else socket.AF_INET)
            assert sock.type & 0xF == (socket.SOCK_DGRAM if kind == "dgram" else socket.SOCK_STREAM)
            assert not os.get_blocking(sock.fileno())
            with pytest.raises(OSError):
                sock.getpeername()
            sock.close()
        if isinstance(sockets, SocketStock):
            sockets.drop(CLIENT)

    asyncio.run(main())
