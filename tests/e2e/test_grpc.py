"""gRPC of grpcio through one agent in the clear and through both with mesh TLS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.agent import Agent
from examples.stage import Pod, wait_for
from tests.e2e.mesh import _SERVERS as SERVERS
from tests.e2e.mesh import Journal, Mesh, wait_listening

PLAIN, MESHED, ROUTED, EMPTY, SLOW = (f"240.240.0.{number}" for number in (81, 82, 83, 84, 85))
PEER = str(SERVERS / "grpc_peer.py")
ENV = {**os.environ, "GRPC_VERBOSITY": "NONE"}


class Lab:
    """`plain` is no workload that is steered: only the caller's agent is on the way to it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.folder = mesh.stage.folder
        self.client = mesh.pod("client")
        self.outside = mesh.pod("outside", attach=False)
        self.pods = {PLAIN: mesh.pod("plain", attach=False), MESHED: mesh.pod("meshed", 1)}
        self.journals = {vip: Journal(self.folder / f"{pod.name}.journal") for vip, pod in self.pods.items()}
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        port = {"name": "grpc", "port": 80, "targetPort": 8080, "appProtocol": "grpc"}
        for name, vip, app in (
            ("plain", PLAIN, "plain"),
            ("meshed", MESHED, "meshed"),
            ("routed", ROUTED, "meshed"),
            ("empty", EMPTY, "nobody"),
            ("slow", SLOW, "meshed"),
        ):
            mesh.put(mesh.service(name, {"app": app}, [vip], [port]))
        there = [{"name": "routed", "port": 80}]
        mesh.put(
            mesh.route(
                "routed",
                [{"matches": [{"path": {"type": "Exact", "value": "/shop.Echo/unary"}}], "backendRefs": there}],
            ),
            mesh.route("slow", [{"timeouts": {"request": "2s"}, "backendRefs": [{"name": "slow", "port": 80}]}]),
        )
        for vip in self.pods:
            self.serve(vip)

    def serve(self, vip: str) -> None:
        pod = self.pods[vip]
        journal = str(self.journals[vip].path)
        self.servers[vip] = pod.start(sys.executable, PEER, "serve", "8080", journal, log=f"{pod.name}.log")
        wait_listening(pod, 8080)

    def command(self, address: str, *argv: str) -> tuple[str, ...]:
        return (sys.executable, PEER, "call", address, *argv)

    def call(self, address: str, *argv: str, pod: Pod | None = None) -> dict[str, Any]:
        address = address if ":" in address else f"{address}:80"
        found: dict[str, Any] = json.loads((pod or self.client).run(*self.command(address, *argv), timeout=120).stdout)
        return found

    def calls(self, vip: str, method: str) -> list[dict[str, Any]]:
        return [call for call in self.journals[vip].all("call") if call["method"] == method]

    def wait_cancelled(self, vip: str, method: str, before: int) -> None:
        wait_for(lambda: self.cancelled(vip, method) > before, f"{method} to be cancelled at the server", 20.0)

    def cancelled(self, vip: str, method: str) -> int:
        return sum(entry["method"] == method for entry in self.journals[vip].all("over"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"g{os.getpid() % 100000}", tmp_path_factory.mktemp("grpc")) as mesh:
        made = Lab(mesh)
        mesh.start()
        yield made


ways = pytest.mark.parametrize("vip", [PLAIN, MESHED], ids=["plain", "meshed"])


@ways
def test_unary_with_metadata(lab: Lab, vip: str) -> None:
    told = lab.call(vip, "unary", "abc")
    assert told == {"code": "OK", "answer": "cba", "first": ["1", "00ff"], "last": ["2", "ff00"]}
    metadata = lab.calls(vip, "unary")[-1]["metadata"]
    assert metadata["x-one"] == "1"
    assert "x-request-id" in metadata
    assert ("x-forwarded-client-cert" in metadata) is (vip == MESHED)


@ways
def test_streams(lab: Lab, vip: str) -> None:
    assert lab.call(vip, "count", "2000") == {"in_order": True}
    assert lab.call(vip, "digest", "300", "20000") == {"same": True}
    assert lab.call(vip, "chat", "50") == {"said": [f"MESSAGE {number}" for number in range(50)]}


@ways
def test_4_mib_each_way(lab: Lab, vip: str) -> None:
    assert lab.call(vip, "large") == {"same": True}


@ways
def test_many_on_one_channel(lab: Lab, vip: str) -> None:
    assert lab.call(vip, "many", "500") == {"right": 500}


@ways
def test_errors_of_the_server(lab: Lab, vip: str) -> None:
    told = lab.call(vip, "named", "fail")
    assert told == {"code": "DATA_LOSS", "details": "lost: 100% – ü\n", "flag": "", "why": "test"}
    assert lab.call(vip, "named", "missing")["code"] == "UNIMPLEMENTED"
    late = lab.call(vip, "fail_late")
    assert (late["got"], late["code"], late["details"]) == (["one"], "ABORTED", "after one")


@ways
def test_a_deadline_is_shortened_and_cancels(lab: Lab, vip: str) -> None:
    before = lab.cancelled(vip, "sleep")
    told = lab.call(vip, "named", "sleep", "1.5")
    assert told["code"] == "DEADLINE_EXCEEDED"
    lab.wait_cancelled(vip, "sleep", before)
    assert lab.calls(vip, "sleep")[-1]["left"] < 1.5


@ways
def test_a_deadline_passes_within_a_stream(lab: Lab, vip: str) -> None:
    before = lab.cancelled(vip, "endless")
    told = lab.call(vip, "deadline", "1.5")
    assert (told["code"], told["got"]) == ("DEADLINE_EXCEEDED", True)
    lab.wait_cancelled(vip, "endless", before)


@ways
def test_a_cancellation_reaches_the_server(lab: Lab, vip: str) -> None:
    assert lab.call(vip, "cancel", str(lab.journals[vip].path)) == {"got": 5, "code": "CANCELLED", "seen": True}


def test_the_routes_timeout_is_a_deadline(lab: Lab) -> None:
    """The client's is longer: ours is said first, by us, and the server is told of it."""
    told = lab.call(SLOW, "named", "sleep", "60")
    assert (told["code"], told["flag"]) == ("DEADLINE_EXCEEDED", "UT")
    # The other agent has what is left of it as its own deadline, and may be the first to say so.
    assert "not answered within" in told["details"]
    assert lab.calls(MESHED, "sleep")[-1]["left"] < 2.0


def test_errors_of_ours(lab: Lab) -> None:
    assert lab.call(ROUTED, "unary")["code"] == "OK"
    told = lab.call(ROUTED, "named", "large")
    assert (told["code"], told["flag"]) == ("UNIMPLEMENTED", "NR")
    told = lab.call(EMPTY, "unary")
    assert (told["code"], told["flag"]) == ("UNAVAILABLE", "UH")
    assert "the backend has no ready endpoint" in told["details"]


def test_strict_refuses_with_a_status(lab: Lab) -> None:
    lab.mesh.put(lab.mesh.peer_authentication("STRICT", "meshed"))
    address = f"{lab.pods[MESHED].addresses[0]}:8080"

    def told() -> dict[str, Any]:
        return lab.call(address, "unary", pod=lab.outside)

    wait_for(lambda: told()["code"] != "OK", "STRICT to be in force", 20.0)
    refused = told()
    assert (refused["code"], refused["flag"]) == ("PERMISSION_DENIED", "UAEX")
    lab.mesh.drop("PeerAuthentication", "meshed")
    wait_for(lambda: told()["code"] == "OK", "STRICT to be gone", 20.0)


def test_statuses_are_counted(lab: Lab) -> None:
    lab.call(MESHED, "named", "fail")
    for agent, reporter in zip(lab.mesh.agents, ("source", "destination"), strict=True):
        wait_for(
            lambda agent=agent, reporter=reporter: agent.metric(  # type: ignore[misc]
                "netproxy_requests_total", reporter=reporter, grpc_status="15", reason="OK"
            ),
            "the status to be counted",
        )
    assert lab.mesh.agents[0].metric("netproxy_requests_total", grpc_status="12", reason="NO_ROUTE")


def held(lab: Lab, vip: str, name: str) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """A client in the middle of a stream, the file that lets it go on, and its output."""
    mark, until, out = lab.folder / f"{name}.mark", lab.folder / f"{name}.until", lab.folder / f"{name}.out"
    client = lab.client.start(*lab.command(f"{vip}:80", "hold", str(mark), str(until)), log=out.name)
    wait_for(mark.exists, "the stream to have begun", 30.0)
    return client, until, out


@ways
def test_a_server_that_is_killed_in_a_stream(lab: Lab, vip: str) -> None:
    client, until, out = held(lab, vip, f"killed-{lab.pods[vip].name}")
    server = lab.servers[vip]
    lab.mesh.stage.stop(server, signal.SIGKILL)
    lab.serve(vip)
    until.touch()
    assert client.wait(60) == 0
    told = json.loads(out.read_text().splitlines()[-1])
    assert (told["said"], told["code"]) == (["ONE"], "UNAVAILABLE")
    assert told["after"] == "cba"


def workers(agent: Agent) -> set[int]:
    """Those that are ready; none while there is no brain to tell."""
    try:
        return set(agent.pids("worker"))
    except OSError:
        return set()


@ways
def test_an_agent_that_is_upgraded_in_a_stream(lab: Lab, vip: str) -> None:
    """Its workers drain: GOAWAY, the stream goes on, the next call is the new worker's."""
    agent = lab.mesh.agents[0]
    before = workers(agent)
    client, until, out = held(lab, vip, f"drained-{lab.pods[vip].name}")
    assert agent.process is not None
    agent.process.send_signal(signal.SIGUSR2)
    wait_for(lambda: (now := workers(agent)) and not now & before, "new workers", 60.0)
    until.touch()
    assert client.wait(60) == 0
    told = json.loads(out.read_text().splitlines()[-1])
    assert (told["said"], told["after"]) == (["ONE", "TWO"], "cba")
