"""``netproxy validate``: every error of a file or folder, without a running agent."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

from ..config.load import load
from ..config.snapshot import Context
from ..errors import ConfigError
from .options import Output, node_name


def validate(
    config: Annotated[str, typer.Option("--config", "-f", metavar="PATH", help="File or folder with resources.")],
    node: Annotated[str | None, typer.Option(help="Build the snapshot as this node would.")] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """Check resources. Prints every error with its place; exit code 2 if there is any.

    Example: netproxy validate -f examples/bookshop
    """
    try:
        snapshot = load(config, Context(node_name(node)))
    except ConfigError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(2) from None
    warnings = [
        f"{status.file}:{status.line}: {status.obj}: {condition.type} {condition.reason}: {condition.message}"
        for status in snapshot.statuses.values()
        for condition in status.conditions
        if condition.type == "Warning" or condition.status == "False"
    ]
    counted = {"accepted": len(snapshot.statuses), "rejected": len(snapshot.rejected)}
    if output is Output.table:
        for error in snapshot.rejected:
            typer.echo(str(error), err=True)
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
        typer.echo(f"{counted['accepted']} objects accepted, {counted['rejected']} errors")
    else:
        result = {**counted, "errors": [_place(error) for error in snapshot.rejected], "warnings": warnings}
        typer.echo(json.dumps(result, indent=2) if output is Output.json else yaml.safe_dump(result, sort_keys=False))
    if snapshot.rejected:
        raise typer.Exit(2)


def _place(error: ConfigError) -> dict[str, object]:
    return {"file": error.file, "line": error.line, "object": error.obj, "field": error.field, "message": error.message}
