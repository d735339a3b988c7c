"""Parts of these pages that the code says itself: ``python -m docs.pages`` (``make docs``) writes them anew.

A part stands between ``<!-- NAME, made by `make docs` -->`` and ``<!-- /NAME -->``; ``resources.md`` is one as a whole.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from docs import differences
from netproxy.config import reference
from netproxy.errors import REASONS
from netproxy.relay import exchange

FOLDER = Path(__file__).parent


def edits() -> str:
    """The list in the docstring of `relay.exchange`, which the tests hold against what two agents do."""
    text = inspect.cleandoc(exchange.__doc__ or "").partition("\n\n")[2]
    text = re.sub(r"``(.+?)``", r"`\1`", text.replace("see `expect`", "see below"))
    return text.replace(" `request` says which 1xx answers pass.", "")


def reasons() -> str:
    """Every reason with its statuses and flag."""
    rows = [
        f"| `{reason.name}` | {info.status or '(reset)'} | {info.grpc.name} | "
        f"`{info.flag}` | `{info.details}` | {info.title} |"
        for reason, info in REASONS.items()
    ]
    return "\n".join(["| reason | status | gRPC | flag | details | |", "|---|---|---|---|---|---|", *rows])


PARTS = {"edits": edits, "reasons": reasons, "differences": differences.page}


def written(text: str) -> str:
    """A page with its parts as they should be."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name}, made by `make docs` -->\n", f"<!-- /{name} -->"
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, begin=begin, end=end, part=part: f"{begin}\n{part()}\n\n{end}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    return text


def pages() -> dict[Path, str]:
    """Every page, as it should be."""
    found = {path: written(path.read_text()) for path in sorted(FOLDER.glob("*.md"))}
    return {**found, FOLDER / "resources.md": reference.reference()}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
