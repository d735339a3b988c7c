"""What steering holds against: link-local neighbours, attempts that fail, and others who flush it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.agent import Agent
from examples.stage import Pod, wait_for
from redirect.netfilter import nft
from tests.e2e.load import VIP, Scene, ruleset, tables, vip_routes
from tests.e2e.mesh import NAMESPACE, HttpClient, Mesh, dial, get, wait_listening

MeshOf = Callable[..., Mesh]
CLIENT, SERVER = f"{NAMESPACE}/client-1", f"{NAMESPACE}/web-1"


def workload(agent: Agent, key: str) -> dict[str, object]:
    found: dict[str, dict[str, object]] = {item["workload"]: item for item in agent.status()["workloads"]}
    return found.get(key, {"state": "", "detail": ""})


def is_failed(agent: Agent, key: str) -> bool:
    try:
        return workload(agent, key)["state"] == "failed"
    except OSError:
        return False  # it does not listen yet


def repairs(agent: Agent, key: str) -> float:
    return agent.metric("netproxy_steering_repairs_total", workload=key)


def link_local_of(pod: Pod) -> str:
    def found() -> str:
        shown = pod.run("ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link").stdout.split()
        return "" if not shown or "tentative" in shown else shown[3].partition("/")[0]

    return str(wait_for(found, f"a link-local address of {pod.name}"))


# -- link-local ----------------------------------------------------------------------------------------------


def serve_both(web: Pod, journal: Path) -> None:
    """An app that listens in both families, and tells `journal` of each connection."""
    program = (
        "import socket, sys\n"
        "listener = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "while True:\n"
        "    sock = listener.accept()[0]\n"
        "    sock.sendall(b'HTTP/1.1 200 OK\\r\\ncontent-length: 7\\r\\n\\r\\nreached')\n"
        "    open(sys.argv[1], 'a').write('x')\n"
        "    sock.close()\n"
    )
    web.start("python3", "-c", program, str(journal))
    wait_listening(web, 8080)


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_a_neighbour_does_not_reach_a_strict_app_over_link_local(mesh_of: MeshOf, policy: str) -> None:
    """The pods have IPv4 only; a link-local address comes by itself."""
    mesh = mesh_of(nodes=1)
    neighbour = mesh.pod("neighbour", 0, attach=False)
    web = mesh.pod("web-1", 0, app="web", failurePolicy=policy)
    mesh.put(mesh.peer_authentication("STRICT", app="web"))
    journal = mesh.stage.folder / "seen"
    serve_both(web, journal)
    mesh.start()
    for scope in ("", "%25eth0"):
        address = web.ip if not scope else f"[{link_local_of(web)}{scope}]"
        done = neighbour.run("curl", "-sgim", "5", f"http://{address}:8080/x", check=False)
        assert "reached" not in done.stdout and " 200 " not in done.stdout, done.stdout
    assert not journal.exists()
    assert workload(mesh.agents[0], SERVER)["families"] == [4]


def test_a_permissive_app_is_not_reachable_over_link_local_either(mesh_of: MeshOf) -> None:
    """The proxy cannot dial it onwards, since nobody told it the interface: it refuses."""
    mesh = mesh_of(nodes=1)
    neighbour = mesh.pod("neighbour", 0, attach=False)
    web = mesh.pod("web-1", 0, app="web")
    journal = mesh.stage.folder / "seen"
    serve_both(web, journal)
    mesh.start()
    assert "reached" in neighbour.run("curl", "-sgm", "5", f"http://{web.ip}:8080/x").stdout
    seen = journal.read_text()
    done = neighbour.run("curl", "-sgim", "5", f"http://[{link_local_of(web)}%25eth0]:8080/x", check=False)
    assert "reached" not in done.stdout and " 200 " not in done.stdout
    assert journal.read_text() == seen


# -- what can't be steered -----------------------------------------------------------------------------------


def assert_closed(scene: Scene) -> None:
    """Nobody gets out of the client, nobody in plaintext into the server."""
    served = scene.served()
    with pytest.raises(OSError):  # refused, or without a route
        get(scene.client, scene.server.ip, "/x", port=8080)
    with pytest.raises(ConnectionRefusedError):
        dial(scene.mesh.nodes[0], scene.client.ip, 9999)
    assert scene.served() == served


def test_closed_stays_closed_while_there_is_no_certificate(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1), client={"failurePolicy": "closed"}, server=None)
    agent = scene.agent
    ca = Path(scene.mesh.stage.folder / "ca")
    ca.write_text("not a folder")
    agent.start()
    wait_for(lambda: is_failed(agent, CLIENT), "the workload to fail")
    wait_for(lambda: tables(scene.client), "rules to be there")
    assert_closed(scene)
    assert "certificate" in str(wait_for(lambda: is_failed(agent, CLIENT) and workload(agent, CLIENT)["detail"], "why"))
    code, body = agent.get("/healthz")
    assert code == 503 and CLIENT.encode() in body
    ca.unlink()
    agent.wait_steered(CLIENT)
    assert get(scene.client, scene.server.ip, "/x", port=8080).status == 200
    wait_for(lambda: agent.get("/healthz")[0] == 200, "health")


def test_closed_stays_closed_while_a_port_is_taken(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1), client={"failurePolicy": "closed"}, server=None)
    agent = scene.agent
    thief = scene.client.start("python3", "-m", "http.server", "15006", "--bind", "127.0.0.1")
    wait_listening(scene.client, 15006)
    agent.start()
    wait_for(lambda: is_failed(agent, CLIENT), "the workload to fail")
    wait_for(lambda: tables(scene.client), "rules to be there")
    assert_closed(scene)
    assert agent.get("/healthz")[0] == 503
    # Who changes the policy is not held to the old one.
    workload_of = scene.mesh.workload(scene.client, app="client", failurePolicy="open")
    scene.mesh.put(workload_of)
    wait_for(lambda: not tables(scene.client), "the rules to go")
    assert get(scene.client, scene.server.ip, "/x", port=8080).status == 200
    workload_of["spec"]["failurePolicy"] = "closed"
    scene.mesh.put(workload_of)
    wait_for(lambda: tables(scene.client), "rules to be there again")
    scene.mesh.stage.stop(thief)
    agent.wait_steered(CLIENT)
    assert get(scene.client, scene.server.ip, "/x", port=8080).status == 200


# -- who flushes it ------------------------------------------------------------------------------------------


def test_flushed_rules_of_closed_are_put_back(mesh_of: MeshOf) -> None:
    mesh = mesh_of(nodes=1, steering="nftables")
    scene = Scene(mesh, server={"failurePolicy": "closed"}, client={"failurePolicy": "closed"})
    outsider = mesh.pod("outsider", 0, attach=False)
    mesh.put(mesh.peer_authentication("STRICT", app="web"))
    mesh.start()
    for pod, key in ((scene.server, SERVER), (scene.client, CLIENT)):
        assert repairs(scene.agent, key) == 0
        pod.run("nft", "flush", "ruleset")
        wait_for(lambda pod=pod: tables(pod), "the rules to be put back")
        wait_for(lambda key=key: repairs(scene.agent, key) == 1, "the repair to be counted")
    assert get(scene.client, VIP, "/x").json()["meshed"]
    served = scene.served()
    with HttpClient(outsider, scene.server.ip, 8080) as client:
        client.send(b"GET /x HTTP/1.1\r\nhost: web\r\n\r\n")
        assert client.answer().status == 403
    assert scene.served() == served
    assert "repaired" in scene.agent.log.read_text()


def test_flushed_routes_are_put_back(mesh_of: MeshOf) -> None:
    """Of policy ``open``, whose tables nobody else can flush."""
    scene = Scene(mesh_of(nodes=1, steering="nftables"))
    scene.mesh.start()
    before = ruleset(scene.client)
    scene.client.run("nft", "flush", "ruleset")
    scene.client.run("ip", "route", "flush", "proto", str(78))
    # An event tells it: by the time somebody else looks, they may be back.
    wait_for(lambda: repairs(scene.agent, CLIENT) == 1, "the repair to be counted")
    wait_for(lambda: vip_routes(scene.client), "the routes to be put back")
    assert ruleset(scene.client) == before
    assert get(scene.client, VIP, "/x").json()["meshed"]


def test_a_released_table_of_open_is_made_anew_and_owned(mesh_of: MeshOf) -> None:
    """An owner that died without us: the new table is the supervisor's, and goes with it."""
    scene = Scene(mesh_of(nodes=1, steering="nftables"))
    scene.mesh.start()
    (name,) = tables(scene.client)
    node, generation = nft.parse_table_name(name) or ("", 0)
    # A foreign table of a later generation is drift: ours is newer afterwards, and owned.
    scene.client.run("nft", "add", "table", "inet", nft.table_name(node, generation + 1))
    wait_for(lambda: tables(scene.client) == [nft.table_name(node, generation + 2)], "one new table")
    wait_for(lambda: repairs(scene.agent, CLIENT) == 1, "the repair to be counted")
    assert get(scene.client, VIP, "/x").json()["meshed"]
    scene.agent.kill_all()
    wait_for(lambda: not tables(scene.client), "the table to go with its owner")


