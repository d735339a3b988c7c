"""``netproxy validate``: every error of a file or folder, without a running agent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml

from ..config.load import load
from ..config.snapshot import Context
from ..config.status import Condition, ObjectStatus
from ..errors import ConfigError
from .options import Output, counted, node_name


def validate(
    config: Annotated[str, typer.Option("--config", "-f", metavar="PATH", help="File or folder with resources.")],
    node: Annotated[str | None, typer.Option(help="Build the snapshot as this node would.")] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """Check resources. Prints every error with its place; exit code 2 if there is any.

    A warning is for an object that is valid and yet has no effect, or not the whole of it.

    Example: netproxy validate -f examples/bookshop
    """
    try:
        snapshot = load(config, Context(node_name(node)))
    except ConfigError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(2) from None
    warnings = [
        f"{status.file}:{status.line}: {status.obj}: {text}"
        for status in snapshot.statuses.values()
        for text in _warnings(status, snapshot.rejected)
    ]
    accepted = [condition for status in snapshot.statuses.values() if (condition := status.get("Accepted"))]
    result: dict[str, Any] = {
        "accepted": sum(condition.status == "True" for condition in accepted),
        "rejected": len(snapshot.rejected),
    }
    if output is Output.table:
        for error in snapshot.rejected:
            typer.echo(str(error), err=True)
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
        typer.echo(
            f"{counted(result['accepted'], 'object')} accepted, {counted(result['rejected'], 'error')}, "
            f"{counted(len(warnings), 'warning')}"
        )
    else:
        result |= {"errors": [_place(error) for error in snapshot.rejected], "warnings": warnings}
        typer.echo(json.dumps(result, indent=2) if output is Output.json else yaml.safe_dump(result, sort_keys=False))
    if snapshot.rejected:
        raise typer.Exit(2)


def _warnings(status: ObjectStatus, errors: tuple[ConfigError, ...]) -> Iterator[str]:
    for condition in status.conditions:
        if (condition.type == "Warning" or condition.status == "False") and not _is_told(status, condition, errors):
            yield f"{condition.type} {condition.reason}: {condition.message}"
    accepted = status.get("Accepted")
    if accepted is not None and accepted.status == "True":
        # The conditions of the whole say nothing of one parent among several.
        for parent in status.parents:
            for condition in parent.conditions:
                if condition.type == "Accepted" and condition.status == "False":
                    yield f"{parent.parent}: {condition.type} {condition.reason}: {condition.message}"


def _is_told(status: ObjectStatus, condition: Condition, errors: tuple[ConfigError, ...]) -> bool:
    """The condition only sums up errors which are printed by themselves."""
    return condition.type == "Accepted" and any(
        error.obj == status.obj and error.message in condition.message for error in errors
    )


def _place(error: ConfigError) -> dict[str, object]:
    return {"file": error.file, "line": error.line, "object": error.obj, "field": error.field, "message": error.message}
