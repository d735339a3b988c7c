"""The essential scenarios by each mechanism of steering, changing it, and what the node tells of it.

The rest of the suite runs with what `auto` chooses, and tests/kernel has every case of steering itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.agent import Agent
from examples.stage import Pod, wait_for
from redirect.bpf import links
from tests.e2e.load import VIP, Scene, listeners
from tests.e2e.mesh import NAMESPACE, Mesh, dial, get

MeshOf = Callable[..., Mesh]
ECHO = "240.240.0.20"
CLIENT, SERVER = f"{NAMESPACE}/client-1", f"{NAMESPACE}/web-1"
WITHOUT_BPF = Path(__file__).with_name("without_bpf.py")
by_each = pytest.mark.parametrize("steering", ["nftables", "iptables", "ebpf"])


def workload(agent: Agent, key: str = CLIENT) -> dict[str, Any]:
    return next(item for item in agent.status()["workloads"] if item["workload"] == key)


def rules(pod: Pod) -> str:
    saves = [f"{command}-legacy-save" for command in ("iptables", "ip6tables")]
    return "\n".join(pod.run(*command).stdout for command in (["nft", "list", "ruleset"], *([save] for save in saves)))


def is_ours(text: str) -> bool:
    return "netproxy-" in text or "np-" in text


def is_left(scene: Scene) -> bool:
    """Of the client's node: rules in its namespace, or hooks."""
    return is_ours(rules(scene.client)) or bool(links(scene.agent.name))


def checks(agent: Agent) -> dict[str, Any]:
    shown = subprocess.run(agent.command("check", "-o", "json"), capture_output=True, text=True, check=False).stdout
    return {item["name"]: item for item in json.loads(shown)["checks"]}


def goes_direct(scene: Scene) -> bool:
    answer = get(scene.client, scene.server.ip, "/x", port=8080)
    return answer.status == 200 and not answer.json()["meshed"]


@by_each
def test_traffic_goes_through_the_mesh(mesh_of: MeshOf, steering: str) -> None:
    mesh = mesh_of(steering=steering)
    scene = Scene(mesh)
    opaque = mesh.stage.folder / "opaque.journal"
    mesh.serve(scene.server, "opaque", "9000", str(opaque), "echo", port=9000)
    mesh.put(mesh.service("echo", {"app": "web"}, [ECHO], [{"port": 9000, "targetPort": 9000, "appProtocol": "tcp"}]))
    mesh.start()
    found = workload(scene.agent)
    assert found["steering"].startswith(steering)
    assert (found["failure_policy"], found["policy_in_force"]) == (
        "open",
        "closed" if steering == "iptables" else "open",
    )
    assert scene.agent.status()["steering"]["wanted"] == steering
    assert scene.agent.metric("netproxy_workload_steering", mechanism=found["steering"], workload=CLIENT) == 1
    assert get(scene.client, VIP, "/x").json()["meshed"]
    assert get(scene.client, scene.server.ip, "/x", port=8080).json()["meshed"]
    with dial(scene.client, ECHO, 9000) as sock:
        sock.sendall(b"opaque")
        assert sock.recv(100) == b"opaque"
    assert scene.agent.metric("netproxy_tcp_connections_opened_total") >= 1
    if steering == "ebpf":
        for result in ("steered", "inbound_steered", "bypass_proxy"):
            counted = [agent.metric("netproxy_steering_connections_total", result=result) for agent in mesh.agents]
            assert any(counted), result
        assert "connect4" in checks(scene.agent)["eBPF hooks"]["detail"]
    answer = scene.client.run("dig", "+short", "+tries=1", "@198.51.100.53", f"web.{NAMESPACE}").stdout
    assert answer.split() == [VIP]
    assert checks(scene.agent)[f"way out of {CLIENT}"]["ok"]
    # Inbound: plaintext of a stranger comes to the proxy too, which STRICT lets refuse it.
    scene.mesh.put(scene.mesh.peer_authentication("STRICT", app="web"))
    wait_for(lambda: get(scene.mesh.nodes[0], scene.server.ip, "/x", port=8080).status == 403, "the stranger's refusal")
    # Who breaks it is named.
    scene.client.run("nft", "add table inet odd; add chain inet odd in { type filter hook input priority 0; };"
                     "add rule inet odd in tcp dport 15001 reject with tcp reset")  # fmt: skip
    found = checks(scene.agent)[f"way out of {CLIENT}"]
    assert not found["ok"] and "inet odd in" in found["detail"]
    scene.client.run("nft", "delete", "table", "inet", "odd")
    # What is excluded goes its own way, at once and without a gap.
    scene.mesh.put(scene.mesh.peer_authentication("PERMISSIVE", app="web"))
    outside = {"traffic": {"outbound": {"excludePorts": [8080]}}}
    with scene.to_service() as load:
        scene.mesh.put(scene.mesh.workload(scene.client, app="client", **outside))
        wait_for(lambda: goes_direct(scene), "the exclusion to hold")
        load.wait_ok(10)
        assert load.failed() == []


