"""The command line: one file per verb. Exit codes: 0 done, 1 failed, 2 usage or invalid input."""

from __future__ import annotations

import typer

from .. import __version__
from . import check, clean, run, status, validate

app = typer.Typer(
    name="netproxy",
    help="A service mesh for Linux hosts. No sidecars, no Kubernetes needed.",
    no_args_is_help=True,
    add_completion=False,
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
    pass


app.command("run")(run.run)
app.command("validate")(validate.validate)
app.command("check")(check.check)
app.command("status")(status.status)
app.command("clean")(clean.clean)


def main() -> None:
    app()
