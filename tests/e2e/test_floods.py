"""Floods and bombs of HTTP/2 against a whole agent: that connection ends or is bounded, others' requests go on.

``-s`` prints what each cost: resident memory of the worker, its CPU time, octets that it took.
"""

from __future__ import annotations

import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.stage import wait_for
from netproxy.codec.h2 import PREFACE
from netproxy.codec.h2_strict import Frame
from tests.e2e.mesh import HttpClient, Mesh, dial
from tests.unit.codec.h2_frames import block, continuation, data, frame, headers, ping, rst, settings, window

WEB = "240.240.0.91"
MIB = 1024 * 1024
MOST_SENT = 64 * MIB
"""A flood that may go on so long is not stopped."""
MOST_GROWTH_MIB = 24
"""Of the worker, whose allocator keeps some of what was freed."""
MANY_WINDOWS_MIB = 2 * 100 * 256 / 1024 + 24
"""Connections, `http2MaxStreams`, KiB of `bufferBytes`: what may be held for each answer."""
BEGIN = PREFACE + settings()
FIELDS = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"web"), (b":path", b"/")]
SLOW = [*FIELDS[:3], (b":path", b"/hang")]
LARGE = [*FIELDS[:3], (b":path", b"/octets/1000000")]


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client, self.other = mesh.pod("client"), mesh.pod("other")
        self.web = mesh.pod("web", 1)
        port = {"name": "http", "port": 80, "targetPort": 8080}
        mesh.put(mesh.service("web", {"app": "web"}, [WEB], [port]))
        mesh.serve(self.web, "origin", "8080", "/dev/null", "web", "quiet")

    @property
    def worker(self) -> int:
        (pid,) = self.mesh.agents[0].pids("worker")
        return pid

    def rss_mib(self) -> float:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.worker}/status").read_text())
        assert found
        return int(found[1]) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"fl{os.getpid() % 100000}", tmp_path_factory.mktemp("floods")) as mesh:
        made = Lab(mesh)
        mesh.start()
        with HttpClient(made.other, WEB) as other:
            for _ in range(200):
                assert other.get("/").status == 200
        yield made


