"""``netproxy check``: can this machine run an agent, and is all well with the one that runs?"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from redirect import RedirectError, observe
from redirect.bpf import links
from redirect.bpf.bpffs import folder
from redirect.netns import open_netns
from redirect.obstacles import blocked
from redirect.probe import Choice, Preference, Probe, choose, probe
from redirect.wanted import MECHANISMS, Mechanism

from .. import compiled
from ..codec import h1, h2
from .ask import console, fetch, lacks
from .options import RUN_ROOT, STATE_ROOT, Output, counted, node_name, run_dir


@dataclass(frozen=True, slots=True)
class Finding:
    """`ok` None: only told, neither good nor bad."""

    name: str
    ok: bool | None
    detail: str


def check(
    node: Annotated[str | None, typer.Option(help="Which node; default: the host's name.")] = None,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="As given to `netproxy run`.")] = RUN_ROOT,
    state_root: Annotated[str, typer.Option(metavar="DIR", help="Likewise.")] = STATE_ROOT,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """What an agent needs of this machine, tried out; and, if one runs, how it and its workloads are.

    Changes nothing: rules are tried in a network namespace of its own, and out of each steered workload goes one
    connection, to see whether rules of others keep it from the proxy. Exit code 1 when something fails.
    Example: netproxy check --node node-a
    """
    name = node_name(node)
    findings = [
        *_machine(),
        _folder("run folder", run_dir(run_root, name)),
        _folder("state folder", run_dir(state_root, name)),
        *_agent(os.path.join(run_dir(run_root, name), "admin.sock")),
    ]
    ok = all(finding.ok is not False for finding in findings)
    result = {"node": name, "ok": ok, "checks": [asdict(finding) for finding in findings]}
    if output is Output.json:
        typer.echo(json.dumps(result, indent=2))
    elif output is Output.yaml:
        typer.echo(yaml.safe_dump(result, sort_keys=False))
    else:
        table = Table("check", "", "detail")
        for finding in findings:
            mark = {True: "[green]ok[/]", False: "[red]failed[/]", None: "-"}[finding.ok]
            table.add_row(finding.name, mark, escape(finding.detail))
        console().print(table)
    if not ok:
        raise typer.Exit(1)


def _machine() -> list[Finding]:
    root = os.geteuid() == 0
    bindings = importlib.util.find_spec("nftables")
    findings = [
        Finding("python", True, platform.python_version()),
        _part("HTTP/1 engine", h1.ENGINES[0], "native"),
        _part("HTTP/2 engine", h2.ENGINES[0], "native"),
        _part("relay", compiled.relay(), "compiled"),
        _part("TCP streams", compiled.streams(), "native"),
        Finding("root", root, "" if root else "the agent needs root (network namespaces, nftables)"),
        Finding(
            "libnftables",
            bindings is not None,
            str(bindings.origin) if bindings else "the Python module nftables is missing (Debian: python3-nftables)",
        ),
    ]
    if not root:
        return [*findings, Finding("nftables", None, "not tried")]
    return [*findings, *_mechanisms()]


def _part(name: str, found: str, preferred: str) -> Finding:
    if found == preferred:
        return Finding(name, True, found)
    return Finding(name, None, f"{found}: not compiled, a request costs more")


def _mechanisms() -> list[Finding]:
    """What can steer, tried out: that nothing can is the failure. Which one is wanted, the mesh says."""
    tried: dict[Mechanism, Probe] = {mechanism: probe(mechanism) for mechanism in MECHANISMS}
    findings = []
    for mechanism, found in tried.items():
        for family in (4, 6):
            reasons = [part for part in found.reason.split("; ") if part.startswith(f"IPv{family}:")]
            works = family in found.families
            works_by = "programs" if mechanism == "ebpf" else "rules"
            detail = f"{works_by} can be loaded" if works else "; ".join(reasons)
            findings.append(Finding(f"{mechanism} IPv{family}", works or None, detail))
    wants: tuple[Preference, ...] = ("auto", "ebpf", "iptables")
    choices: dict[Preference, Choice] = {wanted: choose(wanted, lambda mechanism: tried[mechanism]) for wanted in wants}
    auto = choices["auto"]
    complete = auto.mechanism is not None and tried[auto.mechanism].families == {4, 6}
    said = f"{auto.mechanism}: {auto.reason}" if auto.mechanism else auto.reason
    return [
        *findings,
        Finding("steering: auto", complete, said),
        *(
            Finding(f"steering: {wanted}", None, choices[wanted].mechanism or choices[wanted].reason)
            for wanted in wants[1:]
        ),
    ]


def _hooks(node: str) -> list[Finding]:
    """eBPF programs that the node has attached, with what holds them."""
    try:
        found = links(node)
    except RedirectError as exc:
        return [Finding("eBPF hooks", False, str(exc))]
    if not found:
        return []
    inbound = [link for link in found if link.name.startswith("inbound_")]
    hooks = [link for link in found if link not in inbound]
    lost = [link.name for link in hooks if not link.target]
    names = ", ".join(f"{link.name.partition('_')[2]} (program {link.program})" for link in hooks)
    said = f"pinned in {folder(node)}: {names}; inbound in {counted(len(inbound), 'namespace')}"
    return [Finding("eBPF hooks", not lost, f"detached: {', '.join(lost)}; {said}" if lost else said)]


def _folder(name: str, path: str) -> Finding:
    """Can a file be written there, or where the folder would be made?"""
    place = os.path.abspath(path)
    while not os.path.isdir(place) and place != "/":
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as exc:
        return Finding(name, False, f"{place}: {exc.strerror}")
    return Finding(name, True, path)


def _access_log(log: dict[str, Any]) -> Finding:
    """Lines that are lost hurt no traffic, so they are only told."""
    lost = ", ".join(f"{n} lines lost ({reason})" for reason, n in log["dropped"].items())
    return Finding(
        "access log", False if log["error"] else None if lost else True, log["error"] or lost or log["target"]
    )


def _agent(path: str) -> list[Finding]:
    try:
        status: dict[str, Any] = json.loads(fetch(path, "/status"))
    except (FileNotFoundError, ConnectionRefusedError):
        return [Finding("agent", None, "does not run")]
    except (OSError, http.client.HTTPException, ValueError) as exc:
        return [Finding("agent", False, f"no answer on {path}: {exc}")]
    try:
        return _told(status)
    except KeyError as exc:
        return [Finding("agent", False, lacks(exc))]


def _told(status: dict[str, Any]) -> list[Finding]:
    errors = [status["config"]["error"], status["identity_error"], status["state_error"]]
    said = "; ".join([status["detail"], *filter(None, errors)])
    return [
        Finding("agent", bool(status["healthy"]) and not any(errors), f"pid {status['supervisor_pid']}: {said}"),
        _access_log(status["access_log"]),
        *(
            Finding(
                f"workload {item['workload']}",
                # One whose namespace does not exist yet waits for it.
                True if item["state"] == "steered" else None if item["state"] == "absent" else False,
                "; ".join(filter(None, [item["state"], item["detail"], *_notes(item)])),
            )
            for item in status["workloads"]
        ),
        Finding("steering", status["steering"]["mechanism"] != "none" or None, _choice(status["steering"])),
        *(_hooks(status["node"]) if os.geteuid() == 0 else ()),
        *_ways_out(status),
    ]


def _ways_out(status: dict[str, Any]) -> Iterator[Finding]:
    """A connection out of each steered workload: rules of others may be in the way of ours."""
    for item in status["workloads"]:
        if item["state"] != "steered" or os.geteuid() != 0 or not item["netns"]:
            continue  # of a service of the host only its own processes are steered
        try:
            fd = open_netns(item["netns"])
            try:
                routes = observe(fd, status["node"], ()).routes
                said = blocked(fd, routes, status["steering"]["outbound_port"])
            finally:
                os.close(fd)
        except RedirectError as exc:
            said = str(exc)
        yield Finding(f"way out of {item['workload']}", not said, said or "a connection reaches the proxy")


def _choice(steering: dict[str, Any]) -> str:
    return f"{steering['mechanism']} ({steering['wanted']}): {steering['reason']}"


def _notes(item: dict[str, Any]) -> list[str]:
    """What is as it is, but should be known."""
    notes = [item["steering_note"]]
    if item["policy_in_force"] not in ("", item["failure_policy"]):
        notes.append(f"failure policy {item['failure_policy']}, in force {item['policy_in_force']}")
    if count := item["unsteered_connections"]["count"]:
        notes.append(f"{counted(count, 'connection')} older than the rules, not steered")
    return notes
