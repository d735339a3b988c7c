"""Load on a ``witness`` server from inside a pod: what became of every single request.

`Load` is the test's side. The client itself is this file run as a program: ``fresh`` threads make a connection per
request, ``kept`` threads use one for as long as it lasts, and behave as clients should: a connection that its peer
closed while it was idle is opened again, and a request that was answered with nothing at all on a connection which
served others before is sent once more (RFC 9110 section 9.2.2); ``torn`` counts those.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

if __name__ != "__main__":  # the program needs nothing but the standard library
    from examples.agent import Agent
    from examples.stage import Pod, wait_for
    from redirect.bpf.bpffs import BPFFS, nodes
    from redirect.bpf.layout import Flag, Workload
    from redirect.bpf.pins import place_of
    from redirect.netns import netns_cookie, open_netns
    from tests.e2e.mesh import Mesh


VIP = "240.240.0.10"


class Scene:
    """A client on the first node, and a `witness` server behind a Service on the second. Agents are not started.

    `client` and `server` are more fields of their Workloads, or None: that one is not attached.
    """

    def __init__(
        self, mesh: Mesh, *, client: dict[str, Any] | None = {}, server: dict[str, Any] | None = {}  # noqa: B006
    ) -> None:  # fmt: skip
        self.mesh = mesh
        self.client = mesh.pod("client-1", 0, app="client", attach=client is not None, **client or {})
        self.server = mesh.pod("web-1", len(mesh.nodes) - 1, app="web", attach=server is not None, **server or {})
        mesh.put(mesh.service("web", {"app": "web"}, [VIP]))
        self.journal = mesh.stage.folder / "witness.log"
        mesh.serve(self.server, "witness", "8080", str(self.journal))

    @property
    def agent(self) -> Agent:
        """Of the client's node."""
        return self.mesh.agents[0]

    def to_service(self, **threads: int) -> Load:
        return Load(self.client, VIP, 80, **threads)

    def to_pod(self, **threads: int) -> Load:
        return Load(self.client, self.server.ip, 8080, **threads)

    def served(self) -> int:
        """Requests that reached the server."""
        return self.journal.read_text().count("\n") if self.journal.exists() else 0

    def holding(self, name: str) -> bool:
        """The server answers ``/hold/<name>`` right now; it goes on when that file exists."""
        return f"/hold/{name}\n" in self.journal.read_text()

    def go_on(self, name: str) -> None:
        (self.journal.parent / name).touch()


def ruleset(pod: Pod) -> str:
    """With handles: not a single rule was replaced if it is the same as before."""
    return pod.run("nft", "-a", "list", "ruleset").stdout


def rules(pod: Pod) -> list[str]:
    """Tables of nftables."""
    return re.findall(r"^table inet (\S+)", pod.run("nft", "list", "ruleset").stdout, re.MULTILINE)


def tables(pod: Pod) -> list[str]:
    """What steers it: of nftables, or the nodes that have an entry of eBPF, which stays there without an agent."""
    return rules(pod) + entries(pod)


def entries(pod: Pod) -> list[str]:
    """Nodes whose hooks do something about the namespace, by another tool than ours."""
    fd = open_netns(pod.path)
    try:
        cookie = netns_cookie(fd)
    finally:
        os.close(fd)
    found = []
    for node in nodes():
        place = str(place_of(node, BPFFS) / "map_pods")
        shown = subprocess.run(["bpftool", "-j", "map", "dump", "pinned", place], capture_output=True, check=False)
        for entry in json.loads(shown.stdout) if shown.returncode == 0 else []:
            key, value = (bytes(int(octet, 16) for octet in entry[part]) for part in ("key", "value"))
            flags = Workload.from_buffer_copy(value).flags
            if int.from_bytes(key, sys.byteorder) == cookie and flags & (Flag.OUTBOUND | Flag.INBOUND):
                found.append(node)
    return found


def vip_routes(pod: Pod) -> list[str]:
    return [line for line in pod.run("ip", "route", "show", "table", "all").stdout.splitlines() if "240.240" in line]


def listeners(pod: Pod) -> list[int]:
    """Our ports that are listened on, one entry per socket."""
    found = pod.run("ss", "-Hltn").stdout
    return [int(port) for port in re.findall(r":(15001|15006)\s", found)]


@dataclass(frozen=True)
class Attempt:
    """Times are of CLOCK_MONOTONIC."""

    kind: str
    """``fresh`` or ``kept``."""
    thread: int
    port: int
    """Our end of the connection."""
    begin: float
    end: float
    error: str
    """Empty when it was answered, completely, with 200."""
    via: str
    """``mesh``: the client's proxy vouched for it; ``proxy``: some proxy was in between; ``direct``: none."""
    torn: int

    @property
    def ok(self) -> bool:
        return not self.error


