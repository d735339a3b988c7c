"""The systems under test: how each is configured, started, found ready, counted and stopped.

Where they stand. Each system has a place of its own: a node (a network namespace with a bridge), a pod with the client
in it and a pod with the origin. netproxy stands as in production: the client dials a Service, its connection is
redirected to the worker's listener on the pod's loopback, and the worker dials the origin from within the pod. A peer
stands like a sidecar: it listens on the loopback of the client's pod and dials the origin from there. So a request
crosses one loopback and one veth pair with every one of them; what netproxy has on top is the redirect and its
connection tracking, which are part of what it costs. Questions with TLS between proxies ("both legs") put a second
instance of the peer into the origin's pod; netproxy's one agent does both legs there.

What they are asked to do is the same: four rules, by header and by path, two endpoints of which the less busy of two
random ones is taken, x-forwarded-for and a new x-request-id in each request, no access log. HTTP/2 from the client
(shape h2) goes on in HTTP/1.1, gRPC (shape grpc) in HTTP/2, with all of them. Exceptions: Envoy makes fields of its
own; nghttpx takes endpoints in turn, knows no rules by header and makes no x-request-id. Fields for tracing
(traceparent) are not asked of the peers, who can't all make them without a collector or a further module; like
x-forwarded-proto and metrics for each pair of workloads, they are part of what netproxy costs.

What is counted is all processes of a system: of netproxy supervisor, brain and workers, of nginx master and workers.
Client and origin are not, except for the system `origin`, which is the origin with no proxy before it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench import _proc
from bench._certificates import NAME, make_certificates
from examples.agent import Agent
from examples.stage import Node, Pod, Stage, wait_for

CONFIGS = Path(__file__).with_name("configs")
VIP = "240.240.0.10"
PORT = 8000
"""Of a peer, on the loopback of the client's pod."""
TLS_PORT = 15443
"""Of a peer's second instance, in the origin's pod."""
HEADERS = 32
PAYLOAD = 64
READY_S = 20.0


class Absent(Exception):
    """A system that can't take part, and why. The others go on."""


class System(Protocol):
    name: str

    @property
    def client(self) -> Pod:
        """Where the driver runs."""

    @property
    def url(self) -> str:
        """What the driver asks there; paths are the origin's."""

    def start(self) -> None:
        """Ready when it returns. Raises Absent."""

    def pids(self) -> list[int]:
        """Of all of its processes."""

    def stop(self) -> None:
        """Nothing of it is left then. Also when it never started."""


