"""The access log of whole agents: what both legs of a request say, and that no reader or disk holds a request up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.agent import Agent
from examples.stage import Pod, wait_for
from tests.e2e.load import Load
from tests.e2e.mesh import NAMESPACE, HttpClient, Mesh, dial, get

ROOT = Path(__file__).parents[2]
WEB, ECHO, GONE = "240.240.0.10", "240.240.0.11", "240.240.0.12"
CLIENT = "spiffe://cluster.local/ns/shop/sa/client"
SERVER = "spiffe://cluster.local/ns/shop/sa/web"
UNKNOWN = "10.80.2.254"
"""An address of no workload."""


class Logged:
    """A client, a server on the other node, and the access logs of both agents in files."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client: Pod = mesh.pod("client-1", 0, app="client")
        self.server: Pod = mesh.pod("web-1", 1, app="web")
        mesh.put(
            mesh.service("web", {"app": "web"}, [WEB]),
            mesh.route("web", [{"backendRefs": [{"name": "web", "port": 80}]}]),
            mesh.service(
                "echo",
                {"app": "web"},
                [ECHO],
                [{"name": "tcp", "port": 9000, "appProtocol": "tcp", "targetPort": 9000}],
            ),
            mesh.service("gone", {"app": "web"}, [GONE], [{"name": "http", "port": 80, "targetPort": 9999}]),
            mesh.mesh_config(accessLog={"percent": 100}),
        )
        mesh.serve(self.server, "witness", "8080", str(mesh.stage.folder / "witness.log"))
        mesh.serve(self.server, "opaque", "9000", str(mesh.stage.folder / "opaque.log"), "echo", port=9000)
        self.files = [mesh.stage.folder / f"access-{agent.node.name}.log" for agent in mesh.agents]
        for agent, file in zip(mesh.agents, self.files, strict=True):
            agent.start("--access-log", str(file))
        for agent in mesh.agents:
            agent.wait_steered(*mesh.attached(agent.name))

    @property
    def agent(self) -> Agent:
        return self.mesh.agents[0]

    def lines(self, leg: int) -> list[dict[str, Any]]:
        """Of the client's (0) or the server's (1) agent."""
        return lines_of(self.files[leg])

    def wait(self, leg: int, **fields: Any) -> dict[str, Any]:
        """The line of that leg that has these fields."""

        def found() -> dict[str, Any] | None:
            lines = [line for line in self.lines(leg) if all(line.get(k) == v for k, v in fields.items())]
            return lines[-1] if lines else None

        line: dict[str, Any] = wait_for(found, f"a line with {fields}")
        return line


def reset(pod: Pod, host: str, port: int = 9) -> None:
    """A connection that is refused."""
    with contextlib.suppress(ConnectionError), dial(pod, host, port) as sock:
        assert sock.recv(1) == b""


def lines_of(*files: Path) -> list[dict[str, Any]]:
    """Every line is JSON, also while it grows."""
    text = "".join(file.read_text() for file in files)
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    with Mesh(f"al{os.getpid() % 100000}", tmp_path_factory.mktemp("access")) as mesh:
        yield Logged(mesh)


