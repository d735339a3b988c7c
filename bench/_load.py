"""The drivers: wrk, h2load and, where those can't, `_pace.py`. What they print becomes a `Load`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from bench._systems import CONFIGS, Absent
from examples.stage import Pod

CONNECTIONS = 32
SLACK_S = 30.0
"""More than the load itself may take before a driver counts as stuck."""


class Load(NamedTuple):
    """What a driver did."""

    requests: int
    seconds: float
    failed: int
    p50_us: float = 0.0
    p99_us: float = 0.0
    p999_us: float = 0.0

    @property
    def rps(self) -> float:
        return self.requests / self.seconds


def wrk(
    pod: Pod, url: str, seconds: int, headers: Mapping[str, str] | None = None, connections: int = CONNECTIONS
) -> Load:
    """Keep-alive connections, one request at a time on each, as fast as they go."""
    _need("wrk")
    fields = [part for name, value in (headers or {}).items() for part in ("-H", f"{name}: {value}")]
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(CONFIGS / "report.lua"), *fields, url]
    return parse_wrk(_run(pod, command, seconds))


def parse_wrk(text: str) -> Load:
    """A line of JSON, which `configs/report.lua` prints after what wrk itself says, and `_pace.py`."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise Absent(f"the driver said no result: {text.strip()[-300:]}")
    found = json.loads(lines[-1])
    if not found["requests"]:
        raise Absent("no request was answered")
    return Load(found["requests"], found["us"] / 1e6, found["failed"], found["p50"], found["p99"], found["p999"])


def h2load(pod: Pod, url: str, seconds: int, *options: str, clients: int) -> Load:
    _need("h2load")
    return parse_h2load(_run(pod, ["h2load", "-t1", f"-c{clients}", f"-D{seconds}", *options, url], seconds))


def parse_h2load(text: str) -> Load:
    finished = re.search(r"finished in ([\d.]+)(us|ms|s), ", text)
    requests = re.search(r"requests: .*?(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
    codes = re.search(r"status codes: (\d+) 2xx", text)
    if not finished or not requests or not codes:
        raise Absent(f"h2load said no result: {text.strip()[-300:]}")
    seconds = float(finished[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[finished[2]]
    succeeded, failed, _errored, late = (int(group) for group in requests.groups())
    if not succeeded:
        raise Absent("no request was answered")
    # `failed` has those that errored in it.
    return Load(succeeded, seconds, failed + late + max(0, succeeded - int(codes[1])))


def pace(pod: Pod, url: str, seconds: int, connections: int, rate: float) -> Load:
    """So many requests a second, evenly, over HTTP/1.1."""
    parts = urlsplit(url)
    where = [str(parts.hostname), str(parts.port or 80), parts.path]
    command = [sys.executable, "-m", "bench._pace", *where, str(connections), f"{rate:.3f}", str(seconds)]
    return parse_wrk(_run(pod, command, seconds))


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise Absent(f"{program} is not installed: tools/setup bench")


def _run(pod: Pod, command: list[str], seconds: float) -> str:
    done = pod.run(*command, timeout=seconds + SLACK_S, check=False)
    if done.returncode != 0:
        raise Absent(f"{command[0]} failed with code {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
    return done.stdout
