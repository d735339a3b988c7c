from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import dns.message
import dns.rcode
import pytest

from netproxy.dns import server
from netproxy.dns.server import MAX_PIPELINED, DnsServer
from tests.unit.dns.resolver import Counts, Resolver, answers, forwarder, resolver
from tests.unit.dns.shards import CLIENT, DUAL, small_mesh, workload


class Bench:
    def __init__(self, there: Resolver) -> None:
        self.there = there
        self.counts = Counts()
        self.names = small_mesh()
        self.names.put(workload(nameservers=("127.0.0.1",)))
        self.forwarder = forwarder(there.port, self.counts, dns_max_outstanding=200)
        self.server = DnsServer(self.names, self.forwarder, lambda _: DUAL, self.counts)
        self.stack = contextlib.ExitStack()

    def datagrams(self) -> socket.socket:
        """A client's socket, connected to one that is served."""
        ours = self.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        ours.bind(("127.0.0.1", 0))
        client = self.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        client.setblocking(False)
        client.connect(ours.getsockname())
        self.door = self.server.datagrams(ours, CLIENT)
        self.stack.callback(self.door.close)
        return client

    async def stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ours.setblocking(False)
        self.server.accept(ours, CLIENT)
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.stack.callback(lambda: writer.transport.abort())
        return reader, writer

    async def idle(self) -> None:
        while self.server.busy:
            await asyncio.sleep(0)


def run(main: Callable[[Bench], Awaitable[None]]) -> None:
    """Nothing may be left: no task, no descriptor."""
    errors: list[object] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with resolver() as there:
            bench = Bench(there)
            try:
                await main(bench)
            finally:
                bench.stack.close()
            bench.server.drop(CLIENT)
            await bench.idle()
            for _ in range(3):
                await asyncio.sleep(0)

    with asyncio.Runner() as runner:
        runner.get_loop()
        before = len(os.listdir("/proc/self/fd"))
        runner.run(guarded())
        assert len(os.listdir("/proc/self/fd")) == before
    assert not errors


def query(name: str, number: int = 7) -> bytes:
    return dns.message.make_query(name, "A", id=number, use_edns=0).to_wire()


def framed(*wires: bytes) -> bytes:
    return b"".join(struct.pack("!H", len(wire)) + wire for wire in wires)


async def message(reader: asyncio.StreamReader) -> dns.message.Message:
    return dns.message.from_wire(await reader.readexactly(struct.unpack("!H", await reader.readexactly(2))[0]))


async def received(sock: socket.socket) -> dns.message.Message:
    return dns.message.from_wire(await asyncio.get_running_loop().sock_recv(sock, 4096))


def text(found: dns.message.Message) -> list[str]:
    return [rdata.to_text() for rrset in found.answer for rdata in rrset]


# -- datagrams -----------------------------------------------------------------------------------------------


def test_datagrams() -> None:
    async def main(bench: Bench) -> None:
        client = bench.datagrams()
        client.send(query("web"))
        assert text(await received(client)) == ["240.240.0.1"]
        client.send(query("outside.example", 9))
        found = await received(client)
        assert (found.id, text(found)) == (9, ["192.0.2.1"])
        for wrong in (b"x", bytes([*query("web")[:2], 0x81, *query("web")[3:]])):
            client.send(wrong)
        client.send(query("web")[:-1])
        assert (await received(client)).rcode() == dns.rcode.FORMERR
        bench.names.drop("workload/shop/client")
        client.send(query("web"))
        while not bench.counts["dns_dropped unknown workload"]:
            await asyncio.sleep(0)
        assert bench.counts == {
            "dns_queries mesh/NOERROR": 1,
            "dns_queries mesh/FORMERR": 1,
            "dns_queries forwarded/NOERROR": 1,
            "dns_dropped short": 1,
            "dns_dropped response": 1,
            "dns_dropped unknown workload": 1,
        }

    run(main)


def test_answers_come_in_any_order() -> None:
    async def main(bench: Bench) -> None:
        held: list[bytes] = []
        bench.there.reply = lambda wire: held.append(wire) or []  # type: ignore[func-returns-value]
        client = bench.datagrams()
        client.send(query("outside.example", 1))
        while not held:
            await asyncio.sleep(0)
        client.send(query("web", 2))
        assert (await received(client)).id == 2

    run(main)


def test_a_resolver_that_fails_is_told_with_a_reason() -> None:
    async def main(bench: Bench) -> None:
        client = bench.datagrams()
        bench.names.put(workload(nameservers=()))
        client.send(query("outside.example"))
        found = await received(client)
        assert found.rcode() == dns.rcode.SERVFAIL
        assert "no resolver" in str(found.extended_errors()[0].text)
        assert bench.counts == {"dns_queries forwarded/SERVFAIL": 1}

    run(main)


def test_an_answer_that_comes_after_the_door_was_closed() -> None:
    async def main(bench: Bench) -> None:
        held: list[tuple[bytes, tuple[str, int]]] = []
        bench.there.datagram_received = lambda data, addr: held.append((data, addr))  # type: ignore[method-assign]
        client = bench.datagrams()
        client.send(query("outside.example"))
        while not held:
            await asyncio.sleep(0)
        bench.door.close()
        client.send(query("web"))  # not read any more
        (data, addr) = held[0]
        bench.there.transport.sendto(answers("192.0.2.4")(data)[0], addr)  # type: ignore[attr-defined]
        assert text(await received(client)) == ["192.0.2.4"]
        await bench.idle()
        assert "dns_queries mesh/NOERROR" not in bench.counts

    run(main)


