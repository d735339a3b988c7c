"""What the kernel says of processes: their CPU time, their memory, who their children are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")


class Stat(NamedTuple):
    """Of one process, all of its threads."""

    pid: int
    parent: int
    cpu_us: float
    """User and system time so far. The kernel rounds it to ticks, of 10 ms mostly."""


def parse_stat(text: str) -> Stat:
    """A line of ``/proc/<pid>/stat``. The name in it may have spaces and brackets, so it is cut at the last one."""
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    return Stat(int(head.partition(" ")[0]), int(fields[1]), (int(fields[11]) + int(fields[12])) * TICK_US)


def tree(roots: Iterable[int]) -> list[int]:
    """These processes and all below them, in order. A root that is gone has none."""
    children: dict[int, list[int]] = {}
    alive = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = parse_stat((entry / "stat").read_text())
                alive.add(stat.pid)
                children.setdefault(stat.parent, []).append(stat.pid)
    found: list[int] = []
    waiting = [pid for pid in roots if pid in alive]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.append(pid)
            waiting += children.get(pid, ())
    return sorted(found)


def cpu_us(pids: Iterable[int]) -> float:
    """Sum of user and system time so far. Raises FileNotFoundError or ProcessLookupError when one is gone."""
    return sum(parse_stat(Path(f"/proc/{pid}/stat").read_text()).cpu_us for pid in pids)


def rss_mib(pids: Iterable[int]) -> float:
    """Resident memory, summed. What processes share is counted in each of them."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids) / 2**20