class Flood:
    """A connection that only sends: `pieces` until the agent ends it. What comes is read and dropped (its end kept)."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.sock = dial(lab.client, WEB, 80)
        self.sock.setblocking(False)
        self.sent = 0
        self.end = b""
        self.is_over = False
        self.most_mib = 0.0

    def read(self) -> None:
        try:
            while came := self.sock.recv(65536):
                self.end = (self.end + came)[-4096:]
            self.is_over = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_over = True

    def send(self, octets: bytes) -> None:
        view = memoryview(octets)
        while view and not self.is_over:
            select.select([self.sock], [self.sock], [], 20)
            self.read()
            try:
                n = self.sock.send(view)
            except BlockingIOError:
                continue
            except OSError:
                self.is_over = True
                return
            self.sent += n
            view = view[n:]


def streams(make: Callable[[int], bytes], at_once: int = 100) -> Iterator[bytes]:
    for first in range(1, 2**31, 2 * at_once):
        yield b"".join(make(number) for number in range(first, first + 2 * at_once, 2))


def again(octets: bytes) -> Iterator[bytes]:
    while True:
        yield octets


def after(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def hpack_bomb() -> Iterator[bytes]:
    """One field of 4,000 octets in the dynamic table, named by one octet again and again."""
    name, value = b"x-a", b"v" * 3900
    size = b"\x7f" + bytes(((3900 - 127) & 127 | 128, (3900 - 127) >> 7))
    literal = b"\x40" + bytes((len(name),)) + name + size + value
    yield headers(1, block(FIELDS) + literal, end=True)
    for number in range(3, 2**31, 2):
        yield headers(number, block(FIELDS) + b"\xbe" * 16000, end=True)


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "rapid reset": lambda: streams(lambda number: headers(number, SLOW, end=True) + rst(number)),
    "reset by a broken rule": lambda: streams(lambda number: headers(number, SLOW) + window(number, 0)),
    "CONTINUATION": lambda: after(
        headers(1, block(FIELDS), whole=False), again(continuation(1, block([(b"x-a", b"b" * 100)]), whole=False))
    ),
    "empty CONTINUATION": lambda: after(
        headers(1, block(FIELDS), whole=False), again(continuation(1, b"", whole=False) * 500)
    ),
    "SETTINGS": lambda: again(settings((3, 100)) * 500),
    "PING": lambda: again(ping() * 500),
    "PRIORITY": lambda: again(frame(Frame.PRIORITY, 0, 1, bytes(5)) * 500),
    "WINDOW_UPDATE": lambda: again(window(0, 1) * 500),
    "empty DATA": lambda: after(headers(1, [(b":method", b"POST"), *SLOW[1:]]), again(data(1) * 500)),
    "HPACK bomb": hpack_bomb,
    "header list over the limit": lambda: streams(
        lambda number: (
            headers(number, [*FIELDS, *[(b"x-%d" % at, b"v" * 1000) for at in range(15)]], whole=False)
            + b"".join(continuation(number, block([(b"y-%d" % at, b"v" * 15000)]), whole=at == 4) for at in range(5))
        ),
        at_once=1,
    ),
}
BOUNDED = {"header list over the limit"}
"""It may go on: each of its requests is refused."""


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_and_others_go_on(lab: Lab, name: str) -> None:
    before, cpu, began = lab.rss_mib(), lab.cpu_s(), time.monotonic()
    flood = Flood(lab)
    most, asked = before, 0
    with HttpClient(lab.other, WEB) as other:
        flood.send(BEGIN)
        for octets in FLOODS[name]():
            flood.send(octets)
            if flood.is_over or flood.sent > (8 * MIB if name in BOUNDED else MOST_SENT):
                break
            if asked < 5 or asked < flood.sent // (256 * 1024):
                asked += 1
                assert other.get("/").status == 200
                most = max(most, lab.rss_mib())
        took = time.monotonic() - began
        assert other.get("/").status == 200
    most = max(most, lab.rss_mib())
    flood.read()
    flood.sock.close()
    print(
        f"\n{name}: {'ended' if flood.is_over else 'bounded'} after {flood.sent / 1024:.0f} KiB in {took:.2f} s,"
        f" CPU {lab.cpu_s() - cpu:.2f} s, RSS {before:.1f} -> {most:.1f} MiB, {asked + 1} requests of others;"
        f" last words {flood.end[-60:]!r}"
    )
    assert flood.is_over or name in BOUNDED
    assert most - before < MOST_GROWTH_MIB


def test_a_client_that_never_reads(lab: Lab) -> None:
    """Its windows are open, its socket is not read: requests and PINGs go on until the agent stops taking them."""
    before = lab.rss_mib()
    sock = dial(lab.client, WEB, 80)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    sent, most = 0, before
    out = PREFACE + settings((4, 2**31 - 1)) + window(0, 2**31 - 1 - 65535)
    numbers = iter(range(1, 2**31, 2))
    try:
        with HttpClient(lab.other, WEB) as other:
            for _ in range(400):
                try:
                    sent += sock.send(out)
                except BlockingIOError:
                    pass
                except OSError:
                    break
                out = headers(next(numbers), LARGE, end=True)
                assert other.get("/").status == 200
                most = max(most, lab.rss_mib())
    finally:
        sock.close()
    print(f"\nnever reads: {sent} octets taken, RSS {before:.1f} -> {most:.1f} MiB")
    assert most - before < MOST_GROWTH_MIB


class Heads:
    """Counts the heads that came on a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.octets = b""
        self.count = 0

    def read(self) -> None:
        came = self.sock.recv(65536)
        assert came, "the connection ended"
        self.octets += came
        while len(self.octets) >= 9 and len(self.octets) >= (end := 9 + int.from_bytes(self.octets[:3], "big")):
            assert self.octets[3] != Frame.DATA
            if self.octets[3] == Frame.HEADERS:
                assert self.octets[9] == 0x88, f"not :status 200 but {self.octets[9:end]!r}"
                self.count += 1
            self.octets = self.octets[end:]


def test_windows_that_are_never_opened(lab: Lab) -> None:
    """100 large answers for a client that takes none of them, on each of 2 connections. Twice costs no more."""
    before, cpu, most = lab.rss_mib(), lab.cpu_s(), 0.0
    for _ in range(2):
        most = max(most, ask_and_take_nothing(lab))
        wait_for(lambda: lab.mesh.agents[0].metric("netproxy_downstream_connections") == 0, "them to be gone", 20.0)
    print(f"\nshut windows: 2 x 2 x 100 answers, CPU {lab.cpu_s() - cpu:.2f} s, RSS {before:.1f} -> {most:.1f} MiB")
    assert most - before < MANY_WINDOWS_MIB


def ask_and_take_nothing(lab: Lab) -> float:
    """The most memory."""
    clients = [Heads(dial(lab.client, WEB, 80)) for _ in range(2)]
    try:
        for client in clients:
            asked = b"".join(headers(number, LARGE, end=True) for number in range(1, 200, 2))
            client.sock.sendall(PREFACE + settings((4, 0)) + asked)
        for client in clients:
            while client.count < 100:
                client.read()
        with HttpClient(lab.other, WEB) as other:
            most = lab.rss_mib()
            for _ in range(200):
                assert other.get("/").status == 200
                most = max(most, lab.rss_mib())
    finally:
        for client in clients:
            client.sock.close()
    return most