class Load:
    """Use as a context manager; the client runs until `stop`, and `LIMIT_S` at most."""

    def __init__(self, pod: Pod, host: str, port: int = 80, *, fresh: int = 2, kept: int = 2) -> None:
        self._pod, self._host, self._port = pod, host, port
        self._threads = (fresh, kept)
        self.journal = pod.stage.folder / f"load-{pod.name}-{time.monotonic_ns()}.jsonl"
        self._process: Any = None

    def __enter__(self) -> Load:
        fresh, kept = self._threads
        self._process = self._pod.start(
            *(sys.executable, __file__, self._host, str(self._port), str(self.journal)),
            *("--fresh", str(fresh), "--kept", str(kept)),
            log=f"load-{self._pod.name}.log",
        )
        self.wait_ok(5 * sum(self._threads))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def attempts(self) -> list[Attempt]:
        """So far, in order of their end."""
        text = self.journal.read_text() if self.journal.exists() else ""
        return [Attempt(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]

    def failed(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts() if not attempt.ok]

    def wait_ok(self, n: int, *, since: float = 0.0, via: tuple[str, ...] = ("mesh", "proxy", "direct")) -> None:
        """`n` more good answers to requests that began after `since` (default: now)."""
        since = since or time.monotonic()
        self.wait(
            lambda found: sum(a.ok and a.begin >= since and a.via in via for a in found) >= n, f"{n} answers by {via}"
        )

    def wait(self, condition: Callable[[list[Attempt]], Any], what: str, timeout: float = 40.0) -> Any:
        try:
            return wait_for(lambda: condition(self.attempts()), what, timeout)
        except TimeoutError as exc:
            last = "\n".join(map(str, self.attempts()[-10:]))
            raise TimeoutError(f"{exc}; the last ones were\n{last}") from None

    def stop(self) -> list[Attempt]:
        """Let every request end. All attempts."""
        if self._process is not None:
            process, self._process = self._process, None
            assert self._pod.stage.stop(process) == 0, "the load client failed, see its log"
        return self.attempts()


# -- the program ---------------------------------------------------------------------------------------------

LIMIT_S = 90.0
_TIMEOUT_S = 6.0
_PAUSE_S = {"fresh": 0.03, "kept": 0.06}
stopping = threading.Event()


class Silent(Exception):
    """The connection ended before a single octet of the answer."""


class Client:
    def __init__(self, kind: str, thread: int, where: tuple[str, int]) -> None:
        self.kind, self.thread, self.where = kind, thread, where
        self.sock: socket.socket | None = None
        self.port = 0
        self.served = 0

    def run(self, journal: int) -> None:
        while not stopping.is_set():
            begin = time.monotonic()
            error = via = ""
            torn = 0
            try:
                try:
                    via = self.request()
                except (Silent, ConnectionResetError, BrokenPipeError):
                    if self.kind == "fresh" or not self.served:
                        raise
                    torn = 1
                    self.close()
                    via = self.request()
            except (OSError, ValueError, Silent) as exc:
                error = f"{type(exc).__name__}: {exc}"
                self.close()
            attempt = Attempt(self.kind, self.thread, self.port, begin, time.monotonic(), error, via, torn)
            os.write(journal, json.dumps(attempt.__dict__).encode() + b"\n")
            if self.kind == "fresh":
                self.close()
            stopping.wait(_PAUSE_S[self.kind])
        self.close()

    def request(self) -> str:
        if self.sock is not None and select.select([self.sock], [], [], 0)[0]:
            self.close()  # idle, and it has something to say: the end
        if self.sock is None:
            self.served = 0
            self.sock = socket.create_connection(self.where, _TIMEOUT_S)
            self.port = self.sock.getsockname()[1]
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(f"GET /{self.kind}/{self.thread} HTTP/1.1\r\nhost: witness\r\n\r\n".encode())
        data = bytearray()
        while b"\r\n\r\n" not in data:
            self.more(data)
        head, _, _ = bytes(data).partition(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:])
        size = len(head) + 4 + int(fields["content-length"])
        while len(data) < size:
            self.more(data)
        if not lines[0].startswith("http/1.1 200 "):
            raise ValueError(bytes(data)[:500].decode("latin-1"))
        told = json.loads(data[len(head) + 4 :])
        direct = told["peer"] == list(self.sock.getsockname()[:2])
        self.served += 1
        if fields.get("connection") == "close":
            self.close()
        return "mesh" if told["meshed"] else "direct" if direct else "proxy"

    def more(self, data: bytearray) -> None:
        assert self.sock is not None
        received = self.sock.recv(65536)
        if not received:
            raise ValueError("cut short") if data else Silent("closed without an answer")
        data += received

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--fresh", type=int)
    parser.add_argument("--kept", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    journal = os.open(options.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    threads = []
    for kind, count in (("fresh", options.fresh), ("kept", options.kept)):
        for number in range(count):
            client = Client(kind, number, (options.host, options.port))
            threads.append(threading.Thread(target=client.run, args=(journal,)))
    for thread in threads:
        thread.start()
    stopping.wait(LIMIT_S)
    stopping.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
