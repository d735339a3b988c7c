"""What is particular to steering by eBPF: programs that outlive the agent, and listeners that are handed to them.

What holds for every mechanism is in `test_mechanisms`, and each case of steering itself in tests/kernel.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from examples.stage import wait_for
from redirect.bpf import links
from redirect.bpf.bpffs import BPFFS
from redirect.bpf.pins import place_of
from tests.e2e.load import VIP, Scene, listeners
from tests.e2e.mesh import NAMESPACE, Mesh, dial, get
from tests.e2e.test_resilience import no_worker

MeshOf = Callable[..., Mesh]
CLIENT, SERVER = f"{NAMESPACE}/client-1", f"{NAMESPACE}/web-1"
POLICIES = ["open", "closed"]


def is_meshed(scene: Scene) -> bool:
    """Through both the client's and the server's listeners."""
    try:
        answer = get(scene.client, VIP, "/x")
    except OSError:
        return False
    return answer.status == 200 and bool(answer.json()["meshed"])


def results(scene: Scene, result: str) -> float:
    return scene.agent.metric("netproxy_steering_connections_total", result=result)


def entries(scene: Scene) -> int:
    """By another tool than ours."""
    place = str(place_of(scene.agent.name, BPFFS) / "map_pods")
    done = subprocess.run(["bpftool", "-j", "map", "dump", "pinned", place], capture_output=True, check=True)
    return len(json.loads(done.stdout))


def assert_policy_holds(scene: Scene, policy: str) -> None:
    served = scene.served()
    if policy == "open":
        answer = get(scene.client, scene.server.ip, "/x", port=8080)
        assert answer.status == 200 and not answer.json()["meshed"]
        assert scene.served() == served + 1
    else:
        for where, address in ((scene.client, scene.server.ip), (scene.mesh.nodes[0], scene.server.ip)):
            with pytest.raises(ConnectionRefusedError):
                dial(where, address, 8080)
        assert scene.served() == served


def assert_inbound_is_steered(scene: Scene) -> None:
    before = results(scene, "inbound_steered")
    assert get(scene.mesh.nodes[0], scene.server.ip, "/x", port=8080).status == 200
    assert results(scene, "inbound_steered") == before + 1


def both(policy: str) -> dict[str, dict[str, str]]:
    return {"client": {"failurePolicy": policy}, "server": {"failurePolicy": policy}}


@pytest.mark.parametrize("policy", POLICIES)
def test_without_workers_the_policy_holds_and_new_listeners_are_found(mesh_of: MeshOf, policy: str) -> None:
    scene = Scene(mesh_of(nodes=1, steering="ebpf"), **both(policy))
    scene.mesh.start()
    assert is_meshed(scene)
    with no_worker(scene.agent) as kill:

        def given_up() -> bool:
            kill()
            return not listeners(scene.client) and not listeners(scene.server)

        wait_for(given_up, "the listeners to be closed")
        assert_policy_holds(scene, policy)
    scene.agent.wait_steered()
    wait_for(lambda: is_meshed(scene), "the service to answer again")
    assert_inbound_is_steered(scene)
    assert scene.agent.metric("netproxy_steering_repairs_total") == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_with_everybody_dead_the_policy_holds(mesh_of: MeshOf, policy: str) -> None:
    scene = Scene(mesh_of(nodes=1, steering="ebpf"), **both(policy))
    scene.mesh.start()
    assert is_meshed(scene)
    scene.agent.kill_all()
    wait_for(lambda: not listeners(scene.client) and not listeners(scene.server), "the listeners to go")
    assert_policy_holds(scene, policy)
    assert entries(scene) == 2
    scene.agent.start()
    scene.agent.wait_steered()
    assert is_meshed(scene)
    # An orderly stop leaves what is closed, and nothing else.
    assert scene.agent.stop() == 0
    assert bool(links(scene.agent.name)) is (policy == "closed")
    assert_policy_holds(scene, policy)
    done = subprocess.run(scene.agent.command("clean"), capture_output=True, text=True, check=True)
    assert ("eBPF: removed" in done.stdout) is (policy == "closed")
    assert_policy_holds(scene, "open")


def test_one_worker_of_two_and_the_brain_die_and_nobody_bypasses(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1, steering="ebpf", workers=2))
    scene.mesh.start()
    with scene.to_service(fresh=3, kept=0) as load:
        load.wait_ok(10, via=("mesh",))
        for role in ("worker", "brain"):
            victim = scene.agent.pids(role)[0]
            os.kill(victim, signal.SIGKILL)
            wait_for(
                lambda role=role, victim=victim: scene.agent.is_steered() and victim not in scene.agent.pids(role),
                f"another {role}",
            )
            load.wait_ok(20, via=("mesh",))
        attempts = load.stop()
    assert not [attempt for attempt in attempts if attempt.via in ("direct", "proxy")]
    # Of the worker that died, what it was doing.
    assert len([attempt for attempt in attempts if not attempt.ok]) <= 3
    for result in ("direct_no_listener", "inbound_direct_no_listener"):
        assert results(scene, result) == 0
    assert scene.agent.metric("netproxy_steering_repairs_total") == 0


def test_what_somebody_takes_away_is_put_back(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1, steering="ebpf"))
    scene.mesh.start()
    place = place_of(scene.agent.name, BPFFS)
    with repaired(scene):
        (brain,) = scene.agent.pids("brain")
        os.kill(brain, signal.SIGSTOP)  # it would put it back sooner than one can look
        try:
            (place / "link_connect4").unlink()
            # The kernel lets go of a link some time after its last name.
            wait_for(
                lambda: not get(scene.client, scene.server.ip, "/x", port=8080).json()["meshed"],
                "the program to be away",
            )
        finally:
            os.kill(brain, signal.SIGCONT)
    with repaired(scene):
        (place / "map_listeners").unlink()  # with it, all that is known of listeners
        (place / "link_connect6").unlink()


@contextmanager
def repaired(scene: Scene) -> Iterator[None]:
    """What is done inside is put back, for both workloads, which share the hooks."""
    agent = scene.agent
    before = {key: agent.metric("netproxy_steering_repairs_total", workload=key) for key in (CLIENT, SERVER)}
    yield
    for key, count in before.items():
        wait_for(
            lambda key=key, count=count: agent.metric("netproxy_steering_repairs_total", workload=key) > count,
            f"the repair of {key}",
            10.0,
        )
        assert agent.metric("netproxy_steering_last_gap_seconds", workload=key) < 4.0
    assert is_meshed(scene)
    assert_inbound_is_steered(scene)


def test_a_deleted_namespace_leaves_no_entry(mesh_of: MeshOf) -> None:
    mesh = mesh_of(nodes=1, steering="ebpf")
    scene = Scene(mesh)
    gone = mesh.pod("gone-1", 0)
    mesh.start()
    assert entries(scene) == 3
    mesh.stage.remove_pod(gone.name)
    wait_for(lambda: entries(scene) == 2, "its entry to go")
    assert sum(link.name.startswith("inbound_") for link in links(scene.agent.name)) == 2
    assert is_meshed(scene)


PODS = 200 if os.environ.get("FULL") else 15


@pytest.mark.timeout(600)
def test_pods_of_the_same_names_and_addresses_leave_nothing(mesh_of: MeshOf) -> None:
    """``FULL=1``: 200 of them."""
    mesh = mesh_of(nodes=1, steering="ebpf")
    scene = Scene(mesh)
    pods = [mesh.pod(f"again-{number}", 0) for number in range(PODS)]
    numbers = [int(pod.ip.rpartition(".")[2]) for pod in pods]
    keys = [f"{NAMESPACE}/{pod.name}" for pod in pods]

    def inbound() -> int:
        return sum(link.name.startswith("inbound_") and link.target != 0 for link in links(scene.agent.name))

    def veths() -> list[str]:
        shown = json.loads(mesh.nodes[0].run("ip", "-j", "link", "show", "type", "veth").stdout)
        return [link["ifname"] for link in shown if link["ifname"] in {f"v{number}" for number in numbers}]

    scene.mesh.start()
    for _ in range(2):
        scene.agent.wait_steered(*keys, timeout=120)
        assert entries(scene) == inbound() == PODS + 2
        for pod in (pods[0], pods[-1]):
            assert get(pod, VIP, "/x").json()["meshed"]
        for pod in pods:
            mesh.stage.remove_pod(pod.name)
        wait_for(lambda: entries(scene) == inbound() == 2, "all entries to go", 60.0)
        wait_for(lambda: not veths(), "all veths to go", 60.0)
        pods = [
            mesh.stage.make_pod(pod.name, mesh.nodes[0], number, tuple(mesh.stage.families))
            for pod, number in zip(pods, numbers, strict=True)
        ]
    scene.agent.wait_steered(*keys, timeout=120)
    assert entries(scene) == inbound() == PODS + 2
    assert is_meshed(scene)
