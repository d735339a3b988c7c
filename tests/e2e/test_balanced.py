"""Services that need no proxy: their connections are balanced where they are made, by a whole agent that uses eBPF."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.load import Load
from tests.e2e.mesh import NAMESPACE, Mesh, dial, get

MeshOf = Callable[..., Mesh]
CLIENT = f"{NAMESPACE}/client-1"
VIP, PORT = "240.240.0.20", 5432
ROUTE: dict[str, Any] = {
    "apiVersion": "gateway.networking.k8s.io/v1alpha2",
    "kind": "TCPRoute",
    "metadata": {"name": "db", "namespace": NAMESPACE},
    "spec": {
        "parentRefs": [{"group": "", "kind": "Service", "name": "db"}],
        "rules": [{"backendRefs": [{"name": "db", "port": PORT}]}],
    },
}


class Lab:
    """A client whose connections are steered, and a service of servers that are no part of the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.agent = mesh.agents[0]
        self.client = mesh.pod("client-1")
        self.servers = [self.server(number) for number in range(3)]
        self.service(affinity=False)
        mesh.drop("Workload", "db-2")
        mesh.start()

    def server(self, number: int) -> Pod:
        pod = self.mesh.pod(f"db-{number}", app="db", attach=False)
        self.mesh.serve(pod, "witness", "8080", str(self.journal(number)))
        return pod

    def journal(self, number: int) -> Path:
        return self.mesh.stage.folder / f"db-{number}.log"

    def served(self) -> list[int]:
        """Requests, by server."""
        paths = [self.journal(number) for number in range(3)]
        return [path.read_text().count("\n") if path.exists() else 0 for path in paths]

    def service(self, *, affinity: bool) -> None:
        port = {"name": "db", "port": PORT, "targetPort": 8080, "appProtocol": "tcp"}
        body = self.mesh.service("db", {"app": "db"}, [VIP], [port])
        body["spec"]["sessionAffinity"] = "ClientIP" if affinity else "None"
        self.mesh.put(body)

    def balanced(self) -> float:
        return self.agent.metric("netproxy_steering_connections_total", workload=CLIENT, result="balanced")

    def ask(self) -> dict[str, Any]:
        told: dict[str, Any] = get(self.client, VIP, "/x", port=PORT).json()
        return told

    def is_direct(self) -> bool:
        """By what the server sees, and by what the kernel counts."""
        before = self.balanced()
        with closing(dial(self.client, VIP, PORT)) as sock:
            assert sock.getpeername() == (VIP, PORT)
        return self.balanced() == before + 1


@pytest.fixture
def lab(mesh_of: MeshOf) -> Lab:
    return Lab(mesh_of(nodes=1, steering="ebpf"))


def test_connections_go_to_all_endpoints_and_not_by_the_proxy(lab: Lab) -> None:
    before = lab.balanced()
    for _ in range(60):
        lab.ask()
    assert lab.balanced() == before + 60
    first, second, third = lab.served()
    assert first + second == 60 and third == 0
    assert min(first, second) > 10  # 5 standard deviations
    (port,) = next(item["ports"] for item in lab.agent.status()["services"] if item["service"] == f"{NAMESPACE}/db")
    assert port["needs_proxy"] == ""
    lab.service(affinity=True)

    def keeps() -> bool:
        at = lab.served()
        for _ in range(12):
            lab.ask()
        return sorted(now - then for now, then in zip(lab.served(), at, strict=True)) == [0, 0, 12]

    wait_for(keeps, "the client to keep its endpoint")


def test_endpoints_change_without_a_gap_and_none_refuses(lab: Lab) -> None:
    workloads = [lab.mesh.workload(pod, app="db", attach=False) for pod in lab.servers]
    with Load(lab.client, VIP, PORT, fresh=3, kept=0) as load:
        for gone, new in ((0, 2), (1, 0), (2, 1)):
            lab.mesh.put(workloads[new])
            lab.mesh.drop("Workload", f"db-{gone}")

            def moved(gone: int = gone, new: int = new) -> bool:
                at = lab.served()
                load.wait_ok(20)
                now = lab.served()
                return now[gone] == at[gone] and now[new] > at[new]

            wait_for(moved, f"db-{new} instead of db-{gone}")
        attempts = load.stop()
    assert [attempt for attempt in attempts if not attempt.ok or attempt.via != "direct"] == []
    for number in (0, 1):
        lab.mesh.drop("Workload", f"db-{number}")

    def refused() -> bool:
        try:
            dial(lab.client, VIP, PORT).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_for(refused, "the service without endpoints to refuse")
    lab.mesh.put(workloads[0])
    wait_for(lambda: not refused() and lab.is_direct(), "the service to answer again")


def test_a_route_comes_and_goes_without_a_gap(lab: Lab) -> None:
    with Load(lab.client, VIP, PORT, fresh=2, kept=0) as load:
        load.wait_ok(10, via=("direct",))
        lab.mesh.put(ROUTE)
        load.wait_ok(10, via=("proxy",))
        lab.mesh.drop("TCPRoute", "db")
        load.wait_ok(10, via=("direct",))
        attempts = load.stop()
    assert [attempt for attempt in attempts if not attempt.ok] == []


def test_with_a_meshed_endpoint_the_proxy_has_it(lab: Lab) -> None:
    assert lab.is_direct()
    lab.mesh.put(lab.mesh.workload(lab.servers[0], app="db"))
    wait_for(lambda: not lab.is_direct(), "mesh TLS to be spoken")
    lab.agent.wait_steered()
    before = lab.balanced()
    for _ in range(20):
        lab.ask()
    assert lab.balanced() == before and min(lab.served()[:2]) > 0


def test_a_brain_that_begins_anew_takes_over_what_is_balanced(lab: Lab) -> None:
    assert lab.is_direct()
    lab.agent.kill_all()
    assert lab.ask()["peer"][0] == lab.client.ip  # the kernel goes on
    lab.mesh.put(ROUTE)
    lab.agent.start()
    lab.agent.wait_steered()
    wait_for(lambda: not lab.is_direct(), "the route that came meanwhile to be obeyed")
    lab.mesh.drop("TCPRoute", "db")
    wait_for(lab.is_direct, "it to be balanced again")
