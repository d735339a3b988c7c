"""``netproxy run``: a standalone node agent."""

from __future__ import annotations

import enum
import os
import sys
from typing import Annotated

import typer

from ..codec import h1, h2
from ..config import source
from ..errors import ConfigError
from ..logfile import STDOUT, open_target
from ..settings import NodeSettings
from .options import RUN_ROOT, STATE_ROOT, Level, node_name, run_dir


class Engine(enum.StrEnum):
    auto = "auto"
    native = "native"
    reference = "reference"


def run(
    config: Annotated[str, typer.Option("--config", "-f", metavar="PATH", help="File or folder with resources.")],
    node: Annotated[str | None, typer.Option(help="Name of this node; default: the host's name.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes, one core each.")] = max(
        1, min(4, os.cpu_count() or 1)
    ),
    ca_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="CA folder, shared by all nodes; default: in the state folder.")
    ] = None,
    state_root: Annotated[str, typer.Option(metavar="DIR", help="State, one folder per node in it.")] = STATE_ROOT,
    run_root: Annotated[str, typer.Option(metavar="DIR", help="Sockets and journal, likewise.")] = RUN_ROOT,
    outbound_port: Annotated[int, typer.Option(min=1, max=65535, help="In pods: what they send.")] = 15001,
    inbound_port: Annotated[int, typer.Option(min=1, max=65535, help="In pods: what they get.")] = 15006,
    dns_port: Annotated[int, typer.Option(min=0, max=65535, help="In pods: their queries for names; 0: off.")] = 15053,
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="Loopback; 0: unix socket only.")] = 15000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="/metrics and /healthz; 0: off.")] = 15020,
    metrics_address: Annotated[str, typer.Option(help="Address the metrics port binds.")] = "127.0.0.1",
    worker_uid: Annotated[int, typer.Option(min=1, help="User and group id of the workers.")] = 14539,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that connections may take to end at a stop.")] = 30.0,
    http1_engine: Annotated[
        Engine, typer.Option("--http1-engine", help="auto: native where it was compiled, else reference (h11, slow).")
    ] = Engine.auto,
    http2_engine: Annotated[
        Engine, typer.Option("--http2-engine", help="auto: native where it was compiled, else reference (h2, slow).")
    ] = Engine.auto,
    access_log: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Access log lines are appended there; -: standard output. SIGHUP reopens it."
        ),
    ] = STDOUT,
    log_level: Annotated[Level, typer.Option(help="Of the agent's own messages, see also `netproxy log-level`.")] = (
        Level.info
    ),
) -> None:
    """Run this node's agent in the foreground until SIGTERM. Needs root. Files are watched and reloaded.

    Example: netproxy run -f /etc/netproxy/mesh --ca-dir /etc/netproxy/ca
    """
    name = node_name(node)
    if os.geteuid() != 0:
        typer.echo("netproxy: the agent needs root (network namespaces, nftables)", err=True)
        raise typer.Exit(2)
    try:
        source.fingerprint(config)
    except ConfigError as exc:
        typer.echo(f"netproxy: {exc}", err=True)
        raise typer.Exit(2) from None
    try:
        h1.chosen(http1_engine)
        h2.chosen(http2_engine)
    except ValueError as exc:
        typer.echo(f"netproxy: {exc}", err=True)
        raise typer.Exit(2) from None
    try:
        os.close(open_target(access_log))
    except OSError as exc:
        typer.echo(f"netproxy: access log {access_log}: {exc.strerror}", err=True)
        raise typer.Exit(2) from None
    state_dir = os.path.join(os.path.abspath(state_root), name)
    settings = NodeSettings(
        node=name,
        config=os.path.abspath(config),
        run_dir=run_dir(os.path.abspath(run_root), name),
        state_dir=state_dir,
        ca_dir=os.path.abspath(ca_dir) if ca_dir else os.path.join(state_dir, "ca"),
        workers=workers,
        outbound_port=outbound_port,
        inbound_port=inbound_port,
        dns_port=dns_port,
        admin_port=admin_port,
        metrics_port=metrics_port,
        metrics_address=metrics_address,
        worker_uid=worker_uid,
        worker_gid=worker_uid,
        drain_s=drain,
        access_log=access_log if access_log == STDOUT else os.path.abspath(access_log),
        http1_engine=http1_engine,
        http2_engine=http2_engine,
        log_level=log_level,
    )
    sys.stdout.flush()
    # The supervisor is a process of its own kind: small, standard library only.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "netproxy.supervisor", settings.to_json()])
