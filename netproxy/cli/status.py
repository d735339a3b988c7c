"""``netproxy status``: what this node's agent does right now."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.table import Table

from ..logfile import STDOUT
from .ask import admin_socket, ask_agent, console, show
from .options import RUN_ROOT, Output, counted


def status(
    node: Annotated[str | None, typer.Option(help="Which node's agent; default: the host's name.")] = None,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="As given to `netproxy run`.")] = RUN_ROOT,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """Workloads and how each is steered, certificates, processes, rejected objects.

    Exit code 1 when the agent does not answer or is not healthy. Example: netproxy status --node node-a
    """
    found: dict[str, Any] = ask_agent(admin_socket(run_root, node), "/status")
    show(found, output, _print)
    if not found["healthy"]:
        raise typer.Exit(1)


def _policy(item: dict[str, Any]) -> str:
    """As declared, and what is in force where that is something else."""
    declared, in_force = str(item["failure_policy"]), item["policy_in_force"]
    return declared if in_force in ("", declared) else f"{declared} (in force: {in_force})"


def _balanced(port: dict[str, Any], mechanism: str) -> str:
    return ", balanced by eBPF" if mechanism == "ebpf" and not port["needs_proxy"] else ""


def _print(found: dict[str, Any]) -> None:
    out = console()
    out.print(
        f"node [bold]{found['node']}[/]: {found['detail']}, HTTP/1 engine {found['engine']['http1']}, "
        f"HTTP/2 engine {found['engine']['http2']}, relay {found['engine']['relay']}, "
        f"TCP streams {found['engine']['streams']}, "
        f"configuration {found['config']['path']} ({found['config']['age_s']:.0f} s old)"
    )
    steering = found["steering"]
    out.print(f"steering: {steering['mechanism']} ({steering['wanted']}): {steering['reason']}")
    if found["config"]["error"]:
        out.print(f"[red]configuration not read: {found['config']['error']}[/]")
    if found["identity_error"]:
        out.print(f"[red]identity: {found['identity_error']}[/]")
    if found["state_error"]:
        out.print(f"[red]state can't be written: {found['state_error']}[/]")
    log = found["access_log"]
    dropped = ", ".join(f"{n} lost ({reason})" for reason, n in log["dropped"].items())
    target = "standard output" if log["target"] == STDOUT else log["target"]
    out.print(
        f"log level {found['log_level']}, access log to {target}: {counted(log['written'], 'line')} written"
        f"{f', [yellow]{dropped}[/]' if dropped else ''}"
    )
    if log["error"]:
        out.print(f"[red]access log not opened anew: {log['error']}; what was open stays in use[/]")
    workloads = Table("workload", "state", "steering", "policy", "addresses", "identity", "certificate", "detail")
    for item in found["workloads"]:
        expires = item["certificate_not_after"]
        left = f"{(expires - time.time()) / 3600:.1f} h left" if expires else "none"
        colour = "green" if item["state"] == "steered" else "red"
        workloads.add_row(
            item["workload"],
            f"[{colour}]{item['state']}[/]",
            item["steering"],
            _policy(item),
            " ".join(item["addresses"]),
            item["identity"],
            left,
            item["detail"],
        )
    out.print(workloads)
    for item in found["workloads"]:
        if item["steering_wanted"] != steering["wanted"]:
            out.print(f"{item['workload']}: steering {item['steering_wanted']}: {item['steering_reason']}")
        if item["steering_note"]:
            out.print(f"[yellow]{item['workload']}: {item['steering_note']}[/]")
        bypassing = item["unsteered_connections"]
        if bypassing["count"]:
            shown = ", ".join(f"{pair['local']} - {pair['peer']}" for pair in bypassing["first"])
            more = bypassing["count"] - len(bypassing["first"])
            out.print(
                f"[yellow]{item['workload']}: {counted(bypassing['count'], 'connection')} older than the rules, not "
                f"steered: {shown}{f' and {more} more' if more else ''}[/]"
            )
    names = Table("workload", "names", "resolvers", "found in", "note")
    for item in found["workloads"]:
        dns = item["dns"]
        capture = "captured" if dns["capture"] else "not captured"
        resolvers = " ".join(dns["nameservers"]) or "[red]none[/]"
        names.add_row(item["workload"], capture, resolvers, dns["source"], f"[yellow]{dns['note']}[/]")
    out.print(names)
    processes = Table("process", "pid", "state", "age")
    processes.add_row("supervisor", str(found["supervisor_pid"]), "ready", "")
    for item in found["processes"]:
        processes.add_row(f"{item['role']} {item['slot']}", str(item["pid"]), item["state"], f"{item['age_s']:.0f} s")
    out.print(processes)
    services = Table("service", "virtual addresses", "ports")
    for item in found["services"]:
        ports = [
            f"{p['port']}/{p['protocol']} {p['ready']}/{p['endpoints']} ready{_balanced(p, steering['mechanism'])}"
            for p in item["ports"]
        ]
        services.add_row(item["service"], " ".join(item["vips"]), ", ".join(ports))
    out.print(services)
    bad = [
        (o, c) for o in found["objects"] for c in o["conditions"] if c["status"] == "False" or c["type"] == "Warning"
    ]
    for item, condition in bad:
        out.print(
            f"[yellow]{item['file']}:{item['line']}: {item['object']}: {condition['type']}={condition['status']} "
            f"{condition['reason']}: {condition['message']}[/]"
        )
    for name in found["last_good"]:
        out.print(f"[yellow]{name}: its last good version is in force[/]")
    for error in found["rejected"]:
        out.print(f"[red]rejected: {error}[/]")
