"""A whole mesh for one test: a stage, resources in files, an agent per node, servers and clients in pods."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from examples.agent import Agent
from examples.stage import Node, Pod, Stage, wait_for
from redirect.bpf import clean
from redirect.netns import inside, open_netns

NAMESPACE = "shop"
STEERING = os.environ.get("NETPROXY_TEST_STEERING", "")
"""By what the suite steers where a test does not say it; empty: by what `auto` chooses."""
_SERVERS = Path(__file__).parent / "servers"


class Mesh:
    """`families`: of the pods; `nodes`: 1 or 2; `workers` per agent; `steering`: of the MeshConfig that is put, unless
    empty. Nothing is started by itself.

    Resources are kept as one file each in `config`; `put` and `drop` change them, agents reload.
    """

    def __init__(
        self,
        prefix: str,
        folder: Path,
        *,
        families: Iterable[int] = (4,),
        nodes: int = 2,
        workers: int = 1,
        steering: str = STEERING,
    ) -> None:
        self.config = folder / "mesh"
        self.config.mkdir(parents=True)
        self.stage = Stage(prefix, folder, families, nodes)
        self.agents = [Agent(self.stage, node, self.config, workers=workers) for node in self.stage.nodes]
        self.objects: dict[str, dict[str, Any]] = {}
        if steering:
            self.put(self.mesh_config(steering=steering))

    @property
    def nodes(self) -> list[Node]:
        return self.stage.nodes

    def close(self) -> None:
        self.stage.close()
        for agent in self.agents:  # of one that was killed
            clean(agent.name)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- resources ----------------------------------------------------------------------------------

    def put(self, *objects: dict[str, Any]) -> None:
        """Write objects atomically, one file each; an object of the same kind and name is replaced."""
        for obj in objects:
            name = f"{obj['kind']}-{obj['metadata'].get('namespace', 'default')}-{obj['metadata']['name']}".lower()
            self.objects[name] = obj
            temporary = self.config / f".{name}.tmp"
            temporary.write_text(yaml.safe_dump(obj))
            temporary.rename(self.config / f"{name}.yaml")

    def drop(self, kind: str, name: str, namespace: str = NAMESPACE) -> None:
        file = f"{kind}-{namespace}-{name}".lower()
        del self.objects[file]
        (self.config / f"{file}.yaml").unlink()

    def pod(
        self, name: str, node: int = 0, *, app: str = "", version: str = "v1", families: Iterable[int] | None = None,
        attach: bool = True, **spec: Any,
    ) -> Pod:  # fmt: skip
        """A pod and its Workload (labels app and version, service account = app)."""
        pod = self.stage.add_pod(name, self.nodes[node], families)
        self.put(self.workload(pod, app=app or name, version=version, attach=attach, **spec))
        return pod

    def workload(
        self, pod: Pod, *, app: str = "", version: str = "v1", attach: bool = True, **spec: Any
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "node": pod.node.netns, "addresses": pod.addresses, "serviceAccount": app or pod.name, **spec
        }  # fmt: skip
        if attach:
            body["attach"] = {"netns": pod.path}
        return {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "Workload",
            "metadata": {
                "name": pod.name,
                "namespace": NAMESPACE,
                "labels": {"app": app or pod.name, "version": version},
            },
            "spec": body,
        }

    @staticmethod
    def service(
        name: str, selector: dict[str, str], vips: list[str], ports: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """With fixed VIPs, so that a test knows them. Default port: http 80 -> 8080."""
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "selector": selector,
                "clusterIP": vips[0],
                "clusterIPs": vips,
                "ports": ports or [{"name": "http", "port": 80, "targetPort": 8080}],
            },
        }

    @staticmethod
    def route(service: str, rules: list[dict[str, Any]], name: str = "") -> dict[str, Any]:
        return {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": name or service, "namespace": NAMESPACE},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": service}], "rules": rules},
        }

    @staticmethod
    def peer_authentication(mode: str, app: str = "") -> dict[str, Any]:
        spec: dict[str, Any] = {"mtls": {"mode": mode}}
        if app:
            spec["selector"] = {"matchLabels": {"app": app}}
        return {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "PeerAuthentication",
            "metadata": {"name": app or "default", "namespace": NAMESPACE},
            "spec": spec,
        }

    @staticmethod
    def mesh_config(**spec: Any) -> dict[str, Any]:
        return {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "MeshConfig",
            "metadata": {"name": "mesh", "namespace": "netproxy-system"},
            "spec": ({"steering": STEERING} if STEERING else {}) | spec,
        }

    # -- running ------------------------------------------------------------------------------------

    def start(self) -> None:
        """All agents, until everything is steered."""
        for agent in self.agents:
            agent.start()
        for agent in self.agents:
            # By name: an agent that has read nothing yet has nothing that is not steered.
            agent.wait_steered(*self.attached(agent.name))

    def attached(self, node: str) -> list[str]:
        """``namespace/name`` of the workloads that the node is to steer."""
        return [
            f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"
            for obj in self.objects.values()
            if obj["kind"] == "Workload" and "attach" in obj["spec"] and obj["spec"]["node"] == node
        ]

    def serve(self, pod: Pod, server: str, *argv: str, port: int = 8080) -> None:
        """Run ``tests/e2e/servers/<server>.py`` in the pod and wait until it listens on `port`."""
        pod.start(sys.executable, str(_SERVERS / f"{server}.py"), *argv, log=f"{pod.name}-{server}.log")
        wait_listening(pod, port)


def wait_listening(pod: Pod, port: int) -> None:
    wait_for(lambda: pod.run("ss", "-Hltn", f"sport = :{port}").stdout.strip(), f"{pod.name} to listen on {port}", 20.0)


# -- clients and servers of this process and in pods ----------------------------------------------------------


def dial(where: Pod | Node, host: str, port: int, timeout: float = 20.0) -> socket.socket:
    """A connection of this process from the pod's (or node's) namespace."""
    sock = socket_in(where, socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.settimeout(timeout)
        sock.connect((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def socket_in(where: Pod | Node, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    """A socket that lives in the pod's (or node's) namespace."""
    fd = open_netns(f"/run/netns/{where.netns}")
    try:
        with inside(fd):
            return socket.socket(family, kind, protocol)
    finally:
        os.close(fd)


def reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Journal:
    """What a server of ``servers/`` saw."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self, event: str = "") -> list[dict[str, Any]]:
        """Everything so far, or the events of one kind."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = [json.loads(line) for line in lines]
        return [item for item in found if event in ("", item["event"])]

    def count(self, event: str = "") -> int:
        return len(self.all(event))


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    """Names in lower case."""
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    """Status codes of the informational answers that came first."""

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Truncated(Exception):
    """The connection ended in the middle of an answer."""


class HttpClient:
    """One HTTP/1 connection from a pod. What is sent are the test's own octets."""

    def __init__(self, where: Pod | Node, host: str, port: int = 80, timeout: float = 20.0) -> None:
        self.sock = dial(where, host, port, timeout)
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.sock.close()

    def send(self, raw: bytes) -> None:
        self.sock.sendall(raw)

    def get(self, path: str, *fields: str, method: str = "GET") -> Answer:
        """One request without a body, and its answer."""
        self.send("\r\n".join([f"{method} {path} HTTP/1.1", "host: web", *fields, "", ""]).encode())
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer. Raises Truncated, also when there is none, or ConnectionResetError."""
        before: list[int] = []
        while True:
            version, status = self._line().split(" ", 2)[:2]
            found = Answer(int(status), self._fields(), before=before)
            if found.status >= 200:
                break
            before.append(found.status)
        if method == "HEAD" or found.status in (204, 304):
            return found
        length = found.get("content-length")
        if found.get("transfer-encoding"):
            while size := int(self._line().partition(";")[0], 16):
                found.body += self._exactly(size)
                self._exactly(2)
            found.trailers = self._fields()
        elif length is not None:
            found.body = self._exactly(int(length))
        else:
            assert version == "HTTP/1.0" or found.get("connection") == "close", found
            found.body = self._file.read()
        return found

    def at_end(self) -> bool:
        """The other end sends nothing more (waits for it). A reset counts as an end, octets do not."""
        with contextlib.suppress(ConnectionResetError):
            return self._file.read(1) == b""
        return True

    def _line(self) -> str:
        line = self._file.readline(200_000)
        if not line.endswith(b"\r\n"):
            raise Truncated(line)
        return line[:-2].decode("latin-1")

    def _fields(self) -> list[tuple[str, str]]:
        fields = []
        while line := self._line():
            name, _, value = line.partition(":")
            fields.append((name.lower(), value.strip()))
        return fields

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise Truncated(f"{len(data)} of {size}")
        return data


def get(where: Pod | Node, host: str, path: str, *fields: str, port: int = 80) -> Answer:
    """One request on a connection of its own."""
    with HttpClient(where, host, port) as client:
        return client.get(path, *fields)
