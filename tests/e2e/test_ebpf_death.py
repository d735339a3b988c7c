"""Agents that steer by eBPF are killed under load, round by round, and started again.

``FULL=1`` makes it 50 rounds of each, as it is to be shown; else there are 2.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from examples.agent import alive
from examples.stage import Pod, wait_for
from redirect.netns import inside, open_netns
from tests.e2e.load import Attempt, Load, Scene
from tests.e2e.mesh import Mesh, get
from tests.e2e.test_ebpf import both, is_meshed

MeshOf = Callable[..., Mesh]
ROUNDS = 50 if os.environ.get("FULL") else 2
POLICIES = ["open", "closed"]
SETTLED_S = 0.05
"""A connect that begins so long after a death goes as the policy says."""
ETH_P_ALL = 3
MARKER = b"GET /"
"""What a request begins with, where no proxy has encrypted it."""

pytestmark = pytest.mark.timeout(900)


class Wire:
    """Packets with the marker that come to a pod by its own interface."""

    def __init__(self, pod: Pod) -> None:
        fd = open_netns(pod.path)
        try:
            with inside(fd):
                self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        finally:
            os.close(fd)
        self._sock.bind(("eth0", 0))
        self._sock.settimeout(0.2)
        self.marked = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._stopped.is_set():
            try:
                packet, where = self._sock.recvfrom(65536)
            except TimeoutError:
                continue
            if where[2] != socket.PACKET_OUTGOING and MARKER in packet:
                self.marked += 1

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._sock.close()


def started_after(load: Load, when: float, how_many: int) -> list[Attempt]:
    """At least so many attempts that began after that time, all that have ended."""

    def late(found: list[Attempt]) -> list[Attempt] | None:
        chosen = [attempt for attempt in found if attempt.kind == "fresh" and attempt.begin > when]
        return chosen if len(chosen) >= how_many else None

    chosen: list[Attempt] = load.wait(late, "attempts after the death")
    return chosen


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_dies(mesh_of: MeshOf, policy: str) -> None:
    scene = Scene(mesh_of(nodes=1, steering="ebpf"), **both(policy))
    scene.mesh.start()
    with closing(Wire(scene.server)) as seen:
        for _ in range(ROUNDS):
            wait_for(lambda: is_meshed(scene), "the service to answer")
            with scene.to_pod(fresh=3, kept=0) as load:
                load.wait_ok(5, via=("mesh",))
                before = seen.marked
                scene.agent.kill_all()
                late = started_after(load, time.monotonic() + SETTLED_S, 20)
                if policy == "open":
                    assert [attempt for attempt in late if not attempt.ok or attempt.via != "direct"] == []
                else:
                    assert {attempt.error.partition(":")[0] for attempt in late} == {"ConnectionRefusedError"}
                    assert seen.marked == before
            scene.agent.start()
            scene.agent.wait_steered()
        # The control: what passes in the clear is seen.
        scene.agent.stop()
        subprocess.run(scene.agent.command("clean"), stdin=subprocess.DEVNULL, capture_output=True, check=True)
        before = seen.marked
        assert get(scene.client, scene.server.ip, "/x", port=8080).status == 200
        wait_for(lambda: seen.marked > before, "the marker to be seen")


@pytest.mark.parametrize("policy", POLICIES)
def test_one_of_two_workers_dies_while_the_brain_does_nothing(mesh_of: MeshOf, policy: str) -> None:
    """Nobody bypasses the other one."""
    scene = Scene(mesh_of(nodes=1, steering="ebpf", workers=2), **both(policy))
    scene.mesh.start()
    with closing(Wire(scene.server)) as seen:
        for number in range(ROUNDS):
            wait_for(lambda: is_meshed(scene), "the service to answer")
            (brain,) = scene.agent.pids("brain")
            victim = scene.agent.pids("worker")[number // 2 % 2]  # twice: the second time its successor waits
            with scene.to_pod(fresh=3, kept=0) as load:
                load.wait_ok(5, via=("mesh",))
                before = seen.marked
                os.kill(brain, signal.SIGSTOP)
                try:
                    os.kill(victim, signal.SIGKILL)
                    wait_for(lambda victim=victim: not alive(victim), "the worker to be dead")
                    late = started_after(load, time.monotonic() + SETTLED_S, 20)
                finally:
                    os.kill(brain, signal.SIGCONT)
                assert [attempt for attempt in late if not attempt.ok or attempt.via != "mesh"] == []
                assert seen.marked == before
            # What the brain says may be from before it was stopped.
            wait_for(
                lambda victim=victim: victim not in scene.agent.pids("worker") and scene.agent.is_steered(),
                "another worker",
            )


@pytest.mark.parametrize("policy", POLICIES)
def test_the_brain_dies(mesh_of: MeshOf, policy: str) -> None:
    """Nobody notices."""
    scene = Scene(mesh_of(nodes=1, steering="ebpf"), **both(policy))
    scene.mesh.start()
    for _ in range(ROUNDS):
        with scene.to_pod(fresh=3, kept=1) as load:
            (brain,) = scene.agent.pids("brain")
            os.kill(brain, signal.SIGKILL)
            wait_for(
                lambda brain=brain: scene.agent.is_steered() and brain not in scene.agent.pids("brain"), "another brain"
            )
            load.wait_ok(5, via=("mesh",))
            attempts = load.stop()
        assert [attempt for attempt in attempts if not attempt.ok or attempt.via != "mesh"] == []
