"""Services of the host, for `pods`: where they are, and where their proxies listen in a namespace that all share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from redirect import Ports
from redirect.host import OWN_NETNS, find_cgroup, withdraw
from redirect.netns import open_netns

from .config.snapshot import LocalWorkload
from .settings import NodeSettings

_ABOVE = 100
"""So far above the ports of pods those of services of the host begin. Each has three."""


class Found(NamedTuple):
    """`netns_fd` is the caller's. `number`: by which the kernel knows the cgroup."""

    cgroup: Path
    netns_fd: int
    id: tuple[int, int]
    number: int


def find(want: LocalWorkload, node: str, before: int) -> Found | None:
    """None: it does not run. `before`: the number of the cgroup that it had, which is let go if it has another. Blocks.
    RedirectError, OSError."""
    cgroup = find_cgroup(want.cgroup, want.unit)
    if cgroup is None:
        return None
    stat = os.stat(cgroup)
    if before not in (0, stat.st_ino):
        withdraw(node, before)
    return Found(cgroup, open_netns(OWN_NETNS), (stat.st_dev, stat.st_ino), stat.st_ino)


def absence(want: LocalWorkload) -> str:
    return f"{want.unit} does not run" if want.unit else f"cgroup {want.cgroup} does not exist yet"


class HostPorts:
    def __init__(self, settings: NodeSettings) -> None:
        self._first = settings.outbound_port + _ABOVE
        self._bad: set[int] = set()

    def take(self, others: Iterable[Ports | None]) -> Ports:
        """Some that none of the others has. Where they are somebody's else, only listening tells: see `refuse`."""
        taken = {ports.outbound for ports in others if ports is not None} | self._bad
        start = next((port for port in range(self._first, (1 << 16) - 3, 3) if port not in taken), self._first)
        return Ports(start, start + 1, start + 2)

    def refuse(self, ports: Ports) -> None:
        self._bad.add(ports.outbound)
