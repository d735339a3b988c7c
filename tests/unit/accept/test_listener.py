from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from netproxy.accept.listener import Accepted, Listener, detect
from netproxy.accept.origdst import local_dst, original_dst
from netproxy.accept.sniff import PEEK, Protocol
from netproxy.addr import OriginalDst, WorkloadKey

from .hellos import client_hello, in_records

LONG_S = 20.0
"""Never waited for."""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    errors: list[object] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with asyncio.timeout(LONG_S):
            await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(guarded())
    assert not errors


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client, accepted)"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    accepted.setblocking(False)
    with client, accepted:
        yield client, accepted


Pair = tuple[socket.socket, socket.socket]


class Counted(socket.socket):
    """Counts how often it is looked at."""

    peeks = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.peeks += 1
        return super().recv(size, flags)


def counted(sock: socket.socket) -> Counted:
    return Counted(fileno=sock.detach())


async def peeked(sock: Counted, n: int) -> None:
    while sock.peeks < n:
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", Protocol.HTTP1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Protocol.HTTP2),
        (b"SSH-2.0-x\r\n", Protocol.OPAQUE),
        (client_hello("", ("netproxy/tcp",)), Protocol.MESH_TLS),
        (client_hello("web"), Protocol.TLS),
    ],
)
def test_at_once_and_nothing_is_consumed(pair: Pair, data: bytes, verdict: Protocol) -> None:
    client, sock = pair
    client.sendall(data)

    async def main() -> None:
        assert await detect(sock, LONG_S) is verdict
        assert sock.recv(len(data)) == data
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1

    run(main)


def test_octet_by_octet_one_wake_up_each(pair: Pair) -> None:
    client, sock = pair[0], counted(pair[1])
    data = b"PROPFIND /"

    async def main() -> None:
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await peeked(sock, 1)
        for number in range(len(data)):
            client.send(data[number : number + 1])
            await peeked(sock, number + 2)
        assert await task is Protocol.HTTP1
        assert sock.peeks == len(data) + 1
        assert sock.recv(PEEK) == data

    with sock:
        run(main)


@pytest.mark.parametrize("record", [1, 200])
def test_a_hello_octet_by_octet_is_not_looked_at_each_time(pair: Pair, record: int) -> None:
    """The kernel waits for what is missing at least."""
    client, sock = pair[0], counted(pair[1])
    data = in_records(client_hello("web", ("netproxy/tcp",)), record)

    async def main() -> None:
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await peeked(sock, 1)
        for number in range(len(data)):
            client.send(data[number : number + 1])
            await asyncio.sleep(0)
        assert await task is Protocol.MESH_TLS
        assert sock.peeks < 60
        assert sock.recv(PEEK) == data

    with sock:
        run(main)


def test_no_busy_loop_over_what_is_there_already(pair: Pair) -> None:
    client, sock = pair[0], counted(pair[1])

    async def main() -> None:
        client.send(b"GE")
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await peeked(sock, 1)
        if sock.peeks == 1:
            for _ in range(300):
                await asyncio.sleep(0)
        assert sock.peeks <= 2
        assert not task.done()
        client.send(b"T /")
        assert await task is Protocol.HTTP1

    with sock:
        run(main)


@pytest.mark.parametrize(
    ("octets", "verdict"),
    [
        (b"GE", Protocol.STALLED_HTTP),
        (b"\r\n", Protocol.STALLED_HTTP),
        (b"PRI * HT", Protocol.STALLED_HTTP),
        (b"\x16\x03\x01", Protocol.STALLED),
    ],
)
def test_silence_is_none_and_half_a_word_is_not(pair: Pair, octets: bytes, verdict: Protocol) -> None:
    client, sock = pair

    async def main() -> None:
        assert await detect(sock, 0.002) is None
        client.send(octets)
        while not select.select([sock], [], [], LONG_S)[0]:
            pass
        assert await detect(sock, 0.002) is verdict
        # The next owner is woken by the octets that are there.
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        assert await asyncio.get_running_loop().sock_recv(sock, 10) == octets

    run(main)


