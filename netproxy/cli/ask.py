"""Questions to the agent's admin socket, and how verbs print the answers."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from .options import Output, node_name, run_dir

_TIMEOUT_S = 30.0
"""The dump of a large mesh takes seconds."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


class Refusal(OSError):
    """The agent answered, but not with 200."""


def fetch(path: str, target: str, method: str = "GET", body: bytes | None = None) -> bytes:
    """From the admin socket. Raises OSError when nobody answers there, Refusal when the answer is no."""
    connection = _UnixConnection(path)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        found = response.read()
        if response.status != 200:
            raise Refusal(_error(found) or f"{target}: {response.status} {found[:200]!r}")
        return found
    finally:
        connection.close()


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return ""


def admin_socket(run_root: str, node: str | None) -> str:
    return os.path.join(run_dir(run_root, node_name(node)), "admin.sock")


def ask_agent(path: str, target: str, method: str = "GET", body: bytes | None = None) -> Any:
    """JSON of the answer. Says what is wrong and exits with 1 when there is none."""
    try:
        return json.loads(fetch(path, target, method, body))
    except Refusal as exc:
        typer.echo(f"netproxy: {exc}", err=True)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        typer.echo(f"netproxy: no answer on {path}: {exc}", err=True)
    raise typer.Exit(1)


def console() -> Console:
    return Console(emoji=False, width=None if os.isatty(1) else 180)


def show(found: Any, output: Output, as_table: Callable[[Any], None]) -> None:
    """`as_table` may put texts of `found` between its own markup: brackets in them are escaped."""
    if output is Output.json:
        typer.echo(json.dumps(found, indent=2))
    elif output is Output.yaml:
        typer.echo(yaml.safe_dump(found, sort_keys=False))
    else:
        try:
            as_table(_literal(found))
        except KeyError as exc:
            typer.echo(f"netproxy: {lacks(exc)}", err=True)
            raise typer.Exit(1) from None


def lacks(exc: KeyError) -> str:
    """What to say of an answer in which something is missing."""
    return f"the agent's answer has no {exc}: it is of another version, SIGUSR2 upgrades it; -o json shows what it says"


def _literal(found: Any) -> Any:
    match found:
        case str():
            return escape(found)
        case list():
            return [_literal(item) for item in found]
        case dict():
            return {key: _literal(value) for key, value in found.items()}
    return found
