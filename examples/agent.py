"""A node agent on a stage: start it, ask it, stop it, kill it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from examples.stage import Node, Stage, wait_for

_ROOT = Path(__file__).resolve().parent.parent


class Agent:
    """``netproxy run`` on a node of the stage. Folders: ``<stage>/run``, ``state``, ``ca`` (shared), logs beside."""

    def __init__(self, stage: Stage, node: Node, config: Path, *, workers: int = 1, drain_s: float = 5.0) -> None:
        self.stage, self.node, self.config = stage, node, config
        self.workers, self.drain_s = workers, drain_s
        self.run_root = stage.folder / "run"
        self.log = stage.folder / f"{node.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.under: list[str] = []
        """A command that runs the agent."""

    @property
    def name(self) -> str:
        """As the agent knows it, and its tables are called."""
        return self.node.netns

    def command(self, verb: str, *argv: str) -> list[str]:
        return [sys.executable, "-m", "netproxy", verb, "--node", self.name, "--run-root", str(self.run_root), *argv]

    def start(self, *argv: str) -> None:
        command = self.command(
            "run",
            *("-f", str(self.config), "--ca-dir", str(self.stage.folder / "ca")),
            *("--state-root", str(self.stage.folder / "state"), "--workers", str(self.workers)),
            *("--drain", str(self.drain_s), *argv),
        )
        self.process = self.node.start(*self.under, *command, log=self.log.name, cwd=_ROOT)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM, as systemd does. Its exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        return self.stage.stop(process, timeout=timeout)

    def kill_all(self) -> None:
        """SIGKILL to every process of the agent at once."""
        assert self.process is not None
        pids = [p["pid"] for p in self.status()["processes"]]
        for pid in [self.process.pid, *pids]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.stage.processes.remove(self.process)
        self.process = None
        wait_for(lambda: not any(alive(pid) for pid in pids), "the killed processes to be gone")

    def pids(self, role: str) -> list[int]:
        """Of ``brain`` or ``worker``, those that are ready."""
        return [p["pid"] for p in self.status()["processes"] if p["role"] == role and p["state"] == "ready"]

    def get(self, target: str) -> tuple[int, bytes]:
        """GET on the admin socket. Raises OSError when nobody answers."""
        connection = http.client.HTTPConnection("localhost", timeout=5)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5)
        try:
            connection.sock.connect(str(self.run_root / self.name / "admin.sock"))
            connection.request("GET", target)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as exc:
            raise OSError(str(exc)) from exc
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/status")[1])
        return found

    def is_healthy(self) -> bool:
        try:
            return self.get("/healthz")[0] == 200
        except OSError:
            return False

    def is_steered(self, *workloads: str) -> bool:
        """All local workloads (or those named ``namespace/name``) are steered, brain and all workers ready."""
        try:
            status = self.status()
        except OSError:
            return False
        states = {item["workload"]: item["state"] for item in status["workloads"]}
        ready = [p["role"] for p in status["processes"] if p["state"] == "ready"]
        if "brain" not in ready or ready.count("worker") < self.workers:
            return False  # before its first look a brain knows of no workload at all
        wanted = workloads or tuple(states)
        return all(states.get(name) == "steered" for name in wanted)

    def wait_steered(self, *workloads: str, timeout: float = 30.0) -> None:
        try:
            wait_for(lambda: self.is_steered(*workloads), f"{self.name} to steer its workloads", timeout)
        except TimeoutError as exc:
            raise TimeoutError(f"{exc}\n{self.tail()}") from None

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of this sample name whose labels include `labels`."""
        total = 0.0
        for family in text_string_to_metric_families(self.get("/metrics")[1].decode()):
            for sample in family.samples:
                if sample.name == name and all(sample.labels.get(k) == v for k, v in labels.items()):
                    total += sample.value
        return total


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