@by_each
def test_stop_and_start(mesh_of: MeshOf, steering: str) -> None:
    """Who stops it by intention gets what he declared, whatever the mechanism."""
    scene = Scene(mesh_of(nodes=1, steering=steering))
    scene.mesh.start()
    with scene.to_pod() as load:
        load.wait_ok(10, via=("mesh",))
        assert scene.agent.stop() == 0
        load.wait_ok(10, via=("direct",))
        assert not is_left(scene)
        scene.agent.start()
        load.wait_ok(10, via=("mesh",))
        assert load.failed() == []


@by_each
def test_killed(mesh_of: MeshOf, steering: str) -> None:
    scene = Scene(mesh_of(nodes=1, steering=steering))
    scene.mesh.start()
    assert get(scene.client, VIP, "/x").json()["meshed"]
    scene.agent.kill_all()
    if steering != "iptables":
        if steering == "nftables":
            wait_for(lambda: not is_ours(rules(scene.client)), "the rules to go")
        else:
            assert links(scene.agent.name)
            wait_for(lambda: not listeners(scene.client), "the listeners to go")
        assert goes_direct(scene)
    else:
        assert is_ours(rules(scene.client))
        with pytest.raises(ConnectionRefusedError):
            dial(scene.client, scene.server.ip, 8080)
    # The next one takes over what is there.
    scene.agent.start()
    scene.agent.wait_steered(CLIENT, SERVER)
    assert get(scene.client, VIP, "/x").json()["meshed"]
    scene.agent.kill_all()
    done = subprocess.run(scene.agent.command("clean"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not is_left(scene)
    assert goes_direct(scene)


def test_changing_the_mechanism_refuses_nobody(mesh_of: MeshOf) -> None:
    mesh = mesh_of(nodes=1, steering="nftables")
    scene = Scene(mesh, server={"failurePolicy": "closed"})
    mesh.start()
    with scene.to_service() as load:
        for steering in ("iptables", "ebpf", "nftables", "ebpf", "iptables", "nftables", "auto"):
            mesh.put(mesh.mesh_config(steering=steering))
            expected = "ebpf" if steering == "auto" else steering
            wait_for(
                lambda steering=steering, expected=expected: (
                    scene.agent.status()["steering"]["wanted"] == steering
                    and all(workload(scene.agent, key)["steering"].startswith(expected) for key in (CLIENT, SERVER))
                ),
                f"{steering} to be in force",
            )
            load.wait_ok(10, via=("mesh",))
            # For kept connections that were redirected, hooks of netfilter stay.
            if expected != "ebpf":
                assert ("np-" in rules(scene.client)) is (expected == "iptables")
                assert ("netproxy-" in rules(scene.client)) is (expected == "nftables")
            assert "redirect" not in rules(scene.client).lower() or expected != "ebpf"
        assert load.failed() == []
    assert scene.agent.metric("netproxy_steering_repairs_total", workload=CLIENT) == 0


def test_where_bpf_is_refused_auto_takes_nftables_and_says_why(mesh_of: MeshOf) -> None:
    """And eBPF as soon as an agent is started that may have it."""
    scene = Scene(mesh_of(nodes=1, steering="auto"))
    agent = scene.agent
    agent.under = [sys.executable, str(WITHOUT_BPF)]
    scene.mesh.start()
    said = agent.status()["steering"]
    assert (said["wanted"], said["mechanism"]) == ("auto", "nftables")
    assert "ebpf can't be used: " in said["reason"] and "Operation not permitted" in said["reason"]
    assert said["reason"] in checks(agent)["steering"]["detail"]
    assert "ebpf can't be used: " in agent.log.read_text()
    assert agent.metric("netproxy_workload_steering", workload=CLIENT, mechanism="nftables", state="steered") == 1
    assert not links(agent.name)
    assert get(scene.client, VIP, "/x").json()["meshed"]
    assert agent.stop() == 0
    agent.under = []
    agent.start()
    agent.wait_steered(CLIENT, SERVER)
    assert get(scene.client, VIP, "/x").json()["meshed"]
    assert agent.status()["steering"]["mechanism"] == "ebpf"
    assert (workload(agent)["steering"], is_ours(rules(scene.client))) == ("ebpf", False)


def test_a_workload_may_be_steered_by_something_else(mesh_of: MeshOf) -> None:
    mesh = mesh_of(nodes=1, steering="nftables")
    scene = Scene(mesh, client={"steering": "iptables"})
    mesh.start()

    def steered_by() -> tuple[str, str]:
        client, server = (workload(scene.agent, key)["steering"].partition("-")[0] for key in (CLIENT, SERVER))
        return client, server

    assert steered_by() == ("iptables", "nftables")
    assert "steering: iptables is configured" in workload(scene.agent)["steering_reason"]
    assert scene.agent.status()["steering"]["mechanism"] == "nftables"
    with scene.to_service() as load:
        load.wait_ok(10, via=("mesh",))
        mesh.put(mesh.workload(scene.client, app="client"))
        wait_for(lambda: steered_by() == ("nftables", "nftables"), "the client to follow the mesh")
        load.wait_ok(10, via=("mesh",))
        mesh.put(mesh.workload(scene.server, app="web", steering="iptables"))
        wait_for(lambda: steered_by() == ("nftables", "iptables"), "the server to be another")
        load.wait_ok(10, via=("mesh",))
        assert load.failed() == []


@pytest.mark.parametrize("mechanism", ["nftables", "iptables-legacy"])  # what is told by events, and what is not
def test_flushed_under_load_it_is_back_within_two_seconds(
    mesh_of: MeshOf, mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of iptables, the variant is taken that the host's own command is.
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "iptables"
    command.write_text(f"#!/bin/sh\necho 'iptables v1.8.9 ({mechanism.replace('iptables-nft', 'nf_tables')})'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    mesh = mesh_of(nodes=1, steering=mechanism.partition("-")[0])
    scene = Scene(mesh, client={"failurePolicy": "closed"})
    mesh.start()
    assert workload(scene.agent)["steering"] == mechanism
    flush = ["iptables-legacy", "-w", "-t", "nat", "-F"] if "legacy" in mechanism else ["nft", "flush", "ruleset"]
    with scene.to_service(fresh=3, kept=0) as load:
        scene.client.run(*flush)
        wait_for(lambda: scene.agent.metric("netproxy_steering_repairs_total", workload=CLIENT) == 1, "the repair")
        load.wait_ok(10, via=("mesh",))
    gap = scene.agent.metric("netproxy_steering_last_gap_seconds", workload=CLIENT)
    assert 0 < gap < 2.0
    assert scene.agent.metric("netproxy_steering_gap_seconds_total", workload=CLIENT) == gap
    assert "after it was changed" in scene.agent.log.read_text()


def test_connections_older_than_the_rules_are_told(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    old = dial(scene.client, scene.server.ip, 8080)
    try:
        scene.mesh.start()
        local = f"{scene.client.ip}:{old.getsockname()[1]}"
        for key, first in (
            (CLIENT, {"local": local, "peer": f"{scene.server.ip}:8080"}),
            (SERVER, {"local": f"{scene.server.ip}:8080", "peer": local}),
        ):
            assert workload(scene.agent, key)["unsteered_connections"] == {
                "count": 1, "first": [first], "complete": True
            }  # fmt: skip
            assert scene.agent.metric("netproxy_unsteered_connections", workload=key) == 1
        with dial(scene.client, scene.server.ip, 8080), dial(scene.client, VIP, 80):
            assert get(scene.client, VIP, "/x").json()["meshed"]
            shown = subprocess.run(scene.agent.command("status"), capture_output=True, text=True, check=True).stdout
            assert "1 connection older than the rules" in " ".join(shown.split())
    finally:
        old.close()
    wait_for(lambda: scene.agent.metric("netproxy_unsteered_connections") == 0, "them to have ended")
