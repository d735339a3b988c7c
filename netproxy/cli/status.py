"""``netproxy status``: what this node's agent does right now."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from .options import RUN_ROOT, Output, node_name, run_dir


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(self._path)


def fetch(path: str, target: str) -> bytes:
    """GET from the admin socket. Raises OSError when nobody answers there."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise OSError(f"{target}: {response.status} {body[:200]!r}")
        return body
    finally:
        connection.close()


def status(
    node: Annotated[str | None, typer.Option(help="Which node's agent; default: the host's name.")] = None,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="As given to `netproxy run`.")] = RUN_ROOT,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """Workloads and how each is steered, certificates, processes, rejected objects.

    Exit code 1 when the agent does not answer or is not healthy. Example: netproxy status --node node-a
    """
    path = os.path.join(run_dir(run_root, node_name(node)), "admin.sock")
    try:
        found: dict[str, Any] = json.loads(fetch(path, "/status"))
    except (OSError, http.client.HTTPException, ValueError) as exc:
        typer.echo(f"netproxy: no answer on {path}: {exc}", err=True)
        raise typer.Exit(1) from None
    if output is Output.json:
        typer.echo(json.dumps(found, indent=2))
    elif output is Output.yaml:
        typer.echo(yaml.safe_dump(found, sort_keys=False))
    else:
        _print(found)
    if not found["healthy"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 180)
    console.print(
        f"node [bold]{found['node']}[/]: {found['detail']}, HTTP/1 engine {found['engine']['http1']}, "
        f"configuration {found['config']['path']} ({found['config']['age_s']:.0f} s old)"
    )
    if found["config"]["error"]:
        console.print(f"[red]configuration not read: {found['config']['error']}[/]")
    if found["identity_error"]:
        console.print(f"[red]identity: {found['identity_error']}[/]")
    if found["state_error"]:
        console.print(f"[red]state can't be written: {found['state_error']}[/]")
    workloads = Table("workload", "state", "steering", "policy", "addresses", "identity", "certificate", "detail")
    for item in found["workloads"]:
        expires = item["certificate_not_after"]
        left = f"{(expires - time.time()) / 3600:.1f} h left" if expires else "none"
        colour = "green" if item["state"] == "steered" else "red"
        workloads.add_row(
            item["workload"],
            f"[{colour}]{item['state']}[/]",
            item["steering"],
            item["failure_policy"],
            " ".join(item["addresses"]),
            item["identity"],
            left,
            item["detail"],
        )
    console.print(workloads)
    processes = Table("process", "pid", "state", "age")
    processes.add_row("supervisor", str(found["supervisor_pid"]), "ready", "")
    for item in found["processes"]:
        processes.add_row(f"{item['role']} {item['slot']}", str(item["pid"]), item["state"], f"{item['age_s']:.0f} s")
    console.print(processes)
    services = Table("service", "virtual addresses", "ports")
    for item in found["services"]:
        ports = [f"{p['port']}/{p['protocol']} {p['ready']}/{p['endpoints']} ready" for p in item["ports"]]
        services.add_row(item["service"], " ".join(item["vips"]), ", ".join(ports))
    console.print(services)
    bad = [
        (o, c) for o in found["objects"] for c in o["conditions"] if c["status"] == "False" or c["type"] == "Warning"
    ]
    for item, condition in bad:
        console.print(
            f"[yellow]{item['file']}:{item['line']}: {item['object']}: {condition['type']}={condition['status']} "
            f"{condition['reason']}: {condition['message']}[/]"
        )
    for name in found["last_good"]:
        console.print(f"[yellow]{name}: its last good version is in force[/]")
    for error in found["rejected"]:
        console.print(f"[red]rejected: {error}[/]")
