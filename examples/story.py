"""What a demonstration tells: steps, commands with their output, checks, and a table of these at the end."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Story:
    """What is told while it happens, and the table at the end."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
        self.rows: list[tuple[str, str, str, bool]] = []
        self.title = ""
        self.ended = False

    def step(self, title: str) -> None:
        self.title = title
        self.console.print(Text(f"\n--- {title}", style="bold cyan"))

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def shown(self, command: str, output: str = "") -> None:
        """A command as one could type it, and what it printed."""
        self.console.print(Text(f"  $ {command}", style="bold"), soft_wrap=True)
        self.quote(output)

    def quote(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            self.console.print(Text(f"    {line}", style="dim"), soft_wrap=True)

    def check(self, expected: str, seen: object, ok: bool) -> None:
        self.rows.append((self.title, expected, str(seen), ok))
        self.console.print(Text(f"  {'ok    ' if ok else 'FAILED'} ", style="green" if ok else "bold red"), end="")
        self.console.print(Text(f"{expected}: {seen}"), soft_wrap=True)

    def ok(self) -> bool:
        return bool(self.rows) and all(row[3] for row in self.rows)

    def table(self) -> None:
        self.ended = True
        table = Table("step", "expected", "seen", "ok", title="\nnetproxy, the demonstration")
        before = ""
        for title, expected, seen, ok in self.rows:
            if title != before and before:
                table.add_section()
            mark = Text("yes", style="green") if ok else Text("NO", style="bold red")
            table.add_row(Text(title if title != before else ""), Text(expected), Text(seen), mark)
            before = title
        self.console.print(table)
