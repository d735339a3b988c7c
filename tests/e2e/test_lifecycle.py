"""Start, stop, and what changes in between: workloads, policies, files; and the verbs around an agent."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from pyroute2 import netns

from examples.agent import Agent
from examples.stage import Pod, wait_for
from netproxy.identity.spiffe import SpiffeId
from netproxy.identity.svid import SvidStore
from tests.e2e.load import VIP, Load, Scene, listeners, ruleset, tables, vip_routes
from tests.e2e.mesh import NAMESPACE, HttpClient, Mesh, get

MeshOf = Callable[..., Mesh]
GONE_S = 1.0
"""After its namespace was deleted, nothing of ours keeps it."""


def run(agent: Agent, verb: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return agent.node.run(*agent.command(verb, *argv), check=False)


def answers(pod: Pod, host: str, port: int = 80, timeout: float = 20.0) -> bool:
    try:
        with HttpClient(pod, host, port, timeout) as client:
            return client.get("/x").status == 200
    except OSError:
        return False


def state(agent: Agent, name: str) -> str:
    """As its status tells it, empty for a workload that it does not know."""
    found = {item["workload"]: item["state"] for item in agent.status()["workloads"]}
    return str(found.get(f"{NAMESPACE}/{name}", ""))


def assert_ok(load: Load, *, since: float = 0.0) -> None:
    failed = [attempt for attempt in load.stop() if not attempt.ok and attempt.begin >= since]
    assert not failed, "\n".join(map(str, failed[:10]))


# -- stop and start ------------------------------------------------------------------------------------------


def test_stop_and_start_under_load(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(workers=2))
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_pod() as load, HttpClient(client, VIP, timeout=30) as held:
        held.send(b"GET /hold/one HTTP/1.1\r\nhost: web\r\n\r\n")
        wait_for(lambda: scene.holding("one"), "the request to be under way")
        begin = time.monotonic()
        with ThreadPoolExecutor(1) as executor:
            stopped = executor.submit(agent.stop)
            wait_for(lambda: "redirect" not in ruleset(client), "the rules to go")
            load.wait_ok(20, via=("proxy", "direct"))
            assert not stopped.done(), "a request is still under way"
            scene.go_on("one")
            answer = held.answer()
            assert (answer.status, answer.json()["meshed"]) == (200, True)
            assert stopped.result() == 0
        assert time.monotonic() - begin < agent.drain_s
        assert held.at_end()
        assert tables(client) == []
        assert client.run("nft", "list", "ruleset").stdout == ""
        assert vip_routes(client) == []
        assert listeners(client) == []
        _assert_idle(agent)
        load.wait_ok(20, via=("proxy", "direct"))
        agent.start()
        agent.wait_steered()
        load.wait_ok(20, via=("mesh",))
        assert_ok(load)
    assert answers(client, VIP)


def _assert_idle(agent: Agent) -> None:
    """In the run folder of a stopped agent nothing is left that says it runs, or has touched something."""
    folder = agent.run_root / agent.name
    assert {path.name for path in folder.iterdir()} <= {"lock", "journal.json"}
    assert json.loads((folder / "journal.json").read_text())["workloads"] == {}


def test_what_takes_longer_than_the_drain_is_cut_off(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.agent.drain_s = 1.0
    scene.mesh.start()
    with HttpClient(scene.client, VIP, timeout=30) as held:
        held.send(b"GET /hold/never HTTP/1.1\r\nhost: web\r\n\r\n")
        wait_for(lambda: scene.holding("never"), "the request to be under way")
        begin = time.monotonic()
        assert scene.agent.stop() == 0
        assert time.monotonic() - begin < 1.0 + 3.0
        with pytest.raises(ConnectionResetError):  # a clean end could pass for a complete answer
            held.answer()
    assert tables(scene.client) == []
    scene.go_on("never")


def test_a_stopped_agent_leaves_closed_workloads_closed(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(), client={"failurePolicy": "closed"})
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    before = ruleset(client)
    assert agent.stop() == 0
    assert ruleset(client) == before
    served = scene.served()
    with pytest.raises(ConnectionRefusedError):
        get(client, scene.server.ip, "/x", port=8080)
    assert scene.served() == served
    agent.start()
    agent.wait_steered()
    assert answers(client, VIP)
    assert ruleset(client) == before
    assert agent.stop() == 0
    assert run(agent, "clean").returncode == 0
    assert tables(client) == []
    assert answers(client, scene.server.ip, 8080)


def test_two_nodes_started_at_the_same_time_share_a_new_ca(mesh_of: MeshOf) -> None:
    """And after a restart an identity still has the certificate it had."""
    scene = Scene(mesh_of())
    for agent in scene.mesh.agents:
        agent.start()
    for agent in scene.mesh.agents:
        agent.wait_steered()
    assert get(scene.client, VIP, "/x").json()["meshed"]
    store = SvidStore(scene.mesh.stage.folder / "state" / scene.agent.name / "svid")
    identity = SpiffeId(f"spiffe://cluster.local/ns/{NAMESPACE}/sa/client")
    before = store.load(identity, now=time.time())
    assert before is not None
    assert scene.agent.stop() == 0
    scene.agent.start()
    scene.agent.wait_steered()
    assert store.load(identity, now=time.time()) == before
    assert get(scene.client, VIP, "/x").json()["meshed"]


# -- workloads come and go -----------------------------------------------------------------------------------


def test_a_namespace_that_comes_after_its_workload(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    pod = Pod(scene.mesh.stage, "later-1", scene.mesh.nodes[0], ["10.80.1.99"])
    scene.mesh.put(scene.mesh.workload(pod, app="later"))
    for agent in scene.mesh.agents:
        agent.start()
    scene.agent.wait_steered(f"{NAMESPACE}/client-1")
    scene.mesh.agents[1].wait_steered()
    assert state(scene.agent, "later-1") == "absent"
    pod = scene.mesh.stage.make_pod("later-1", scene.mesh.nodes[0], 99, (4,))
    scene.agent.wait_steered(f"{NAMESPACE}/later-1")
    assert get(pod, VIP, "/x").json()["meshed"]


def test_a_deleted_namespace_is_let_go_within_a_second(mesh_of: MeshOf) -> None:
    """With connections open in it, busy and idle, and while another pod is under load."""
    scene = Scene(mesh_of())
    gone = scene.mesh.pod("gone-1", 0)
    scene.mesh.start()
    agent = scene.agent
    link = f"v{gone.ip.rpartition('.')[2]}"
    assert _link_exists(scene.mesh, link)
    with scene.to_service() as load:
        with HttpClient(gone, VIP) as idle:
            assert idle.get("/x").status == 200  # and leaves a connection in the pool
            with HttpClient(gone, VIP) as busy, HttpClient(gone, scene.server.ip, 8080) as direct:
                busy.send(b"GET /hold/gone HTTP/1.1\r\nhost: web\r\n\r\n")
                direct.send(b"GET /hold/gone HTTP/1.1\r\nhost: web\r\n\r\n")
                wait_for(lambda: scene.journal.read_text().count("/hold/gone\n") == 2, "both to be under way")
            # The pod's own sockets are closed now, as they are when its processes have ended.
        scene.mesh.stage.remove_pod("gone-1")
        deleted = time.monotonic()
        wait_for(lambda: not _link_exists(scene.mesh, link), "the veth of the deleted namespace to go")
        gone_s = time.monotonic() - deleted
        print(f"the veth was gone {1000 * gone_s:.0f} ms after its namespace")
        assert gone_s < GONE_S + 0.5, "1 s, and the time to look"
        wait_for(lambda: state(agent, "gone-1") == "absent", "the status to say so")
        scene.go_on("gone")
        load.wait_ok(20)
        assert_ok(load)
    journal = json.loads((agent.run_root / agent.name / "journal.json").read_text())
    assert set(journal["workloads"]) == {f"{NAMESPACE}/client-1"}


def _link_exists(mesh: Mesh, name: str) -> bool:
    return mesh.nodes[0].run("ip", "link", "show", name, check=False).returncode == 0


def test_twenty_pods_are_deleted_and_made_again(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    names = [f"pod-{number}" for number in range(20)]
    for name in names:
        scene.mesh.pod(name, 0)
    scene.mesh.start()
    stage, node = scene.mesh.stage, scene.mesh.nodes[0]
    numbers = {name: int(stage.pods[name].ip.rpartition(".")[2]) for name in names}
    for _ in range(2):
        for name in names:
            assert get(stage.pods[name], VIP, "/x").json()["meshed"]
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(stage.remove_pod, names))
        begin = time.monotonic()
        wait_for(lambda: not any(_link_exists(scene.mesh, f"v{n}") for n in numbers.values()), "all veths to go")
        assert time.monotonic() - begin < GONE_S + 2.0
        for name in names:
            stage.make_pod(name, node, numbers[name], (4,))
        scene.agent.wait_steered(*(f"{NAMESPACE}/{name}" for name in names))
        assert all(len(tables(stage.pods[name])) == 1 for name in names)
    for name in names:
        assert get(stage.pods[name], VIP, "/x").json()["meshed"]


def test_a_pod_replaced_at_once_is_the_new_one(mesh_of: MeshOf) -> None:
    """Same name, address and path, with nothing in between that the agent could have seen."""
    scene = Scene(mesh_of())
    scene.mesh.start()
    number = int(scene.client.ip.rpartition(".")[2])
    scene.mesh.stage.remove_pod("client-1")
    netns.create(scene.client.netns)  # without a network: the old veth is there as long as somebody holds the old one
    wait_for(lambda: not _link_exists(scene.mesh, f"v{number}"), "the old veth to go")
    netns.remove(scene.client.netns)
    pod = scene.mesh.stage.make_pod("client-1", scene.mesh.nodes[0], number, (4,))
    # By eBPF a connect() that begins before it is steered goes where nobody is, and its packets with it.
    wait_for(lambda: answers(pod, VIP, timeout=2.0), "the new pod to be steered")
    assert get(pod, VIP, "/x").json()["meshed"]


def test_a_removed_workload_is_released(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.mesh.start()
    client = scene.client
    with scene.to_pod(kept=0) as load:
        scene.mesh.drop("Workload", "client-1")
        wait_for(lambda: not listeners(client), "the workload to be released")
        assert tables(client) == []
        assert vip_routes(client) == []
        load.wait_ok(20, via=("proxy", "direct"))
        scene.mesh.put(scene.mesh.workload(client, app="client"))
        scene.agent.wait_steered(f"{NAMESPACE}/client-1")
        load.wait_ok(20, via=("mesh",))
        load.stop()
    assert len(tables(client)) == 1


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_a_workload_whose_namespace_path_changes_leaves_nothing_in_the_old_one(mesh_of: MeshOf, policy: str) -> None:
    scene = Scene(mesh_of(), client={"failurePolicy": policy})
    other = scene.mesh.stage.add_pod("other-1", scene.mesh.nodes[0])
    scene.mesh.start()
    moved = scene.mesh.workload(scene.client, app="client", failurePolicy=policy)
    moved["spec"]["attach"]["netns"] = other.path
    moved["spec"]["addresses"] = other.addresses
    scene.mesh.put(moved)
    wait_for(lambda: tables(other) and not tables(scene.client), "the steering to move")
    assert vip_routes(scene.client) == []
    assert listeners(scene.client) == []
    assert answers(scene.client, scene.server.ip, 8080)
    wait_for(lambda: answers(other, VIP, timeout=2.0), "the new place to work")


def test_the_failure_policy_changes_at_run_time(mesh_of: MeshOf) -> None:
    """No call fails, and no connection is closed for it."""
    scene = Scene(mesh_of(steering="nftables"))
    scene.mesh.start()
    client = scene.client
    with scene.to_service() as load:
        for policy in ("closed", "open", "closed"):
            scene.mesh.put(scene.mesh.workload(client, app="client", failurePolicy=policy))
            wait_for(lambda policy=policy: _owned(client) == (policy == "open"), f"the policy to be {policy}")
            load.wait_ok(30)
        attempts = load.stop()
        assert_ok(load)
    assert {attempt.via for attempt in attempts} == {"mesh"}
    assert len({attempt.port for attempt in attempts if attempt.kind == "kept"}) == 2
    assert len(tables(client)) == 1


def _owned(pod: Pod) -> bool | None:
    """Of the only table; None while there are two."""
    text = pod.run("nft", "list", "ruleset").stdout
    return "flags owner" in text if text.count("table inet") == 1 else None


def test_agents_of_other_names_are_not_disturbed(mesh_of: MeshOf) -> None:
    """Two nodes on one machine: what happens to the one does not touch the other."""
    mesh = mesh_of()
    scene = Scene(mesh, server=None)
    near = mesh.pod("near-1", 1)
    mesh.start()
    before, routes = ruleset(near), vip_routes(near)
    with Load(near, VIP, 80) as load:
        scene.agent.kill_all()
        assert run(scene.agent, "clean").returncode == 0
        scene.agent.start()
        scene.agent.wait_steered()
        assert scene.agent.stop() == 0
        load.wait_ok(20)
        assert_ok(load)
    assert (ruleset(near), vip_routes(near)) == (before, routes)
    assert mesh.agents[1].is_steered(f"{NAMESPACE}/near-1")


# -- verbs ---------------------------------------------------------------------------------------------------


def test_a_second_agent_of_the_same_name_refuses_to_start(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    scene.mesh.start()
    agent = scene.agent
    before = ruleset(scene.client)
    argv = ["-f", str(scene.mesh.config), "--state-root", str(scene.mesh.stage.folder / "state")]
    done = run(agent, "run", *argv)
    assert done.returncode == 1
    assert f"another agent runs as node {agent.name}" in done.stderr
    assert "Traceback" not in done.stderr
    assert agent.is_healthy()
    assert ruleset(scene.client) == before
    assert answers(scene.client, VIP)
    # Nor may its work be cleaned away.
    done = run(agent, "clean")
    assert done.returncode == 1
    assert "the agent runs" in done.stderr
    assert ruleset(scene.client) == before
    assert agent.status()["supervisor_pid"] == int((agent.run_root / agent.name / "supervisor.pid").read_text())


def test_status_of_a_running_and_of_a_stopped_agent(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    scene.mesh.start()
    done = run(scene.agent, "status")
    assert done.returncode == 0
    assert "shop/client-1" in done.stdout
    assert "steered" in done.stdout
    for output in ("json", "yaml"):
        done = run(scene.agent, "status", "-o", output)
        assert done.returncode == 0
        assert "shop/client-1" in done.stdout
    assert scene.agent.stop() == 0
    done = run(scene.agent, "status")
    assert done.returncode == 1
    assert "no answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert run(scene.agent, "clean", "--nonsense").returncode == 2


def test_validate_prints_every_error(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    agent, config = scene.agent, scene.mesh.config
    command = agent.command("validate", "-f", str(config))
    command = [part for part in command if part not in ("--run-root", str(agent.run_root))]
    assert agent.node.run(*command).returncode == 0
    (config / "torn.yaml").write_text("kind: [Service\n")
    (config / "wrong.yaml").write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\nspec: {ports: [{port: 0}]}\n---\n"
        "apiVersion: netproxy.mesh/v1alpha1\nkind: Workload\nmetadata: {name: b}\nspec: {addresses: [nonsense]}\n"
    )
    done = agent.node.run(*command, check=False)
    assert done.returncode == 2
    for part in ("torn.yaml:", "wrong.yaml:4: Service shop/a: ", "wrong.yaml:9: Workload default/b: "):
        assert part in done.stderr, done.stderr
    (config / "torn.yaml").unlink()
    config.rename(config.with_name("away"))
    assert agent.node.run(*command, check=False).returncode == 2


def test_a_configuration_that_can_not_be_read_keeps_what_was_in_force(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    scene.mesh.start()
    agent, client, config = scene.agent, scene.client, scene.mesh.config
    before = ruleset(client)
    with scene.to_service() as load:
        config.rename(config.with_name("away"))
        wait_for(lambda: agent.status()["config"]["error"], "the status to say that the folder is gone")
        assert "can't be read" in run(agent, "status").stdout
        load.wait_ok(10)
        config.with_name("away").rename(config)
        wait_for(lambda: not agent.status()["config"]["error"], "the folder to be read again")
        for file in ("service-shop-web.yaml", "workload-shop-client-1.yaml"):
            (config / file).write_text("kind: [broken\n")
        wait_for(lambda: len(agent.status()["rejected"]) == 2, "the status to name both files")
        assert "is not YAML" in run(agent, "status").stdout
        # An object in another file is not kept waiting.
        scene.mesh.put(scene.mesh.service("more", {"app": "web"}, ["240.240.0.11"]))
        wait_for(lambda: answers(client, "240.240.0.11"), "the other service to work")
        load.wait_ok(10)
        assert_ok(load)
    assert ruleset(client) == before


def test_an_agent_without_a_configuration_does_not_start(mesh_of: MeshOf) -> None:
    agent = mesh_of(nodes=1).agents[0]
    done = run(agent, "run", "-f", "/nonexistent/mesh", "--state-root", str(agent.stage.folder / "state"))
    assert done.returncode == 2
    assert "/nonexistent/mesh" in done.stderr
