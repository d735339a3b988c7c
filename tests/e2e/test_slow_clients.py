"""300 slow clients cost good traffic nothing, and no memory.

``FULL=1`` makes it a minute, as it is to be shown; else it is 10 s. ``-s`` prints what was measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from examples.stage import wait_for
from tests.e2e.mesh import Mesh

SECONDS = 60 if os.environ.get("FULL") else 10
SLOW = 300
RATE = 200
FILLED_MIB = SLOW // 3 * 2 * 0.25 + 16
"""What the readers that stop may make a worker hold: 256 KiB on each side of it."""
FLAT_MIB = 8
"""By which the second half of the time may exceed the first."""
VIP = "240.240.0.10"
CROWD = Path(__file__).parent / "servers" / "crowd.py"


def rss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def test_slow_clients_beside_good_ones(mesh_of: Callable[..., Mesh]) -> None:
    mesh = mesh_of()
    client, server = mesh.pod("client"), mesh.pod("web", 1)
    mesh.put(mesh.service("web", {"app": "web"}, [VIP]))
    mesh.serve(server, "patient", "8080")
    mesh.start()
    out = mesh.stage.folder / "crowd.json"
    argv = [VIP, "80", str(SECONDS), str(SLOW), str(RATE), str(out)]
    crowd = client.start(sys.executable, str(CROWD), *argv, log="crowd.log")

    def told() -> list[dict[str, object]]:
        assert crowd.poll() in (None, 0), (mesh.stage.folder / "crowd.log").read_text()
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    wait_for(told, "the slow clients to be in their place", 60)
    workers = {pid: agent.name for agent in mesh.agents for pid in agent.pids("worker")}
    before = {pid: rss_mib(pid) for pid in workers}
    halves = ({**before}, {**before})
    began = time.monotonic()

    def over() -> bool:
        half = halves[time.monotonic() - began > SECONDS / 2]
        for pid in workers:
            half[pid] = max(half[pid], rss_mib(pid))
        return len(told()) == 2

    wait_for(over, "the crowd to be through", SECONDS * 4 + 60)
    found = told()[1]
    print(f"\n{found}")
    for pid, name in workers.items():
        print(f"  worker of {name}: {before[pid]:.1f} MiB, peaks {halves[0][pid]:.1f} and {halves[1][pid]:.1f}")
    assert found["failed"] == 0, found["failures"]
    assert float(str(found["rate"])) > RATE / 2
    assert int(str(found["slow_octets"])) > SLOW
    for pid in workers:
        assert halves[0][pid] - before[pid] < FILLED_MIB
        assert halves[1][pid] - halves[0][pid] < FLAT_MIB