@pytest.mark.parametrize("data", [b"", b"GE", b"\x16\x03\x01\x02"])
def test_end_of_stream_is_opaque(pair: Pair, data: bytes) -> None:
    client, sock = pair[0], counted(pair[1])

    async def main() -> None:
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await peeked(sock, 1)
        if data:
            client.send(data)
            await peeked(sock, 2)
        client.shutdown(socket.SHUT_WR)
        assert await task is Protocol.OPAQUE

    with sock:
        run(main)


def test_woken_without_more() -> None:
    """As by a kernel that is short of memory for TCP: Unix sockets never wait for SO_RCVLOWAT."""
    client, plain = socket.socketpair()
    client.setblocking(False)
    plain.setblocking(False)
    sock = counted(plain)

    async def main() -> None:
        client.send(b"GE")
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await peeked(sock, 3)
        client.send(b"T / HTTP/1.1\r\n")
        assert await task is Protocol.HTTP1
        assert sock.peeks < 10
        assert not asyncio.get_running_loop().remove_reader(sock.fileno())

    with client, sock:
        run(main)


def test_the_end_is_seen_behind_octets_that_wake_without_more() -> None:
    client, plain = socket.socketpair()
    plain.setblocking(False)
    client.send(b"GE")
    client.shutdown(socket.SHUT_WR)

    async def main() -> None:
        assert await detect(plain, LONG_S) is Protocol.OPAQUE

    with client, plain:
        run(main)


def test_a_reset_is_an_error(pair: Pair) -> None:
    client, sock = pair

    async def main() -> None:
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await asyncio.sleep(0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with pytest.raises(ConnectionResetError):
            await task

    run(main)


def test_cancelled(pair: Pair) -> None:
    _, sock = pair

    async def main() -> None:
        task = asyncio.ensure_future(detect(sock, LONG_S))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not asyncio.get_running_loop().remove_reader(sock.fileno())

    run(main)


# --- the listener


def test_accepts_in_batches_and_closes() -> None:
    async def main() -> None:
        got: list[Accepted] = []
        sock = socket.create_server(("127.0.0.1", 0), backlog=128)
        address = sock.getsockname()
        clients = [socket.create_connection(address) for _ in range(100)]
        listener = Listener(sock, WorkloadKey("shop/web"), inbound=True, on_accept=got.append)
        listener.accept_queued()
        assert len(got) == 64
        while len(got) < 100:
            await asyncio.sleep(0)
        assert {accepted.client for accepted in got} == {client.getsockname() for client in clients}
        assert {accepted.dst for accepted in got} == {OriginalDst(*address)}
        assert all(accepted.workload == "shop/web" and accepted.inbound for accepted in got)
        assert all(not accepted.sock.getblocking() for accepted in got)
        listener.close()
        listener.close()
        listener.accept_queued()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        for one in (*clients, *(accepted.sock for accepted in got)):
            one.close()

    run(main)


def test_an_outbound_connection_to_the_listener_itself_has_no_destination() -> None:
    async def main() -> None:
        got: list[Accepted] = []
        sock = socket.create_server(("127.0.0.1", 0))
        with socket.create_connection(sock.getsockname()):
            listener = Listener(sock, WorkloadKey("shop/web"), inbound=False, on_accept=got.append)
            while not got:
                await asyncio.sleep(0)
            assert got[0].dst is None
            listener.close()
            got[0].sock.close()

    run(main)


# --- destinations


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_local_destination(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        with socket.create_connection((host, port)), server.accept()[0] as accepted:
            assert local_dst(accepted) == OriginalDst(host, port)
            assert original_dst(accepted) is None


def test_an_ipv4_client_of_an_ipv6_listener_has_an_ipv4_destination() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0] as accepted:
            assert local_dst(accepted) == OriginalDst("127.0.0.1", port)
            assert original_dst(accepted) is None


def test_a_closed_socket_has_no_local_destination() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(OSError):
        local_dst(sock)
