"""Configuration of 100, 1,000 and 5,000 services with 10 endpoints and a route each: parse, build, apply.

parse: YAML files to valid objects. build: objects to a snapshot. apply: what the brain and a worker do with a snapshot
that is all new: every shard encoded, decoded and put into the worker's tables. In one process, wall time; there is no
agent in it, and nothing of the time that files wait to be looked at (0.5 s) or messages to be read. No peers: what
they would read is another thing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench._chart import write_chart
from bench._figures import Figures, Round, document
from bench._http import first_line
from bench._machine import machine
from bench._question import Options, add_options, check_writable
from bench._report import Document, table
from netproxy.config import source
from netproxy.config.shard import decode_shard, encode_shard, preload
from netproxy.config.snapshot import Context, build_snapshot
from netproxy.config.validate import validate
from netproxy.decide.route import Tables

NAME = "config_scale"
SIZES = (100, 1000, 5000)
ENDPOINTS = 10
_SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: s{n}, namespace: shop}}
spec:
  ports:
  - {{name: http, port: 80, targetPort: 8080, appProtocol: http}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: s{n}-1, namespace: shop, labels: {{kubernetes.io/service-name: s{n}}}}}
addressType: IPv4
ports:
- {{name: http, port: 8080}}
endpoints:
{endpoints}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: s{n}, namespace: shop}}
spec:
  parentRefs:
  - {{group: "", kind: Service, name: s{n}, port: 80}}
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /api}}}}]
    backendRefs: [{{name: s{n}, port: 80}}]
  - backendRefs: [{{name: s{n}, port: 80}}]
"""


def write(folder: Path, services: int) -> None:
    """100 services in a file."""
    for begin in range(0, services, 100):
        texts = []
        for n in range(begin, min(begin + 100, services)):
            addresses = [f"10.{n >> 8}.{n & 255}.{k + 1}" for k in range(ENDPOINTS)]
            endpoints = "\n".join(f'- addresses: ["{address}"]' for address in addresses)
            texts.append(_SERVICE.format(n=n, endpoints=endpoints))
        (folder / f"services-{begin:05}.yaml").write_text("---\n".join(texts))


def put(folder: Path, services: int) -> Round:
    """As `config.load` and the brain do it: without the collector, see there."""
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        found = source.read(folder)
        valid = validate(found.documents)
        parsed = time.perf_counter()
        snapshot = build_snapshot(valid.objects, Context("bench"))
        built = time.perf_counter()
        tables = Tables(lambda: 0.5)
        for key, shard in snapshot.shards.items():
            tables.put(decode_shard(key, encode_shard(shard)))
        applied = time.perf_counter()
    finally:
        gc.enable()
    if found.errors or valid.errors or snapshot.rejected or len(tables.services) != services:
        raise AssertionError(f"not all was taken: {[*found.errors, *valid.errors, *snapshot.rejected][:3]}")
    return {
        f"parse_ms_{services}": (parsed - begin) * 1e3,
        f"build_ms_{services}": (built - parsed) * 1e3,
        f"apply_ms_{services}": (applied - built) * 1e3,
    }


def result(options: Options, say: Callable[[str], None]) -> Document:
    figures = Figures(NAME, "netproxy")
    preload()
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as name:
        folders = {size: Path(name) / str(size) for size in SIZES}
        for size, folder in folders.items():
            folder.mkdir()
            write(folder, size)
        put(folders[SIZES[0]], SIZES[0])  # warm
        for number in range(options.rounds):
            found: dict[str, float] = {}
            for size, folder in folders.items():
                found |= put(folder, size)
            figures.add("netproxy", found)
            say(f"round {number + 1} of {options.rounds} done")
    return document(figures, machine(()))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m bench {NAME}", description=first_line(__doc__))
    add_options(parser)
    parser.add_argument("--peers", choices=("", "netproxy"), default="", help="netproxy only")
    found = parser.parse_args(arguments)
    check_writable(parser, found.json)
    made = result(Options(found.seconds, found.rounds), lambda text: print(f"{NAME}: {text}", file=sys.stderr))
    print(table(made))
    if found.json:
        Path(found.json).write_text(json.dumps(made, indent=2) + "\n")
    if found.charts:
        write_chart(made, Path(found.charts))