def test_both_legs_of_a_request_agree(logged: Logged) -> None:
    answer = get(logged.client, WEB, "/one?x=1", "user-agent: probe/1", "x-request-id: 11-22")
    assert answer.status == 200
    near, far = (logged.wait(leg, path="/one?x=1") for leg in (0, 1))
    assert (near["reporter"], far["reporter"]) == ("source", "destination")
    for name in ("method", "path", "authority", "user_agent", "request_id", "response_code", "bytes_sent", "tls"):
        assert near[name] == far[name], name
    assert near["source"]["workload"] == far["source"]["workload"] == f"{NAMESPACE}/client-1"
    assert near["source"]["principal"] == far["source"]["principal"] == CLIENT
    assert near["destination"]["workload"] == far["destination"]["workload"] == f"{NAMESPACE}/web-1"
    assert near["destination"]["principal"] == far["destination"]["principal"] == SERVER
    assert near["destination"]["address"] == far["original_destination"] == f"{logged.server.ip}:8080"
    assert near["destination"]["service"] == f"{NAMESPACE}/web"
    assert near["original_destination"] == f"{WEB}:80"
    assert near["route_name"] == f"HTTPRoute {NAMESPACE}/web rule 0"
    for line, node in ((near, logged.mesh.agents[0]), (far, logged.mesh.agents[1])):
        assert (line["method"], line["authority"], line["user_agent"]) == ("GET", "web", "probe/1")
        assert (line["response_code"], line["response_flags"], line["response_code_details"]) == (
            200,
            "-",
            "via_upstream",
        )
        assert (line["request_id"], line["tls"], line["node"]) == ("11-22", "mutual_tls", node.name)
        assert 0 <= line["upstream_connect_ms"] <= line["response_head_ms"] <= line["duration_ms"]
        assert line["bytes_sent"] == len(answer.body)


def test_a_request_id_of_ours_is_the_same_on_both_legs(logged: Logged) -> None:
    assert get(logged.client, WEB, "/numbered").status == 200
    near, far = (logged.wait(leg, path="/numbered") for leg in (0, 1))
    assert near["request_id"] == far["request_id"] != ""


def test_refusals(logged: Logged) -> None:
    assert get(logged.client, GONE, "/refused").status == 503
    # The agent at the server has refused; to the one at the client it is an answer like others.
    line = logged.wait(1, path="/refused")
    assert (line["response_code"], line["response_flags"], line["reason"]) == (503, "UF", "CONNECT_FAILED")
    assert line["response_code_details"] == "upstream_reset_before_response_started{connection_failure}"
    assert f"{logged.server.ip}:9999" in line["detail"]
    line = logged.wait(0, path="/refused")
    assert (line["response_code"], line["response_flags"], line["response_code_details"]) == (503, "-", "via_upstream")
    with HttpClient(logged.client, WEB) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n")
        assert client.answer().status == 400
    line = logged.wait(0, response_code=400)
    assert (line["response_flags"], line["source"]["principal"]) == ("DPE", CLIENT)
    reset(logged.client, WEB, 81)
    line = logged.wait(0, original_destination=f"{WEB}:81")
    assert (line["protocol"], line["reason"], line["response_flags"]) == ("TCP", "NO_ROUTE", "NR")
    assert "response_code" not in line
    reset(logged.client, UNKNOWN)
    line = logged.wait(0, original_destination=f"{UNKNOWN}:9")
    assert (line["reason"], line["response_flags"], line["tls"]) == ("CONNECT_FAILED", "UF", "none")
    assert line["detail"].startswith(f"{UNKNOWN}:9: ")


def test_an_opaque_connection(logged: Logged) -> None:
    with dial(logged.client, ECHO, 9000) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
    near, far = (logged.wait(leg, protocol="TCP", bytes_sent=5) for leg in (0, 1))
    for line in (near, far):
        assert (line["bytes_received"], line["tls"]) == (5, "mutual_tls")
        assert (line["source"]["principal"], line["destination"]["principal"]) == (CLIENT, SERVER)
    assert near["destination"]["service"] == f"{NAMESPACE}/echo"


