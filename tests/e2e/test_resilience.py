"""What dies, and what its death costs: brain, worker, the whole agent, each under load."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.agent import Agent, alive
from examples.stage import Pod, wait_for
from netproxy.identity.ca import CertificateAuthority
from netproxy.identity.spiffe import SpiffeId
from netproxy.identity.svid import SvidStore, issue_svid
from tests.e2e.load import VIP, Attempt, Scene, listeners, rules, ruleset, tables, vip_routes
from tests.e2e.mesh import NAMESPACE, HttpClient, Mesh, get

MeshOf = Callable[..., Mesh]

GRACE_S = 2.0
"""Without a worker for that long, listeners are closed."""
RELEASE_S = 0.05
"""A connection begun later than this after the death of an agent goes direct."""
STEERING_SLACK_S = 1.0
"""For timers and processes on a busy machine; what it is added to is the promise."""


def children(pid: int) -> dict[int, str]:
    """pid -> command line of the processes that `pid` started."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def supervisor(agent: Agent) -> int:
    assert agent.process is not None
    return agent.process.pid


def workers(agent: Agent) -> list[int]:
    return [pid for pid, argv in children(supervisor(agent)).items() if "netproxy.worker" in argv]


def brain_of(agent: Agent) -> int:
    (brain,) = (pid for pid, argv in children(supervisor(agent)).items() if "netproxy.brain" in argv)
    return brain


def owner_of(pod: Pod, port: int) -> int:
    """The process that has the other end of the pod's redirected connection from local port `port`."""
    found = pod.run("ss", "-Htnp", "state", "established", f"( sport = :15001 and dport = :{port} )").stdout
    pids = re.findall(r"pid=(\d+)", found)
    return int(pids[0]) if pids else 0


def wait_replaced(agent: Agent, role: str, old: set[int], count: int = 1) -> None:
    def replaced() -> bool:
        try:
            now = agent.pids(role)
        except (OSError, ValueError):
            return False
        return len(now) == count and not old & set(now)

    wait_for(replaced, f"{agent.name}: {role} to be replaced", 40.0)


def all_ok(attempts: list[Attempt]) -> None:
    failed = [attempt for attempt in attempts if not attempt.ok]
    assert not failed, "\n".join(map(str, failed[:10]))


# -- the brain -----------------------------------------------------------------------------------------------