# -- who waits for nobody ------------------------------------------------------------------------------------


def _link_exists(mesh: Mesh, pod: Pod) -> bool:
    name = f"v{pod.ip.rpartition('.')[2]}"
    return mesh.nodes[0].run("ip", "link", "show", name, check=False).returncode == 0


def test_deleted_namespaces_are_let_go_while_a_worker_hangs(mesh_of: MeshOf) -> None:
    """New workloads wait for it; nobody else does."""
    mesh = mesh_of(nodes=1)
    scene = Scene(mesh)
    gone = mesh.pod("gone-1", 0)
    mesh.start()
    (worker,) = scene.agent.pids("worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        late = [mesh.pod(f"late-{number}", 0) for number in range(3)]
        wait_for(
            lambda: all(workload(scene.agent, f"{NAMESPACE}/{pod.name}")["state"] == "attaching" for pod in late),
            "all to be brought up at the same time",
        )
        # The one that hangs keeps its own sockets in the namespace: look at what the others hold.
        mesh.stage.remove_pod("gone-1")
        begin = time.monotonic()
        wait_for(lambda: workload(scene.agent, f"{NAMESPACE}/{gone.name}")["state"] == "absent", "it to be let go", 2.0)
        assert time.monotonic() - begin < 2.0
        assert workload(scene.agent, f"{NAMESPACE}/{late[0].name}")["state"] == "attaching"
    finally:
        os.kill(worker, signal.SIGCONT)
    wait_for(lambda: not _link_exists(mesh, gone), "the veth to go")
    scene.agent.wait_steered(*(f"{NAMESPACE}/{pod.name}" for pod in late))


def test_a_namespace_deleted_during_a_drain_is_let_go(mesh_of: MeshOf) -> None:
    mesh = mesh_of(nodes=1)
    scene = Scene(mesh)
    gone = mesh.pod("gone-1", 0)
    scene.agent.drain_s = 30.0
    mesh.start()
    with HttpClient(scene.client, VIP, timeout=30) as held:
        held.send(b"GET /hold/one HTTP/1.1\r\nhost: web\r\n\r\n")
        wait_for(lambda: scene.holding("one"), "the request to be under way")
        assert scene.agent.process is not None
        scene.agent.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "redirect" not in ruleset(scene.client), "the rules to go")
        mesh.stage.remove_pod(gone.name)
        wait_for(lambda: not _link_exists(mesh, gone), "the veth to go", 5.0)
        assert scene.agent.process.poll() is None, "a request is still under way"
        scene.go_on("one")
        assert held.answer().status == 200
    assert scene.agent.process.wait(20.0) == 0
    journal = json.loads((scene.agent.run_root / scene.agent.name / "journal.json").read_text())
    assert journal["workloads"] == {}
