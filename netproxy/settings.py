"""Settings of the processes. Standard library only, since the supervisor reads them.

What an operator sets on the command line, for one node; what holds for the mesh is in `MeshConfig`.
Travels to the children as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields

ARENA_ROWS = 2048
"""Metric series per region. Past it everything is counted in one overflow row per kind."""
ARENA_HEADER = 4096
ARENA_REGION_HEADER = 4096
ARENA_ROW = 1024
REGIONS_PER_WORKER = 2
"""A worker that drains and the one that replaces it count side by side."""


def arena_region(number: int) -> int:
    """Offset of a region in the arena, whose layout is `arena`'s."""
    return ARENA_HEADER + number * (ARENA_REGION_HEADER + ARENA_ROWS * ARENA_ROW)


def arena_size(regions: int) -> int:
    return arena_region(regions)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One node agent. Ports as in the contracts of ARCHITECTURE.md; 0 for an admin port switches it off."""

    node: str
    config: str
    """File or folder with resources."""
    run_dir: str
    """``/run/netproxy/<node>``: sockets, journal. Gone after a reboot."""
    state_dir: str
    """``/var/lib/netproxy/<node>``: SVIDs, VIP assignments. Survives a reboot."""
    ca_dir: str
    """The CA folder, shared by the nodes of a standalone mesh."""
    workers: int = 1
    outbound_port: int = 15001
    inbound_port: int = 15006
    dns_port: int = 15053
    admin_port: int = 15000
    metrics_port: int = 15020
    metrics_address: str = "127.0.0.1"
    mark: int = 0x539
    mark_mask: int = 0xFFF
    worker_uid: int = 14539
    worker_gid: int = 14539
    drain_s: float = 30.0
    poll_s: float = 0.5
    """How often configuration files are looked at."""
    access_log: str = "-"
    """File that access log lines are appended to; ``-``: standard output."""
    http1_engine: str = "auto"
    """``native``, ``reference``, or ``auto``: native where it was compiled."""
    http2_engine: str = "auto"
    """Likewise."""
    log_level: str = "info"
    """Of our own messages at the start: error, warning, info or debug."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeSettings:
        # After an upgrade the text may be of another version: what it does not know keeps its default.
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    @property
    def admin_socket(self) -> str:
        return os.path.join(self.run_dir, "admin.sock")

    @property
    def journal(self) -> str:
        return os.path.join(self.run_dir, "journal.json")

    @property
    def pid_file(self) -> str:
        return os.path.join(self.run_dir, "supervisor.pid")
