"""Connections to a bare answering listener: dialled directly, redirected by nftables, redirected by iptables.

nginx answers on the loopback of a pod; a client there makes a connection per request, to it or to a virtual address.
The rules are those of an agent. Counted are client and listener: both pay for what the kernel does.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, field, replace

from bench import _proc
from bench._figures import Round
from bench._http import first_line
from bench._load import wrk
from bench._question import Options, Question, Standing
from bench._systems import VIP, Absent, Place, System
from examples.stage import Node, Pod, Stage
from redirect import Mechanism, RedirectError, Steering, remove, steer
from redirect.netns import open_netns

PORT = 15001
MECHANISMS: dict[str, tuple[Mechanism, ...]] = {
    "unsteered": (),
    "nftables": ("nftables",),
    "iptables": ("iptables-nft", "iptables-legacy"),
}
"""By the name of a system, those that would do."""


@dataclass
class Bare:
    """A listener and, unless it is `unsteered`, rules that lead to it."""

    place: Place
    name: str
    held: list[int] = field(default_factory=list)

    @property
    def client(self) -> Pod:
        return self.place.client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{PORT}" if self.name == "unsteered" else f"http://{VIP}"

    def start(self) -> None:
        place = self.place
        place.launch(self.client, "nginx", "-p", str(place.folder), "-c", str(place.render("bare.conf")))
        place.wait_answer(self.client, f"http://127.0.0.1:{PORT}/")
        if self.name != "unsteered":
            self._steer()
        place.wait_answer(self.client, self.url + "/")

    def _steer(self) -> None:
        netns = open_netns(self.client.path)
        self.held.append(netns)
        wanted = Steering(self.place.node.netns, frozenset({4}))
        reasons = []
        for mechanism in MECHANISMS[self.name]:
            try:
                applied = steer(netns, replace(wanted, mechanism=mechanism))
            except RedirectError as exc:
                reasons.append(str(exc))
                continue
            if applied.owner_fd is not None:
                self.held.append(applied.owner_fd)
            return
        raise Absent("; ".join(reasons))

    def pids(self) -> list[int]:
        return _proc.tree(process.pid for process in self.place.processes)

    def stop(self) -> None:
        if self.held:
            netns, *owners = self.held
            self.held = []
            for owner in owners:
                os.close(owner)
            try:
                if self.name == "iptables":
                    remove(netns, self.place.node.netns)
            finally:
                os.close(netns)
        self.place.end()


def make(stage: Stage, node: Node, name: str) -> System:
    folder = stage.folder / f"{name}.d"
    folder.mkdir()
    pod = stage.add_pod(name, node)
    return Bare(Place(stage, node, name, "http", 1, pod, pod, folder), name)


def put(standing: Standing, options: Options) -> Round:
    system = standing.system
    pids = system.pids()
    before = _proc.cpu_us(pids) + children_us()
    done = wrk(system.client, f"{system.url}/", options.seconds, {"connection": "close"})
    spent = _proc.cpu_us(pids) + children_us() - before
    return {
        "connections_s": done.rps,
        "cpu_us_per_connection": spent / done.requests,
        "p50_us": done.p50_us,
        "p99_us": done.p99_us,
        "failed": float(done.failed),
    }


def children_us() -> float:
    """CPU time of the children of this process that have ended: drivers."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e6


QUESTION = Question(
    "steering", first_line(__doc__), ("http",), tuple(MECHANISMS), put, subject="nftables", make=make
)  # fmt: skip
main = QUESTION.main
