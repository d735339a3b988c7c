"""``netproxy clean``: remove what an agent left that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from typing import Annotated

import typer

from redirect import RedirectError, observe, remove
from redirect.bpf import clean as clean_hooks
from redirect.netns import open_netns

from ..journal import Journal
from .options import RUN_ROOT, counted, node_name, run_dir

_NETNS_DIR = "/run/netns"
_OWNER_S = 2.0
"""The kernel closes the sockets of a killed agent one after the other: 31 of them took half a second."""


def clean(
    node: Annotated[str | None, typer.Option(help="Which node; default: the host's name.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All nodes that have a run folder here.")] = False,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="As given to `netproxy run`.")] = RUN_ROOT,
) -> None:
    """Remove the rules, eBPF hooks, routes and files of an agent that does not run any more.

    Works from the node's journal and looks into every named network namespace. Refuses while the agent runs
    (stop it instead). Exit code 1 when something is left. Example: netproxy clean --all
    """
    if every:
        nodes = sorted(os.listdir(run_root)) if os.path.isdir(run_root) else []
    else:
        nodes = [node_name(node)]
    failed = False
    for name in nodes:
        failed |= not _clean(name, run_dir(run_root, name))
    if failed:
        raise typer.Exit(1)


def _clean(node: str, folder: str) -> bool:
    lock = -1
    if os.path.isdir(folder):
        lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            typer.echo(f"netproxy: node {node}: the agent runs; stop it, it cleans up by itself", err=True)
            return False
    ok = True
    try:
        journal = Journal(os.path.join(folder, "journal.json"), node)
        places = {entry["netns"]: key for key, entry in journal.entries.items()}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(_NETNS_DIR):
                places.setdefault(os.path.join(_NETNS_DIR, name), "")
        for path, workload in places.items():
            ok &= _clean_namespace(node, path, workload)
        ok &= _clean_hooks(node)
        if ok and lock >= 0:
            _empty(folder)
    finally:
        if lock >= 0:
            os.close(lock)
    return ok


def _empty(folder: str) -> None:
    """All but the lock: an agent that is starting may wait for this very inode."""
    for entry in list(os.scandir(folder)):
        if entry.name == "lock":
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _clean_hooks(node: str) -> bool:
    try:
        if removed := clean_hooks(node):
            links = sum(not name.startswith("map_") for name in removed)
            typer.echo(f"eBPF: removed {counted(links, 'program')} and {counted(len(removed) - links, 'map')}")
    except RedirectError as exc:
        typer.echo(f"netproxy: eBPF: {exc}", err=True)
        return False
    return True


def _clean_namespace(node: str, path: str, workload: str) -> bool:
    try:
        fd = open_netns(path)
    except (RedirectError, OSError):
        if workload:
            typer.echo(f"{path}: gone, nothing to do ({workload})")
        return True
    try:
        found = observe(fd, node)
        if not found.tables and not found.routes:
            return True
        left = remove(fd, node).left
        deadline = time.monotonic() + _OWNER_S
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = tuple(table.name for table in observe(fd, node).tables)
        tables = len(found.tables) - len(left)
        typer.echo(f"{path}: removed {counted(tables, 'table')} and {counted(len(found.routes), 'route')}")
        if left:
            typer.echo(
                f"netproxy: {path}: {', '.join(left)} stays: a process still holds what owns it, and only its end "
                "removes it",
                err=True,
            )
        return not left
    except (RedirectError, OSError) as exc:
        typer.echo(f"netproxy: {path}: {exc}", err=True)
        return False
    finally:
        os.close(fd)
