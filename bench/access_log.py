"""What the access log costs: CPU per request with it off, to a file, and to a pipe whose reader is stuck.

Three nodes with an agent (one worker) each, which differ in nothing else; on each a client in a pod calls an nginx in
another, that is no part of the mesh, so that a request passes one agent once. They take turns, a round each; CPU
time is the worker's, of all its threads, from /proc/<pid>/stat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench import _proc
from bench._chart import write_chart
from bench._figures import Figures, Round, document
from bench._machine import machine
from bench._question import PREFIX, Options, alone, check_writable, turns
from bench._report import Document
from examples.agent import Agent
from examples.stage import Node, Pod, Stage, wait_for

VIP = "240.240.0.10"
MODES = ("off", "file", "stuck")
_CLIENT = Path(__file__).with_name("_client.py")
_NGINX = """
daemon off; worker_processes 1; pid {folder}/{name}.pid; error_log {folder}/{name}.err crit;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000; keepalive_timeout 600; client_body_temp_path {folder}/{name}-body;
  proxy_temp_path {folder}/{name}-proxy; fastcgi_temp_path {folder}/{name}-f; uwsgi_temp_path {folder}/{name}-u;
  scgi_temp_path {folder}/{name}-s;
  server {{ listen 8080; location / {{ return 200 "{body}"; }} }}
}}
"""


@dataclass
class Mode:
    name: str
    agent: Agent
    client: Pod
    worker: int = 0
    rounds: list[Round] = field(default_factory=list)
    """CPU is the worker's alone, since nothing else of the agent differs."""

    def round(self, connections: int, seconds: float) -> None:
        before = _proc.cpu_us([self.worker])
        done = self.client.run(
            sys.executable, str(_CLIENT), VIP, "80", str(connections), str(seconds), timeout=seconds + 60
        )
        found = json.loads(done.stdout)
        self.rounds.append(
            {
                "rps": found["requests"] / found["seconds"],
                "cpu_us_per_request": (_proc.cpu_us([self.worker]) - before) / found["requests"],
                "failed": float(found["failed"]),
            }
        )

    def us(self) -> list[float]:
        return [found["cpu_us_per_request"] for found in self.rounds]


def set_up(stage: Stage, node: Node, name: str) -> Mode:
    folder = stage.folder / name
    folder.mkdir()
    client, server = stage.add_pod(f"{name}-client", node), stage.add_pod(f"{name}-server", node)
    objects = [
        {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "Workload",
            "metadata": {"name": pod.name, "namespace": "shop", "labels": {"app": pod.name}},
            "spec": {
                "node": node.netns,
                "addresses": pod.addresses,
                "serviceAccount": pod.name,
                **({"attach": {"netns": pod.path}} if pod is client else {}),
            },
        }
        for pod in (client, server)
    ]
    objects.append(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "selector": {"app": server.name},
                "clusterIP": VIP,
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "appProtocol": "http"}],
            },
        }
    )
    objects.append(
        {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "MeshConfig",
            "metadata": {"name": "mesh", "namespace": "netproxy-system"},
            "spec": {"accessLog": {"percent": 0 if name == "off" else 100}},
        }
    )
    (folder / "mesh.yaml").write_text(yaml.safe_dump_all(objects))
    conf = stage.folder / f"{name}.conf"
    conf.write_text(_NGINX.format(folder=stage.folder, name=name, body="x" * 64))
    server.start("nginx", "-p", str(stage.folder), "-c", str(conf), log=f"{name}-nginx.log")
    mode = Mode(name, Agent(stage, node, folder), client)
    mode.agent.start("--access-log", str(stage.folder / f"{name}.access"))
    return mode


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench access_log", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there, in the shape of all questions")
    parser.add_argument("--charts", metavar="FOLDER", help="also draw them there")
    options = parser.parse_args(arguments)
    check_writable(parser, options.json)
    with alone():
        made, rows = run(options.connections, options.seconds, options.rounds)
    if options.output == "json":
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(made, indent=2) + "\n")
    if options.charts:
        write_chart(made, Path(options.charts))


def result(options: Options, say: Callable[[str], None]) -> Document:
    """Two seconds are enough here: only the worker's CPU counts."""
    made, _ = run(32, min(2.0, options.seconds), options.rounds)
    say(f"{options.rounds} rounds done")
    return made


def run(connections: int, seconds: float, rounds: int) -> tuple[Document, list[dict[str, object]]]:
    figures = Figures("access_log", "file")
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder:
        # Nobody reads it, but somebody has it open.
        fifo = Path(folder) / "stuck.access"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with Stage(PREFIX, Path(folder), nodes=len(MODES)) as stage:
                modes = [set_up(stage, node, name) for node, name in zip(stage.nodes, MODES, strict=True)]
                for mode in modes:
                    mode.agent.wait_steered(f"shop/{mode.client.name}")
                    (mode.worker,) = mode.agent.pids("worker")
                    mode.round(connections, 0.2)  # connections to the endpoint, memory, caches
                    mode.rounds.clear()
                stuck = modes[MODES.index("stuck")]
                wait_for(lambda: fill(stuck), "the pipe and the queue to be full", 60)
                for number in range(rounds):
                    for mode in turns(modes, number):
                        mode.round(connections, seconds)
                rows = [row(mode, modes[0]) for mode in modes]
        finally:
            os.close(reader)
    for mode in modes:
        for found in mode.rounds:
            figures.add(mode.name, found)
    return document(figures, machine(())), rows


def fill(stuck: Mode) -> bool:
    stuck.round(32, 0.5)
    stuck.rounds.clear()
    return stuck.agent.metric("netproxy_access_log_dropped_total", reason="full") > 0


def row(mode: Mode, peer: Mode) -> dict[str, object]:
    us, others = mode.us(), peer.us()
    ratios = [mine / theirs for mine, theirs in zip(us, others, strict=True)]
    return {
        "log": mode.name,
        "cpu_us": round(statistics.median(us), 1),
        "cpu_us_min": round(min(us), 1),
        "cpu_us_max": round(max(us), 1),
        "more_us": round(statistics.median(us) - statistics.median(others), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "requests_s": round(statistics.median(found["rps"] for found in mode.rounds)),
        "failed": round(sum(found["failed"] for found in mode.rounds)),
        **mode.agent.status()["access_log"],
    }


def show(rows: list[dict[str, object]]) -> None:
    print(f"{'log':6} {'CPU us/request':>22} {'more':>7} {'ratio to off':>22} {'req/s':>7} {'failed':>7}  lines")
    for item in rows:
        cpu = f"{item['cpu_us']} ({item['cpu_us_min']}..{item['cpu_us_max']})"
        ratio = f"{item['ratio']} ({item['ratio_min']}..{item['ratio_max']})"
        print(
            f"{item['log']:6} {cpu:>22} {item['more_us']:>7} {ratio:>22} {item['requests_s']:>7} {item['failed']:>7}  "
            f"{item['written']} written, dropped {item['dropped']}"
        )
