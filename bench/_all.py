"""``python -m bench all``: every question in turn, and RESULTS.md with a chart for each."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench._chart import write_chart
from bench._http import first_line
from bench._question import Options, add_options, alone, ask, check_writable
from bench._report import Document, results, table

ORDER = (
    "http1_small", "http1_headers", "http1_64k", "http1_connect", "http2_small", "grpc_unary", "mtls", "handshakes",
    "tcp", "steering", "latency", "idle_memory", "config_scale", "workers", "access_log",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench all", description="Every question in turn.")
    add_options(parser)
    parser.add_argument("--only", metavar="A,B", default="", help=f"only these of: {', '.join(ORDER)}")
    parser.add_argument("--connections", type=int, default=2000, help="of idle_memory (default: 2000)")
    parser.add_argument("--write", metavar="FOLDER", help="write RESULTS.md and the charts there")
    parser.add_argument("--command", default="", help="what RESULTS.md says that it was made with")
    found = parser.parse_args(arguments)
    wanted = [name for name in found.only.split(",") if name] or list(ORDER)
    if unknown := [name for name in wanted if name not in ORDER]:
        parser.error(f"--only {','.join(unknown)}: no such question")
    check_writable(parser, found.json)
    if found.write and not Path(found.write).is_dir():
        parser.error(f"--write {found.write}: not a folder")
    command = found.command or shlex.join(["python", "-m", "bench", "all", *arguments])
    documents: list[Document] = []
    failed = []
    with alone():
        for name in wanted:
            try:
                made = one(name, Options(found.seconds, found.rounds, (), found.connections))
            except Exception:  # noqa: BLE001 - the other questions are worth asking
                traceback.print_exc()
                failed.append(name)
                continue
            documents.append(made)
            print(table(made), flush=True)
    texts = {name: first_line(importlib.import_module(f"bench.{name}").__doc__) for name in ORDER}
    if found.json:
        Path(found.json).write_text(json.dumps(documents, indent=2) + "\n")
    charts = Path(found.charts) if found.charts else Path(found.write) / "charts" if found.write else None
    if charts is not None:
        for made in documents:
            write_chart(made, charts)
    if found.write:
        (Path(found.write) / "RESULTS.md").write_text(results(documents, texts, command))
    if failed:
        sys.exit(f"bench: failed: {', '.join(failed)}")


def one(name: str, options: Options) -> Document:
    module = importlib.import_module(f"bench.{name}")

    def say(text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)

    if hasattr(module, "QUESTION"):
        return ask(module.QUESTION, options, say)
    made: Document = module.result(options, say)
    return made
