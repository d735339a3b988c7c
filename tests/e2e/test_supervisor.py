"""What the supervisor must survive: upgrades with long-lived connections, few descriptors, a hostile folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.agent import Agent
from examples.stage import wait_for
from tests.e2e.mesh import Mesh, dial

MeshOf = Callable[..., Mesh]
VIP = "240.240.0.10"


def ready(agent: Agent) -> list[int]:
    """Workers that are ready; none while the brain, which tells, is being replaced."""
    try:
        return agent.pids("worker")
    except OSError:
        return []


def test_a_relay_that_outlives_an_upgrade_ends_well(mesh_of: MeshOf) -> None:
    mesh = mesh_of()
    client = mesh.pod("client-1", 0, app="client")
    server = mesh.pod("echo-1", 1, app="echo")
    ports = [{"name": "tcp", "port": 9000, "targetPort": 9000, "appProtocol": "tcp"}]
    mesh.put(mesh.service("echo", {"app": "echo"}, [VIP], ports))
    mesh.serve(server, "opaque", "9000", str(mesh.stage.folder / "journal"), "echo", port=9000)
    mesh.start()
    agent = mesh.agents[0]
    with dial(client, VIP, 9000) as sock:
        sock.sendall(b"before")
        assert sock.recv(100) == b"before"
        old = agent.pids("worker")
        assert agent.process is not None
        os.kill(agent.process.pid, signal.SIGUSR2)
        wait_for(lambda: ready(agent) and not set(ready(agent)) & set(old), "a new worker", 60)
        wait_for(agent.is_healthy, "the new brain")
        # New connections are the new worker's, this one is still the old one's.
        with dial(client, VIP, 9000) as other:
            other.sendall(b"new")
            assert other.recv(100) == b"new"
        sock.sendall(b"after")
        assert sock.recv(100) == b"after"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""
    wait_for(lambda: agent.metric("netproxy_downstream_connections") == 0, "all connections to be counted out")
    # Counted by two processes, lost by none.
    wait_for(
        lambda: agent.metric("netproxy_tcp_connections_closed_total", reporter="source", reason="OK") == 2,
        "both connections to be counted as well ended",
    )
    assert agent.stop() == 0
    # What was asked for is no fault of anybody.
    said = agent.log.read_text()
    assert not [line for line in said.splitlines() if ": error: " in line or ": warning: brain 0 ended" in line], said


def test_an_upgrade_to_a_program_that_can_not_be_loaded_is_refused(mesh_of: MeshOf, tmp_path: Path) -> None:
    mesh = mesh_of(nodes=1)
    mesh.pod("client-1", app="client")
    agent = mesh.agents[0]
    # A module that shadows one of ours, in a folder that only a later start of Python looks into.
    shadow = tmp_path / "shadow"
    os.environ["PYTHONPATH"] = str(shadow)
    try:
        mesh.start()
    finally:
        del os.environ["PYTHONPATH"]
    shadow.mkdir()
    (shadow / "uvloop.py").write_text("raise SystemExit(3)\n")
    before = agent.pids("worker") + agent.pids("brain")
    assert agent.process is not None
    os.kill(agent.process.pid, signal.SIGUSR2)
    wait_for(lambda: "upgrade: refused" in agent.log.read_text(), "the refusal", 60)
    assert agent.pids("worker") + agent.pids("brain") == before


def test_many_services_with_few_descriptors(mesh_of: MeshOf) -> None:
    """A new worker is sent every shard at once; that must not take a descriptor each."""
    mesh = mesh_of(nodes=1)
    mesh.pod("client-1", app="client")
    services = [mesh.service(f"s{n}", {"app": "x"}, [f"240.240.{n // 250 + 1}.{n % 250 + 1}"]) for n in range(1500)]
    mesh.put({"apiVersion": "v1", "kind": "List", "metadata": {"name": "all"}, "items": services})
    agent = mesh.agents[0]
    command = agent.command(
        "run", "-f", str(mesh.config), "--workers", "1", "--drain", "1",
        "--state-root", str(mesh.stage.folder / "state"), "--ca-dir", str(mesh.stage.folder / "ca"),
    )  # fmt: skip
    agent.process = agent.node.start("prlimit", "--nofile=512:512", *command, log=agent.log.name)
    agent.wait_steered("shop/client-1", timeout=60)
    supervisor = agent.process.pid
    for _ in range(2):
        (old,) = wait_for(lambda: ready(agent), "a worker", 60)
        os.kill(old, signal.SIGKILL)
        wait_for(lambda old=old: ready(agent) not in ([], [old]), "a new worker", 60)
    assert agent.process.poll() is None
    assert agent.process.pid == supervisor
    wait_for(lambda: len(agent.status()["services"]) == 1500, "all services")


def test_nothing_is_executed_from_the_current_folder(mesh_of: MeshOf, tmp_path: Path) -> None:
    mesh = mesh_of(nodes=1)
    mesh.pod("client-1", app="client")
    agent = mesh.agents[0]
    hostile, proof = tmp_path / "hostile", tmp_path / "proof"
    hostile.mkdir()
    for module in ("selectors", "uvloop", "pydantic", "netproxy", "redirect", "bcc"):
        (hostile / f"{module}.py").write_text(f"open({str(proof)!r}, 'a').write({module!r})\nraise SystemExit(3)\n")
    script = Path(sys.executable).parent / "netproxy"
    assert script.exists(), "the console script is installed"
    argv = agent.command("run", "-f", str(mesh.config), "--workers", "1", "--state-root", str(mesh.stage.folder / "s"))
    command = [str(script), *argv[argv.index("run") :]]
    agent.process = agent.node.start(*command, log=agent.log.name, cwd=hostile)
    agent.wait_steered("shop/client-1")
    (old,) = agent.pids("worker")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: ready(agent) not in ([], [old]), "a new worker")
    assert not proof.exists(), proof.read_text()
    found = subprocess.run(
        [str(script), "status", "--node", agent.name, "--run-root", str(agent.run_root)],
        cwd=hostile, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "client-1" in found.stdout
