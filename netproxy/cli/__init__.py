"""The command line: one file per verb. Exit codes: 0 done, 1 failed, 2 usage or invalid input."""

from __future__ import annotations

import typer

from .. import __version__
from . import check, clean, config_dump, log_level, run, status, validate

app = typer.Typer(
    name="netproxy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"netproxy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """A service mesh for Linux hosts. No sidecars, no Kubernetes needed.

    First try what this machine can do, then check your resources, then run the
    agent, as root, and ask it from another terminal:

    \b
      netproxy check
      netproxy validate -f examples/bookshop
      netproxy run -f examples/bookshop
      netproxy status

    Every verb has --help with an example. Exit codes: 0 done, 1 failed, 2 usage or invalid input.

    Example: netproxy run -f /etc/netproxy/mesh
    """


app.command("run")(run.run)
app.command("validate")(validate.validate)
app.command("check")(check.check)
app.command("status")(status.status)
app.command("config-dump")(config_dump.config_dump)
app.command("log-level")(log_level.log_level)
app.command("clean")(clean.clean)


def main() -> None:
    app()
