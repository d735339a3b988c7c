"""Many octets, all of them right, in bounded memory: from node a to node b through both agents."""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.mesh import HttpClient, Mesh, dial
from tests.e2e.servers.opaque import send_pattern
from tests.e2e.servers.origin import BLOCK

MIB = 1024 * 1024
GIB = 1024 * MIB
VIP = "240.240.0.10"
MOST_MIB = 400
"""Of any process of an agent, at any time."""
MOST_GROWTH_MIB = 200
"""By one of these tests. 200 connections may hold 256 KiB each way on each leg."""


class Memory:
    """Resident memory of all processes of all agents, in MiB."""

    def __init__(self, mesh: Mesh) -> None:
        self.names = {}
        for agent in mesh.agents:
            status = agent.status()
            self.names[status["supervisor_pid"]] = f"{agent.node.name} supervisor"
            self.names |= {p["pid"]: f"{agent.node.name} {p['role']} {p['slot']}" for p in status["processes"]}
        for pid in self.names:
            with open(f"/proc/{pid}/clear_refs", "w") as file:
                file.write("5")  # VmHWM starts again from VmRSS
        self.before = self.read("VmRSS")
        self.began = time.monotonic()

    def read(self, field: str) -> dict[int, float]:
        found = {}
        for pid in self.names:
            with open(f"/proc/{pid}/status") as file:
                found[pid] = next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024
        return found

    def check(self, what: str) -> None:
        """Raises FileNotFoundError when a process is gone."""
        after, peak = self.read("VmRSS"), self.read("VmHWM")
        print(f"\n{what}: {time.monotonic() - self.began:.1f} s")
        for pid, name in self.names.items():
            print(f"  {name:22} {self.before[pid]:6.1f} MiB before, {peak[pid]:6.1f} peak, {after[pid]:6.1f} after")
        for pid, name in self.names.items():
            assert peak[pid] < MOST_MIB, name
            assert peak[pid] - self.before[pid] < MOST_GROWTH_MIB, name


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(f"y{os.getpid() % 100000}", tmp_path_factory.mktemp("bytes")) as mesh:
        mesh.pod("client")
        server = mesh.pod("web", 1)
        ports = [
            {"name": "http", "port": 80, "targetPort": 8080},
            {"name": "tcp", "port": 9000, "targetPort": 9000},
        ]
        mesh.put(
            mesh.service("web", {"app": "web"}, [VIP], ports),
        )
        mesh.serve(server, "origin", "8080", str(mesh.stage.folder / "web.journal"), "web", "quiet")
        mesh.serve(server, "opaque", "9000", str(mesh.stage.folder / "tcp.journal"), "both", str(GIB), port=9000)
        mesh.start()
        yield mesh


def pattern_digest(size: int) -> str:
    digest = hashlib.sha256()
    for _ in range(size // len(BLOCK)):
        digest.update(BLOCK)
    digest.update(BLOCK[: size % len(BLOCK)])
    return digest.hexdigest()


def test_ten_thousand_requests_in_a_row(mesh: Mesh) -> None:
    memory = Memory(mesh)
    with HttpClient(mesh.stage.pods["client"], VIP) as client:
        for number in range(10_000):
            told = client.get(f"/{number}").json()
            assert told["target"] == f"/{number}"
    assert told["connection"] < 5  # kept all the way
    memory.check("10,000 requests on one connection")


class Download:
    """One answer, read and checked as it comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.digest, self.length, self.head = sock, hashlib.sha256(), 0, b""
        self.start = b""
        """Of the body; what it says when it is an error."""

    def receive(self) -> bool:
        """False: it has ended."""
        data = self.sock.recv(256 * 1024)
        if data and not self.head.endswith(b"\r\n\r\n"):
            head, end, data = (self.head + data).partition(b"\r\n\r\n")
            self.head = head + end
            if not end:
                return True
        elif not data:
            return False
        self.digest.update(data)
        self.length += len(data)
        self.start = self.start or data[:1000]
        return True


def test_two_hundred_downloads_at_once(mesh: Mesh) -> None:
    size, wanted = 10 * MIB, pattern_digest(10 * MIB)
    memory = Memory(mesh)
    with selectors.DefaultSelector() as selector:
        downloads = [Download(dial(mesh.stage.pods["client"], VIP, 80)) for _ in range(200)]
        try:
            for download in downloads:
                download.sock.sendall(f"GET /octets/{size} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n".encode())
                selector.register(download.sock, selectors.EVENT_READ, download)
            while selector.get_map():
                ready = selector.select(30.0)
                assert ready, "nothing came for 30 s"
                for key, _ in ready:
                    if not key.data.receive():
                        selector.unregister(key.fileobj)
        finally:
            for download in downloads:
                download.sock.close()
    for download in downloads:
        assert download.head.startswith(b"HTTP/1.1 200 "), download.head + download.start
        assert download.length == size
        assert download.digest.hexdigest() == wanted
    memory.check("200 downloads of 10 MiB at once")


def test_a_gibibyte_each_way(mesh: Mesh) -> None:
    """At the same time, on one opaque connection."""
    wanted = pattern_digest(GIB)
    memory = Memory(mesh)
    with dial(mesh.stage.pods["client"], VIP, 9000, timeout=60.0) as sock:

        def send() -> None:
            send_pattern(sock, GIB)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        digest, left = hashlib.sha256(), GIB
        while left and (data := sock.recv(min(left, 256 * 1024))):
            digest.update(data)
            left -= len(data)
        sender.join()
        said = b""
        while data := sock.recv(1000):
            said += data
    assert left == 0
    assert digest.hexdigest() == wanted
    assert said == f"{GIB} {wanted}\n".encode()
    memory.check("1 GiB of TCP each way")