def test_rotation_loses_no_line(logged: Logged) -> None:
    file = logged.files[0]
    agent = logged.agent
    assert agent.process is not None
    begun = len(logged.lines(0))
    moved = []
    with Load(logged.client, WEB, fresh=1, kept=2) as load:
        for number in range(3):
            moved.append(file.with_suffix(f".{number}"))
            file.rename(moved[-1])
            os.kill(agent.process.pid, signal.SIGHUP)
            wait_for(lambda: file.exists() and file.stat().st_size, "lines in the new file")
            load.wait_ok(10)
        served = load.stop()
    assert not load.failed()
    sent = len(served) + sum(attempt.torn for attempt in served)
    wait_for(lambda: len(lines_of(*moved, file)) - begun >= sent, "all lines")
    assert len(lines_of(*moved, file)) - begun == sent
    # An upgrade keeps it.
    (old,) = agent.pids("worker")
    os.kill(agent.process.pid, signal.SIGUSR2)
    wait_for(lambda: is_replaced(agent, old), "a new worker")
    assert get(logged.client, WEB, "/upgraded").status == 200
    logged.wait(0, path="/upgraded")
    # Where it can't be opened anew, what is open stays in use.
    file.rename(file.with_suffix(".last"))
    file.mkdir()
    os.kill(agent.process.pid, signal.SIGHUP)
    wait_for(lambda: "Is a directory" in agent.status()["access_log"]["error"], "the error in the status")
    assert get(logged.client, WEB, "/kept-open").status == 200
    wait_for(lambda: "/kept-open" in file.with_suffix(".last").read_text(), "the line in the old file")
    file.rmdir()
    os.kill(agent.process.pid, signal.SIGHUP)
    wait_for(lambda: not agent.status()["access_log"]["error"], "the error to be gone")


def test_log_level_at_run_time(logged: Logged) -> None:
    agent = logged.agent

    def verb(*argv: str) -> str:
        return subprocess.run(agent.command(*argv), capture_output=True, text=True, check=True).stdout.strip()

    def change() -> str:
        """Something new in the configuration; its name."""
        name = f"svc-{len(logged.mesh.objects)}"
        logged.mesh.put(logged.mesh.service(name, {"app": "none"}, [f"240.240.1.{len(logged.mesh.objects)}"]))
        wait_for(lambda: any(name in item["service"] for item in agent.status()["services"]), name)
        return name

    assert verb("log-level") == "info"
    quiet = change()
    assert verb("log-level", "debug") == "debug"
    loud = change()
    wait_for(lambda: f"worker: debug: service/{NAMESPACE}/{loud}" in agent.log.read_text(), "a worker to tell")
    assert f"brain: debug: published service/{NAMESPACE}/{loud}" in agent.log.read_text()
    reset(logged.client, UNKNOWN)
    wait_for(lambda: "could not reach" in agent.log.read_text(), "the dial that failed")
    # What starts later has it too.
    (worker,) = agent.pids("worker")
    told = agent.log.read_text().count("is in force")
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: agent.log.read_text().count("is in force") > told, "the new worker to tell")
    wait_for(agent.is_steered, "the agent to be well")
    assert verb("log-level", "warning", "-o", "json") == '{\n  "level": "warning"\n}'
    assert agent.status()["log_level"] == "warning"
    (brain,) = agent.pids("brain")
    os.kill(brain, signal.SIGKILL)
    wait_for(lambda: agent.is_healthy() and agent.pids("brain") not in ([], [brain]), "a new brain")
    assert verb("log-level") == "warning"
    assert verb("log-level", "info") == "info"
    assert quiet not in agent.log.read_text().partition(loud)[0]


def test_config_dump_has_no_key(logged: Logged) -> None:
    agent = logged.agent
    code, body = agent.get("/config_dump")
    assert code == 200
    assert b"PRIVATE KEY" not in body
    dump = json.loads(body)
    shards = {shard["key"]: shard for shard in dump["shards"]}
    assert shards[f"svid/{CLIENT}"]["body"]["key_pem"] == "[redacted]"
    assert shards[f"svid/{CLIENT}"]["body"]["chain_pem"].startswith("-----BEGIN CERTIFICATE")
    assert shards["mesh"]["body"]["access_log"]["percent"] == 100
    assert all(shard["version"] == shard["held"] for shard in shards.values())
    _, one = agent.get(f"/config_dump?kind=service&name={NAMESPACE}/web")
    assert [shard["key"] for shard in json.loads(one)["shards"]] == [f"service/{NAMESPACE}/web"]
    assert agent.get("/config_dump?name=none/none")[0] == 404
    found = subprocess.run(agent.command("config-dump", "--kind", "svid"), capture_output=True, text=True, check=True)
    assert CLIENT in found.stdout and "the same" in found.stdout


