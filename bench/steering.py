"""Connections to a bare answering listener: dialled directly, redirected by each mechanism, balanced by eBPF.

nginx answers on the loopback of a pod; a client there makes a connection per request, to it or to a virtual address.
Rules and programs are those of an agent. Counted are client and listener: both pay for what the kernel does.

Programs of eBPF see the connections of the whole host, so they are attached for their own rounds only. `balanced` is a
service that is balanced inside connect(), with `ENDPOINTS` endpoints in the maps, which are addresses of the listener.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from bench import _proc
from bench._figures import Round
from bench._http import first_line
from bench._load import wrk
from bench._question import Options, Question, Standing
from bench._systems import VIP, Absent, Place, System
from examples.stage import Node, Pod, Stage
from redirect import Mechanism, RedirectError, Steering, remove, steer
from redirect.bpf import Balanced, Hooks, Target, Workload, clean
from redirect.netns import open_netns
from redirect.wanted import Ports

PORT = 15001
ENDPOINTS = 10_000
SERVICES = 10
"""That share them; one of them is dialled."""
BALANCED_PORT = 8080
NETFILTER: dict[str, tuple[Mechanism, ...]] = {
    "nftables": ("nftables",),
    "iptables": ("iptables-nft", "iptables-legacy"),
}
"""By the name of a system, those that would do."""
SYSTEMS = ("unsteered", "ebpf", "balanced", *NETFILTER)


@dataclass
class Bare:
    """A listener and, unless it is `unsteered`, what leads to it."""

    place: Place
    name: str
    held: list[int] = field(default_factory=list)

    @property
    def client(self) -> Pod:
        return self.place.client

    @property
    def url(self) -> str:
        if self.name == "unsteered":
            return f"http://127.0.0.1:{PORT}"
        return f"http://{VIP}:{BALANCED_PORT}" if self.name == "balanced" else f"http://{VIP}"

    def start(self) -> None:
        place = self.place
        place.launch(self.client, "nginx", "-p", str(place.folder), "-c", str(place.render("bare.conf")))
        place.wait_answer(self.client, f"http://127.0.0.1:{PORT}/")
        if self.name in NETFILTER:
            self._steer()
        with self.attached():
            place.wait_answer(self.client, self.url + "/")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """With the programs of eBPF, where the system has some. Raises Absent."""
        with ExitStack() as stack:
            if self.name in ("ebpf", "balanced"):
                node = f"{self.place.node.netns}-{self.name[:1]}"
                stack.callback(clean, node)
                try:
                    self._attach(stack.enter_context(Hooks.open(node)))
                except RedirectError as exc:
                    raise Absent(str(exc)) from exc
            yield

    def _attach(self, hooks: Hooks) -> None:
        netns = open_netns(self.client.path)
        try:
            hooks.enrol_pod(netns, Workload(frozenset({4}), Ports(outbound=PORT), policy="closed", inbound=False))
        finally:
            os.close(netns)
        if self.name == "balanced":
            each = ENDPOINTS // SERVICES
            for service in range(SERVICES):
                first = service * each
                targets = [Target(f"127.1.{at // 250}.{at % 250 + 1}", PORT) for at in range(first, first + each)]
                hooks.balance(Balanced(VIP, BALANCED_PORT + service, tuple(targets)))

    def _steer(self) -> None:
        netns = open_netns(self.client.path)
        self.held.append(netns)
        wanted = Steering(self.place.node.netns, frozenset({4}))
        reasons = []
        for mechanism in NETFILTER[self.name]:
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
    assert isinstance(system, Bare)
    pids = system.pids()
    with system.attached():
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


QUESTION = Question("steering", first_line(__doc__), ("http",), SYSTEMS, put, subject="ebpf", make=make)
main = QUESTION.main
