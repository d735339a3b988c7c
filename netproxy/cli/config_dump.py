"""``netproxy config-dump``: the configuration in force on this node, without private keys."""

from __future__ import annotations

import enum
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.table import Table

from ..dump import KINDS
from .ask import admin_socket, ask_agent, console, show
from .options import RUN_ROOT, Output

Kind = enum.StrEnum("Kind", {kind: kind for kind in KINDS})  # type: ignore[misc]


def config_dump(
    kind: Annotated[Kind | None, typer.Option(help="Only what is of this kind.")] = None,
    name: Annotated[str, typer.Option(metavar="NAMESPACE/NAME", help="Only what is called so.")] = "",
    node: Annotated[str | None, typer.Option(help="Which node's agent; default: the host's name.")] = None,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="As given to `netproxy run`.")] = RUN_ROOT,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """The configuration that is in force on this node: every shard with its version, workloads, conditions.

    The table lists what there is, json and yaml tell all of it, private keys
    never. Exit code 1 when the agent does not answer, or knows no such name.

    Example: netproxy config-dump -o yaml --kind service --name shop/reviews
    """
    query = {key: value for key, value in (("kind", kind.value if kind else ""), ("name", name)) if value}
    found = ask_agent(admin_socket(run_root, node), f"/config_dump?{urlencode(query)}")
    show(found, output, _print)


def _print(found: dict[str, Any]) -> None:
    table = Table("kind", "name", "version", "workers have", "in short")
    for shard in found["shards"]:
        kind, _, name = shard["key"].partition("/")
        held = "the same" if shard["held"] == shard["version"] else shard["held"] or "[red]nothing[/]"
        table.add_row(kind, name, shard["version"] or "none", held, _in_short(kind, shard["body"]))
    console().print(table)


def _in_short(kind: str, body: dict[str, Any] | None) -> str:
    if body is None:
        return "of a brain before this one"
    if kind == "service":
        ports = ", ".join(
            f"{port['port']}/{port['protocol']} "
            f"{sum(endpoint['ready'] for endpoint in port['endpoints'])}/{len(port['endpoints'])} ready"
            for port in body["ports"]
        )
        return f"{' '.join(body['vips'])} {ports}"
    if kind == "workload":
        return f"{' '.join(body['addresses'])} {body['mtls']}{', local' if body['local'] else ''}"
    if kind == "external":
        return ", ".join([*(host["name"] for host in body["hosts"]), *body["networks"]])
    return f"outbound policy {body['outbound_policy']}" if kind == "mesh" else ""