@pytest.mark.parametrize("target", ["full", "fifo", "stdout"])
def test_a_log_that_takes_nothing_costs_no_request(mesh_of: Callable[..., Mesh], target: str) -> None:
    """A full disk, a FIFO whose reader has stopped, and one pipe of both our outputs that nobody reads."""
    mesh = mesh_of(nodes=1)
    client, server = mesh.pod("client-1", app="client"), mesh.pod("web-1", app="web")
    mesh.put(mesh.service("web", {"app": "web"}, [WEB]), mesh.mesh_config(accessLog={"percent": 100}))
    mesh.serve(server, "witness", "8080", str(mesh.stage.folder / "witness.log"))
    (agent,) = mesh.agents
    reader = -1
    if target == "full":
        agent.start("--access-log", "/dev/full")
    elif target == "fifo":
        fifo = mesh.stage.folder / "fifo"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        agent.start("--access-log", str(fifo))
    else:
        reader, writer = os.pipe()
        command = agent.command("run", "-f", str(agent.config), "--ca-dir", str(mesh.stage.folder / "ca"))
        command += ["--state-root", str(mesh.stage.folder / "state"), "--workers", "1", "--drain", "5"]
        with os.fdopen(writer, "wb", 0) as pipe:
            agent.process = subprocess.Popen(agent.node.command(*command), stdout=pipe, stderr=pipe, cwd=ROOT)
        mesh.stage.processes.append(agent.process)
        agent.log.write_text("")
    agent.wait_steered(f"{NAMESPACE}/client-1", f"{NAMESPACE}/web-1")
    reason = "ENOSPC" if target == "full" else "full"
    with Load(client, WEB, fresh=2, kept=2) as load:
        while not agent.metric("netproxy_access_log_dropped_total", reason=reason):
            client.run(sys.executable, "-c", FLOOD, WEB)
        load.wait_ok(40)
        if target == "stdout":
            # Every process of the agent has something to say now, and nobody reads it.
            for level in ("debug", "info"):
                subprocess.run(agent.command("log-level", level), check=True, capture_output=True)
            mesh.put(mesh.service("more", {"app": "more"}, ["240.240.0.20"]))
            wait_for(lambda: len(agent.status()["services"]) == 2, "the change of the configuration")
            load.wait_ok(40)
    assert not load.failed()
    assert agent.status()["access_log"]["dropped"][reason] > 0
    # A thread that is stuck keeps no process alive, neither at a replacement nor at the end.
    if target == "stdout":
        (old,) = agent.pids("worker")
        assert agent.process is not None
        os.kill(agent.process.pid, signal.SIGUSR2)
        wait_for(lambda: is_replaced(agent, old), "a new worker")
        wait_for(agent.is_healthy, "the agent to be well")
        # Nor is what it still had lost uncounted.
        wait_for(lambda: "stuck" in agent.status()["access_log"]["dropped"], "the last lines of the old worker")
    assert agent.stop(timeout=15) == 0
    if reader >= 0:
        os.close(reader)


def is_replaced(agent: Agent, pid: int) -> bool:
    try:
        status = agent.status()
    except OSError:
        return False  # the brain is replaced too
    workers = [item for item in status["processes"] if item["role"] == "worker"]
    return bool(workers) and all(item["pid"] != pid and item["state"] == "ready" for item in workers)


FLOOD = """
import socket, sys
sock = socket.create_connection((sys.argv[1], 80), 20)
request = b"GET /" + b"x" * 1000 + b" HTTP/1.1\\r\\nhost: web\\r\\nuser-agent: " + b"x" * 250 + b"\\r\\n\\r\\n"
for _ in range(60):
    sock.sendall(request * 20)
    left = 20
    data = b""
    while left:
        data = data[-40:] + sock.recv(65536)
        count = data.count(b"HTTP/1.1 200")
        left -= count
        data = data[data.rfind(b"HTTP/1.1 200") + 12:] if count else data
"""
