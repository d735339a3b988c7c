"""Options that several verbs share, and where a node's folders are."""

from __future__ import annotations

import enum
import os
import re
import socket

import typer

RUN_ROOT = "/run/netproxy"
STATE_ROOT = "/var/lib/netproxy"


class Output(enum.StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


class Level(enum.StrEnum):
    """Of our own messages."""

    error = "error"
    warning = "warning"
    info = "info"
    debug = "debug"


def default_node() -> str:
    """The host's name as a node name: lower case, first label, 40 characters at most."""
    name = socket.gethostname().partition(".")[0].lower()
    return re.sub(r"[^a-z0-9-]", "-", name)[:40].strip("-") or "node"


def node_name(value: str | None) -> str:
    name = value or default_node()
    if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
        raise typer.BadParameter(f"{name!r}: lower-case letters, digits and '-', 40 at most")
    return name


def run_dir(root: str, node: str) -> str:
    return os.path.join(root, node)


def counted(number: int, word: str) -> str:
    """``1 table``, ``2 tables``"""
    return f"{number} {word}{'' if number == 1 else 's'}"