def test_what_waits_in_the_queue_is_taken_at_the_end() -> None:
    async def main(bench: Bench) -> None:
        client = bench.datagrams()
        client.send(query("web"))
        bench.door.accept_queued()
        bench.door.close()
        bench.door.accept_queued()
        assert text(await received(client)) == ["240.240.0.1"]

    run(main)


def test_a_client_that_is_gone() -> None:
    async def main(bench: Bench) -> None:
        client = bench.datagrams()
        bench.door.answer(b"x", ("255.255.255.255", 9))
        assert bench.counts == {"dns_dropped send": 1}
        client.send(query("web"))
        assert text(await received(client))

    run(main)


# -- connections ---------------------------------------------------------------------------------------------


def test_pipelined_queries_and_half_a_close() -> None:
    async def main(bench: Bench) -> None:
        reader, writer = await bench.stream()
        names = ["web", "outside.example"] * (2 * MAX_PIPELINED)
        writer.write(framed(*(query(name, number) for number, name in enumerate(names))))
        writer.write_eof()
        found = {answer.id: text(answer) for answer in [await message(reader) for _ in names]}
        assert [found[number] for number in range(len(names))] == [["240.240.0.1"], ["192.0.2.2"]] * (2 * MAX_PIPELINED)
        assert await reader.read() == b""
        await bench.idle()

    run(main)


def test_octet_by_octet() -> None:
    async def main(bench: Bench) -> None:
        reader, writer = await bench.stream()
        for octet in framed(query("web")):
            writer.write(bytes([octet]))
            await asyncio.sleep(0)
        assert text(await message(reader)) == ["240.240.0.1"]

    run(main)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0",
        b"\0\5x",
        framed(b""),
        framed(b"x" * 11),
        framed(dns.message.make_response(dns.message.make_query("web", "A")).to_wire()),
    ],
)
def test_who_does_not_speak_dns_is_hung_up_on(sent: bytes) -> None:
    async def main(bench: Bench) -> None:
        reader, writer = await bench.stream()
        writer.write(sent)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await bench.idle()

    run(main)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(server, "IDLE_S", 0.001)
    yield


def test_who_asks_nothing_is_hung_up_on(impatient: None) -> None:
    async def main(bench: Bench) -> None:
        reader, writer = await bench.stream()
        writer.write(b"\0")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await bench.idle()

    run(main)


def test_who_waits_for_an_answer_is_not_idle(impatient: None) -> None:
    async def main(bench: Bench) -> None:
        gate = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.readexactly(struct.unpack("!H", await reader.readexactly(2))[0])
            await gate.wait()
            writer.write(framed(*answers("192.0.2.5")(data)))
            writer.close()

        other = await asyncio.start_server(serve, "127.0.0.1", 0)
        bench.forwarder.port = other.sockets[0].getsockname()[1]
        reader, writer = await bench.stream()
        writer.write(framed(query("outside.example")))
        reading = asyncio.create_task(message(reader))
        await asyncio.wait([reading], timeout=0.005)
        assert not reading.done()
        gate.set()
        assert text(await reading) == ["192.0.2.5"]
        other.close()
        await other.wait_closed()

    run(main)


def test_who_takes_no_answers_is_hung_up_on(impatient: None) -> None:
    async def main(bench: Bench) -> None:
        _, writer = await bench.stream()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(framed(query("web")) * 2000)
        await bench.idle()
        assert bench.counts["dns_queries mesh/NOERROR"] < 1000

    run(main)


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bench: Bench) -> None:
        monkeypatch.setattr(server, "MAX_STREAMS", 2)
        streams = [await bench.stream() for _ in range(3)]
        assert await streams[2][0].read() == b""
        assert bench.counts == {"dns_dropped connections": 1}
        streams[0][1].write_eof()
        assert await streams[0][0].read() == b""
        reader, writer = await bench.stream()
        writer.write(framed(query("web")))
        assert text(await message(reader)) == ["240.240.0.1"]

    run(main)


def test_drain_ends_the_idle_ones_and_answers_the_rest() -> None:
    async def main(bench: Bench) -> None:
        idle, _ = await bench.stream()
        await asyncio.sleep(0)
        bench.server.drain()
        assert await idle.read() == b""
        await bench.idle()

    run(main)


def test_a_workload_that_goes_before_anything_was_begun() -> None:
    async def main(bench: Bench) -> None:
        client = bench.datagrams()
        client.send(query("outside.example"))
        bench.door.accept_queued()
        reader, _ = await bench.stream()
        ours, theirs = socket.socketpair()
        bench.server.accept(ours, CLIENT)
        bench.door.close()
        bench.server.drop(CLIENT)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await bench.idle()
        assert theirs.recv(1) == b""
        theirs.close()
        assert not bench.server._streams

    run(main)


def test_a_workload_that_goes_leaves_nothing() -> None:
    async def main(bench: Bench) -> None:
        bench.there.reply = lambda wire: []
        client = bench.datagrams()
        client.send(query("outside.example"))
        reader, _ = await bench.stream()
        while not bench.there.asked:
            await asyncio.sleep(0)
        bench.door.close()
        bench.server.drop(CLIENT)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await bench.idle()
        assert bench.forwarder.outstanding == 0

    run(main)
