"""``netproxy log-level``: how much the agent says, while it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .ask import admin_socket, ask_agent, show
from .options import RUN_ROOT, Level, Output


def log_level(
    level: Annotated[Level | None, typer.Argument(help="What it shall be from now on; without: tell it.")] = None,
    node: Annotated[str | None, typer.Option(help="Which node's agent; default: the host's name.")] = None,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="As given to `netproxy run`.")] = RUN_ROOT,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.table,
) -> None:
    """Tell or change the level of the agent's own messages, of all its processes, until it is stopped.

    debug says each change of the configuration as it takes effect, and each
    endpoint that could not be reached. Exit code 1 when the agent does not answer.

    Example: netproxy log-level debug --node node-a
    """
    path = admin_socket(run_root, node)
    if level is None:
        found = ask_agent(path, "/log_level")
    else:
        found = ask_agent(path, "/log_level", "PUT", level.value.encode())
    show(found, output, _print)


def _print(found: dict[str, Any]) -> None:
    typer.echo(found["level"])