@dataclass
class Place:
    """Where one system stands. `shape`: what it is configured for, see `configs/`."""

    stage: Stage
    node: Node
    name: str
    shape: str
    workers: int
    client: Pod
    server: Pod
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def second(self) -> str:
        """The other address of the origin: there are two endpoints to balance over."""
        return self.server.ip.rpartition(".")[0] + ".200"

    def values(self) -> dict[str, object]:
        """What stands between @ in configurations."""
        return {
            "folder": self.folder,
            "certificates": self.stage.folder,
            "name": NAME,
            "workers": self.workers,
            "port": PORT,
            "tls_port": TLS_PORT,
            "origin_1": self.server.ip,
            "origin_2": self.second,
            "vip": VIP,
            "node": self.node.netns,
            "client_ip": self.client.ip,
            "client_netns": self.client.path,
            "server_netns": self.server.path,
            "resumption": "true" if self.name == "netproxy-resuming" else "false",
            "app_protocol": "kubernetes.io/h2c" if self.shape == "grpc" else "http",
            "mesh_http": "http1" if self.name == "netproxy-http1" else "auto",
            "payload": "x" * PAYLOAD,
            "answer_headers": " ".join(f"add_header x-answer-{n:02} value-{n:02};" for n in range(HEADERS)),
        }

    def render(self, template: str) -> Path:
        path = self.folder / template
        path.write_text(render((CONFIGS / template).read_text(), self.values(), template))
        return path

    def launch(self, pod: Pod, *command: str) -> subprocess.Popen[bytes]:
        process = pod.start(*command, log=self.log.name)
        self.processes.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.stage.folder / f"{self.name}-{self.shape}{self.workers}.log"

    def wait_answer(self, pod: Pod, url: str, *options: str) -> None:
        """Until curl gets a 200 in `pod`. Raises Absent when a process of the place ended instead, or time is up."""
        curl = ("curl", "-sf", "-o", "/dev/null", "-m", "2", *options, url)

        def answered() -> bool:
            for process in self.processes:
                if process.poll() is not None:
                    raise Absent(f"ended with code {process.returncode}: {self.tail()}")
            return pod.run(*curl, check=False).returncode == 0

        try:
            wait_for(answered, f"an answer from {url}", READY_S)
        except TimeoutError as exc:
            raise Absent(f"{exc}: {self.tail()}") from None

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return " | ".join(line.strip() for line in lines[-6:] if line.strip())[-600:] or "it said nothing"

    def end(self) -> None:
        """All processes of the place, and whatever is left of their groups."""
        processes, self.processes = self.processes, []
        for process in reversed(processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stage.stop(process, timeout=5.0)
            # Started as the leader of a group: workers of a master that was killed are still in it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def render(template: str, values: dict[str, object], name: str = "") -> str:
    """Put values for ``@word@``. Raises KeyError when there is none: a typo must not become a configuration."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise KeyError(f"{name}: no value for @{match[1]}@")
        return str(values[match[1]])

    return re.sub(r"@([a-z_0-9]+)@", value, template)


def make_place(stage: Stage, node: Node, name: str, shape: str, workers: int) -> Place:
    """With its origin, that answers already."""
    label = f"{name}-{shape}{workers}"
    folder = stage.folder / f"{label}.d"
    folder.mkdir()
    client, server = stage.add_pod(f"{label}-c", node), stage.add_pod(f"{label}-s", node)
    place = Place(stage, node, name, shape, workers, client, server, folder)
    server.run("ip", "address", "add", f"{place.second}/24", "dev", "eth0")
    if not (stage.folder / "ca.pem").exists():
        make_certificates(stage.folder)
    www = stage.folder / "www" / "api"
    if not www.exists():
        www.mkdir(parents=True)
        (www / "64k").write_bytes(b"x" * 65536)
        (www / "1m").write_bytes(b"x" * 2**20)
        # One gRPC message: not compressed, its length, itself. The path is that of a method.
        (www / "bench.Echo").mkdir()
        (www / "bench.Echo" / "Unary").write_bytes(b"\0\0\0\0" + bytes([PAYLOAD]) + b"x" * PAYLOAD)
    if shape == "grpc":
        # nginx can't send trailers of its own.
        origin = ["nghttpd", "--no-tls", "-n1", "-d", str(www), "--trailer=grpc-status: 0", "8080"]
        place.launch(server, *origin)
        place.wait_answer(client, f"http://{server.ip}:8080/bench.Echo/Unary", "--http2-prior-knowledge")
    else:
        place.launch(server, "nginx", "-p", str(folder), "-c", str(place.render("origin.conf")))
        place.wait_answer(client, f"http://{server.ip}:8080/api/small")
    return place


# -- systems ------------------------------------------------------------------------------------------------------


@dataclass
class Origin:
    """No proxy at all: what is left of every other figure is theirs."""

    place: Place
    name: str = "origin"

    @property
    def client(self) -> Pod:
        return self.place.client

    @property
    def url(self) -> str:
        return f"http://{self.place.server.ip}:{8081 if self.place.shape == 'h2' else 8080}"

    def start(self) -> None:
        pass

    def pids(self) -> list[int]:
        return _proc.tree([self.place.processes[0].pid])

    def stop(self) -> None:
        self.place.end()


ANSWERS = {"grpc": ("/bench.Echo/Unary", "--http2-prior-knowledge"), "h2": ("/api/small", "--http2-prior-knowledge")}
"""By shape, where a proxy that is ready answers, and options of curl. Others as HTTP/1.1."""


@dataclass
class Netproxy:
    """A node agent. `engine`: of HTTP/1 and HTTP/2, by name: what was not compiled must not pass for what was."""

    place: Place
    name: str = "netproxy"
    engine: str = "native"
    agent: Agent | None = None

    @property
    def client(self) -> Pod:
        return self.place.client

    @property
    def url(self) -> str:
        return f"http://{VIP}" + (":81" if self.place.shape in ("tcp", "handshakes") else "")

    def start(self) -> None:
        place = self.place
        meshed = place.shape in ("mtls", "handshakes", "tls")
        config = place.render("netproxy-meshed.yaml" if meshed else "netproxy.yaml")
        self.agent = Agent(place.stage, place.node, config, workers=place.workers, drain_s=0.5)
        self.agent.start("--http1-engine", self.engine, "--http2-engine", self.engine)
        assert self.agent.process is not None
        place.processes.append(self.agent.process)
        try:
            wanted = ["shop/client", "shop/web"] if meshed else ["shop/client"]
            wait_for(lambda: self._is_steered(*wanted), "the agent to steer its workloads", READY_S)
        except TimeoutError as exc:
            raise Absent(f"{exc}: {self.agent.tail(6)}") from None
        try:
            path, *options = ANSWERS.get(place.shape, ("/api/small",))
            place.wait_answer(self.client, self.url + path, *options)
        except Absent as exc:
            raise Absent(f"{exc}; the agent: {self.agent.tail(6)}") from None

    def _is_steered(self, *workloads: str) -> bool:
        assert self.agent is not None and self.agent.process is not None
        if self.agent.process.poll() is not None:
            raise Absent(f"ended with code {self.agent.process.returncode}: {self.agent.tail(6)}")
        return self.agent.is_steered(*workloads)

    def pids(self) -> list[int]:
        assert self.agent is not None and self.agent.process is not None
        return _proc.tree([self.agent.process.pid])

    def stop(self) -> None:
        self.place.end()


@dataclass(frozen=True)
class Program:
    """What a peer is started with."""

    binary: Callable[[], str | None]
    command: Callable[[str, Place, Path], list[str]]
    """Of its path, place and configuration."""
    suffix: str
    version: tuple[str, ...]
    """Option that makes it tell its version."""


def _envoy() -> str | None:
    spec = importlib.util.find_spec("envoy")
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent / "_bin" / "envoy")


PROGRAMS = {
    "nginx": Program(
        lambda: shutil.which("nginx", path=_path()),
        lambda binary, place, file: [binary, "-p", str(place.folder), "-c", str(file)],
        "conf",
        ("-v",),
    ),
    "haproxy": Program(
        lambda: shutil.which("haproxy", path=_path()),
        lambda binary, place, file: [binary, "-db", "-f", str(file)],
        "cfg",
        ("-v",),
    ),
    "nghttpx": Program(
        lambda: shutil.which("nghttpx", path=_path()),
        lambda binary, place, file: [binary, "--conf", str(file), f"--workers={place.workers}"],
        "conf",
        ("--version",),
    ),
    "envoy": Program(
        _envoy,
        lambda binary, place, file: [
            binary, "--disable-hot-restart", "--concurrency", str(place.workers), "--log-level", "warning",
            "-c", str(file),
        ],
        "yaml",
        ("--version",),
    ),
}  # fmt: skip


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


@dataclass
class Peer:
    """A proxy like a sidecar in the client's pod; with TLS between proxies a second one in the origin's."""

    place: Place
    name: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def client(self) -> Pod:
        return self.place.client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{PORT}"

    def start(self) -> None:
        place, program = self.place, PROGRAMS[self.name]
        binary = program.binary()
        if binary is None:
            raise Absent("not installed: tools/setup bench")
        shape = place.shape
        stem = f"{self.name}-{shape}"
        if not (CONFIGS / f"{stem}.{program.suffix}").exists():
            raise Absent(f"has no configuration for {shape}")
        sides = [(f"{stem}.{program.suffix}", place.client)]
        if shape in ("mtls", "handshakes"):
            sides.insert(0, (f"{stem}-server.{program.suffix}", place.server))
        for template, pod in sides:
            command = program.command(binary, place, place.render(template))
            self.processes.append(place.launch(pod, *command))
        if shape == "tls":
            files = self.place.stage.folder
            options = ["--cacert", str(files / "ca.pem"), "--cert", str(files / "leaf.pem"), "--key"]
            options += [str(files / "leaf.key"), "--resolve", f"{NAME}:{TLS_PORT}:127.0.0.1"]
            place.wait_answer(self.client, f"https://{NAME}:{TLS_PORT}/api/small", *options)
        else:
            path, *options = ANSWERS.get(shape, ("/api/small",))
            place.wait_answer(self.client, self.url + path, *options)

    def pids(self) -> list[int]:
        return _proc.tree(process.pid for process in self.processes)

    def stop(self) -> None:
        self.place.end()


def make_system(name: str, place: Place) -> System:
    """Not started yet."""
    if name == "origin":
        return Origin(place)
    if name in ("netproxy", "netproxy-http1", "netproxy-resuming"):
        return Netproxy(place, name)
    if name == "netproxy-reference":
        return Netproxy(place, name, "reference")
    return Peer(place, name)


NAMES = ("origin", "netproxy", "netproxy-http1", "netproxy-resuming", "netproxy-reference", *PROGRAMS)


def version(name: str) -> str:
    """Of a peer's program, as it says itself; "" when it is not there."""
    program = PROGRAMS[name]
    binary = program.binary()
    if binary is None:
        return ""
    done: Any = subprocess.run([binary, *program.version], capture_output=True, text=True, check=False)
    return first_version(done.stdout + done.stderr)


def first_version(text: str) -> str:
    """The first number with two points in it."""
    found = re.search(r"\d+\.\d+\.\d+[\w.+~-]*", text)
    return found[0].rstrip(".") if found else ""