def test_a_killed_brain_loses_nothing(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    before, routes = ruleset(client), vip_routes(client)
    journal = (agent.run_root / agent.name / "journal.json").read_bytes()
    with scene.to_service() as load:
        brain = brain_of(agent)
        old_workers = agent.pids("worker")
        os.kill(brain, signal.SIGKILL)
        load.wait_ok(50)
        wait_replaced(agent, "brain", {brain})
        agent.wait_steered()
        load.wait_ok(50)
        attempts = load.stop()
    all_ok(attempts)
    assert {attempt.via for attempt in attempts} == {"mesh"}
    assert sum(attempt.torn for attempt in attempts) == 0
    assert len({attempt.port for attempt in attempts if attempt.kind == "kept"}) == 2, "no connection was closed"
    # The replacement found everything right, and touched nothing.
    assert ruleset(client) == before
    assert vip_routes(client) == routes
    assert (agent.run_root / agent.name / "journal.json").read_bytes() == journal
    assert agent.pids("worker") == old_workers
    assert agent.status()["restarts"] == {"brain": 1, "worker": 0}
    # And it does its work: a new name, and the old ones still.
    scene.mesh.put(scene.mesh.service("later", {"app": "web"}, ["240.240.0.11"]))
    wait_for(lambda: _answers(client, "240.240.0.11"), "the new service to answer")
    assert get(client, VIP, "/x").status == 200


def _answers(pod: Pod, host: str, port: int = 80) -> bool:
    try:
        return get(pod, host, "/x", port=port).status == 200
    except OSError:
        return False


def test_a_brain_that_finds_no_configuration_keeps_what_is_steered(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    before = ruleset(client)
    brain = brain_of(agent)
    hidden = scene.mesh.config.with_name("hidden")
    scene.mesh.config.rename(hidden)
    with scene.to_service() as load:
        os.kill(brain, signal.SIGKILL)
        wait_replaced(agent, "brain", {brain})
        wait_for(lambda: agent.status()["config"]["error"], "the status to say that the folder is gone")
        load.wait_ok(50)
        hidden.rename(scene.mesh.config)
        wait_for(lambda: not agent.status()["config"]["error"], "the folder to be read again")
        agent.wait_steered(f"{NAMESPACE}/client-1")
        load.wait_ok(50)
        all_ok(load.stop())
    assert ruleset(client) == before


def test_a_namespace_deleted_while_no_brain_looks_is_let_go(mesh_of: MeshOf) -> None:
    mesh = mesh_of(nodes=1)
    mesh.pod("gone-1")
    pod = mesh.pod("stays-1")
    mesh.start()
    (agent,) = mesh.agents
    brain = brain_of(agent)
    assert _link_exists(mesh, "v1")
    os.kill(supervisor(agent), signal.SIGSTOP)  # so that no new brain begins before the namespace is gone
    os.kill(brain, signal.SIGKILL)
    mesh.stage.remove_pod("gone-1")
    os.kill(supervisor(agent), signal.SIGCONT)
    wait_for(lambda: not _link_exists(mesh, "v1"), "the veth of the deleted namespace to go")
    wait_replaced(agent, "brain", {brain})
    agent.wait_steered(f"{NAMESPACE}/stays-1")
    assert len(tables(pod)) == 1


def _link_exists(mesh: Mesh, name: str) -> bool:
    return mesh.nodes[0].run("ip", "link", "show", name, check=False).returncode == 0


def test_certificates_are_renewed_without_a_failed_call(mesh_of: MeshOf) -> None:
    """An SVID past its half life is put into the store of both nodes; the next brain loads and renews it."""
    scene = Scene(mesh_of())
    scene.mesh.start()
    ca = CertificateAuthority.open(scene.mesh.stage.folder / "ca", "cluster.local", now=time.time())
    day_s = 24 * 3600
    with scene.to_service() as load:
        aged = []
        for agent, name in zip(scene.mesh.agents, ("client", "web"), strict=True):
            identity = SpiffeId(f"spiffe://cluster.local/ns/{NAMESPACE}/sa/{name}")
            store = SvidStore(scene.mesh.stage.folder / "state" / agent.name / "svid")
            old = issue_svid(ca, identity, now=time.time() - 0.6 * day_s, ttl_s=day_s)
            store.save(old)
            aged.append((store, old))
            os.kill(brain_of(agent), signal.SIGKILL)

        def renewed() -> bool:
            return all(store.load(old.identity, now=time.time()) != old for store, old in aged)

        wait_for(renewed, "both to be renewed", 40.0)
        for agent in scene.mesh.agents:
            wait_replaced(agent, "brain", set())
        load.wait_ok(50)
        attempts = load.stop()
    all_ok(attempts)
    assert {attempt.via for attempt in attempts} == {"mesh"}


# -- a worker ------------------------------------------------------------------------------------------------


def test_a_killed_worker_loses_its_own_connections_only(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(workers=2))
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_service(kept=12) as load:
        ports = {a.thread: a.port for a in load.attempts() if a.kind == "kept"}
        owners = {port: owner_of(client, port) for port in ports.values()}
        victim, other = sorted(agent.pids("worker"))
        assert set(owners.values()) == {victim, other}, "12 connections by chance on one worker"
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        wait_replaced(agent, "worker", {victim}, 2)
        load.wait_ok(100)
        attempts = load.stop()
    theirs = {port for port, owner in owners.items() if owner == other}
    lost = {port for port, owner in owners.items() if owner == victim}
    # Nobody on the other worker noticed: same connections to the end.
    last = {a.thread: a for a in attempts if a.kind == "kept"}
    for thread, port in ports.items():
        assert (last[thread].port in theirs) == (port in theirs)
    failed = [a for a in attempts if not a.ok]
    # What was under way on the victim is lost; what began later is not, with a new connection.
    assert all(a.begin <= killed for a in failed), failed[:10]
    assert all(a.kind == "fresh" or a.port in lost for a in failed), failed[:10]
    assert all(a.torn == 0 for a in attempts if a.port in theirs)
    assert len([a for a in attempts if a.kind == "fresh" and a.begin > killed]) > 20
    assert agent.status()["restarts"] == {"brain": 0, "worker": 1}


def test_what_waits_for_a_dead_worker_is_answered_by_its_replacement(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(workers=2))
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    victim = agent.pids("worker")[0]
    os.kill(victim, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(HttpClient(client, VIP)) for _ in range(30)]
        for one in clients:
            one.send(b"GET /x HTTP/1.1\r\nhost: web\r\n\r\n")
        waiting = _queued(client)
        assert waiting, "30 connections by chance on one worker"
        os.kill(victim, signal.SIGKILL)
        assert [one.answer().status for one in clients] == [200] * 30


def _queued(pod: Pod) -> int:
    return sum(int(queued) for queued in re.findall(r"LISTEN\s+(\d+)", pod.run("ss", "-Hltn", "sport = :15001").stdout))


@contextlib.contextmanager
def no_worker(agent: Agent) -> Iterator[Callable[[], None]]:
    """Every worker that appears is killed: yields a function to be called again and again."""

    def kill() -> None:
        for pid in workers(agent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    kill()
    yield kill


def test_without_workers_open_is_released_and_put_back(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_pod(kept=0) as load:
        assert agent.is_healthy()
        died = time.monotonic()
        with no_worker(agent) as kill:

            def released() -> bool:
                kill()
                return any(a.ok and a.begin > died for a in load.attempts())

            wait_for(released, "a connection to go direct")
            gap = next(a for a in load.attempts() if a.ok and a.begin > died).begin - died
            assert GRACE_S - STEERING_SLACK_S < gap < GRACE_S + STEERING_SLACK_S

            def told() -> bool:
                kill()
                states = {w["workload"]: w["state"] for w in agent.status()["workloads"]}
                return states[f"{NAMESPACE}/client-1"] != "steered" and agent.get("/healthz")[0] == 503

            wait_for(told, "status and health to say so")
            kill()
            assert rules(client) == []
            assert listeners(client) == []
            direct = time.monotonic()
            load.wait_ok(20, since=direct, via=("proxy", "direct"))
        agent.wait_steered()
        load.wait_ok(20, via=("mesh",))
        attempts = load.stop()
    all_ok([a for a in attempts if a.begin > direct])
    assert agent.is_healthy()
    assert len(tables(client)) == 1


def test_without_workers_closed_refuses(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(), client={"failurePolicy": "closed"})
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    before = ruleset(client)
    with no_worker(agent) as kill:

        def closed() -> bool:
            kill()
            return not listeners(client)

        wait_for(closed, "the listeners to be closed")
        served = scene.served()
        with pytest.raises(ConnectionRefusedError):
            get(client, scene.server.ip, "/x", port=8080)
        assert scene.served() == served
    agent.wait_steered()
    wait_for(lambda: _answers(client, VIP), "the service to answer again")
    assert ruleset(client) == before


def test_workers_have_no_privilege(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1, workers=2))
    scene.mesh.start()
    for pid in scene.agent.pids("worker"):
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert all(int(uid) == 14539 for uid in status["Uid"].split())
        assert all(int(gid) == 14539 for gid in status["Gid"].split())
        assert status["Groups"].strip() == ""
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1"


# -- the whole agent -----------------------------------------------------------------------------------------


def kill_all(agent: Agent) -> float:
    """When the last process of the agent was killed. All of them are gone."""
    pids = [supervisor(agent), *children(supervisor(agent))]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    died = time.monotonic()
    assert agent.process is not None
    agent.process.wait()
    agent.stage.processes.remove(agent.process)
    agent.process = None
    wait_for(lambda: not any(map(alive, pids)), "the killed processes to be gone")
    return died


def test_a_killed_agent_leaves_open_workloads_direct(mesh_of: MeshOf) -> None:
    """However many there are: tables are closed side by side, not one after the other."""
    scene = Scene(mesh_of(workers=2))
    for number in range(19):
        scene.mesh.pod(f"idle-{number}", 0)
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_pod(fresh=4, kept=2) as load:
        died = kill_all(agent)
        load.wait_ok(50, since=died + RELEASE_S, via=("proxy", "direct"))
        late = [a for a in load.failed() if a.begin > died]
        gap_s = max((a.begin for a in late), default=died) - died
        print(f"the last failed attempt began {1000 * gap_s:.1f} ms after the death; {len(late)} in all")
        assert all(a.begin <= died + RELEASE_S for a in late), (died, late)
        assert rules(client) == []
        # A new agent puts order back by itself.
        agent.start()
        agent.wait_steered()
        back = time.monotonic()
        load.wait_ok(50, via=("mesh",))
        attempts = load.stop()
    all_ok([a for a in attempts if a.begin > died + RELEASE_S])
    assert {a.via for a in attempts if a.begin > back and a.kind == "fresh"} == {"mesh"}
    assert len(tables(client)) == 1
    assert _answers(client, VIP)


def test_a_killed_agent_leaves_open_servers_reachable(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(), client=None)
    scene.mesh.start()
    with scene.to_pod(fresh=4, kept=0) as load:
        died = kill_all(scene.mesh.agents[1])
        load.wait_ok(50, since=died + RELEASE_S, via=("direct",))
        attempts = load.stop()
    gap_s = max((a.begin for a in attempts if not a.ok), default=died) - died
    print(f"the last failed attempt began {1000 * gap_s:.1f} ms after the death")
    late = [a for a in attempts if a.begin > died + RELEASE_S]
    all_ok(late)
    assert {a.via for a in late} == {"direct"}


def test_a_mesh_client_of_a_killed_agent_gets_503_never_plaintext(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.mesh.start()
    assert get(scene.client, VIP, "/x").status == 200
    kill_all(scene.mesh.agents[1])
    wait_for(lambda: not rules(scene.server) and not listeners(scene.server), "the table and the listeners to go")
    served = scene.served()
    answer = get(scene.client, VIP, "/x")
    assert (answer.status, answer.get("x-netproxy-reason")) == (503, "UF")
    assert scene.served() == served


@pytest.mark.parametrize("cleaned", [True, False], ids=["clean", "restart"])
def test_a_killed_agent_leaves_closed_workloads_closed(mesh_of: MeshOf, cleaned: bool) -> None:
    scene = Scene(mesh_of(), client={"failurePolicy": "closed"})
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_pod() as load:
        before = tables(client)
        died = kill_all(agent)
        served = scene.served()
        load.wait(lambda found: sum(a.begin > died and a.kind == "fresh" for a in found) > 50, "50 attempts")
        assert not [a for a in load.attempts() if a.begin > died and a.ok]
        assert scene.served() == served, "something left the pod"
        assert tables(client) == before
        if cleaned:
            agent.node.run(*agent.command("clean"))
            _assert_clean(agent, client)
            load.wait_ok(20, via=("proxy", "direct"))
        agent.start()
        agent.wait_steered()
        load.wait_ok(20, via=("mesh",))
        load.stop()
    assert len(tables(client)) == 1
    assert len(vip_routes(client)) == 1
    assert _answers(client, VIP)


def test_a_killed_agent_leaves_closed_servers_closed(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(), client=None, server={"failurePolicy": "closed"})
    scene.mesh.start()
    agent = scene.mesh.agents[1]
    assert _answers(scene.client, scene.server.ip, 8080)
    kill_all(agent)
    # A dead process shows as such a moment before the last of its threads lets go of the sockets.
    wait_for(lambda: not listeners(scene.server), "the listeners to be closed")
    served = scene.served()
    with pytest.raises(ConnectionRefusedError):
        get(scene.client, scene.server.ip, "/x", port=8080)
    assert scene.served() == served
    agent.node.run(*agent.command("clean"))
    _assert_clean(agent, scene.server)
    assert _answers(scene.client, scene.server.ip, 8080)


def _assert_clean(agent: Agent, *pods: Pod) -> None:
    for pod in pods:
        assert tables(pod) == []
        assert vip_routes(pod) == []
    # The lock stays: an agent that is starting may wait for this very inode.
    assert [entry.name for entry in (agent.run_root / agent.name).iterdir()] == ["lock"]


def test_what_a_killed_agent_steered_and_nobody_wants_any_more_is_released(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(), client={"failurePolicy": "closed"})
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    kill_all(agent)
    assert tables(client)
    scene.mesh.drop("Workload", "client-1")
    agent.start()
    agent.wait_steered()
    wait_for(lambda: not tables(client), "the table of the killed agent to go")
    assert vip_routes(client) == []
    assert _answers(client, scene.server.ip, 8080)


# -- upgrade -------------------------------------------------------------------------------------------------


def test_an_upgrade_replaces_every_process_without_a_failed_call(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(workers=2))
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    before = ruleset(client)
    with scene.to_service(kept=4) as load:
        brain, both = {brain_of(agent)}, set(workers(agent))
        for _ in range(2):  # what was upgraded once can be upgraded again
            os.kill(supervisor(agent), signal.SIGUSR2)
            wait_replaced(agent, "brain", brain)
            wait_replaced(agent, "worker", both, 2)
            brain, both = {brain_of(agent)}, set(workers(agent))
            load.wait_ok(50)
        attempts = load.stop()
    all_ok(attempts)
    assert {a.via for a in attempts} == {"mesh"}
    assert agent.status()["supervisor_pid"] == supervisor(agent)
    assert ruleset(client) == before
    assert agent.stop() == 0
    assert tables(client) == []


def test_signals_while_the_supervisor_executes_itself_are_kept(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of())
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_pod(kept=0) as load:
        for _ in range(5):
            os.kill(supervisor(agent), signal.SIGUSR2)
        load.wait_ok(20)
        assert agent.stop() == 0
        load.wait_ok(20, via=("proxy", "direct"))
        all_ok(load.stop())
    assert tables(client) == []
    assert vip_routes(client) == []


def test_a_stop_just_after_the_death_of_the_brain_is_as_gentle(mesh_of: MeshOf) -> None:
    """Only a brain can take rules off without harm to what is under way: the stop waits for the next one."""
    scene = Scene(mesh_of())
    scene.mesh.start()
    agent, client = scene.agent, scene.client
    with scene.to_pod() as load:
        os.kill(brain_of(agent), signal.SIGKILL)
        assert agent.stop() == 0
        load.wait_ok(20, via=("proxy", "direct"))
        all_ok(load.stop())
    assert tables(client) == []
    assert vip_routes(client) == []
