"""Services that are balanced inside connect(), on the real kernel. The endpoints listen in the peer's namespace."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import closing

import pytest

from redirect import Scope
from redirect.bpf import Balanced, Count, Hooks, Target
from tests.kernel.test_bpf import (
    IPPROTO_MPTCP,
    bpffs,
    dual,
    entries,
    hooks,
    loaded,
    moved,
    peer_of,
    stream,
    workload,
    world,
)
from tests.kernel.test_steering import FAR, PEER, VIP, World, exchange, pending, wait_for

__all__ = ["bpffs", "dual", "hooks", "loaded", "world"]


def targets(family: int, **weights: int) -> tuple[Target, ...]:
    """`p8081=3`: an endpoint at that port, with that weight."""
    return tuple(Target(PEER[family], int(name[1:]), weight) for name, weight in weights.items())


def port_of(sock: socket.socket) -> int:
    """Of the endpoint that it is connected to, which getpeername() does not tell: what a byte comes back with."""
    return int(sock.recv(5).decode())


class Endpoints:
    """Listeners that say their port to each connection and close it."""

    def __init__(self, world: World, family: int, *ports: int) -> None:
        self.sockets = [world.keep(world.peer.listener(family, PEER[family], port)) for port in ports]
        self.threads = [threading.Thread(target=self._serve, args=(sock,)) for sock in self.sockets]
        for thread in self.threads:
            thread.start()
        world.stack.callback(self.stop)

    @staticmethod
    def _serve(listener: socket.socket) -> None:
        listener.settimeout(None)
        port = str(listener.getsockname()[1]).encode().ljust(5)
        while True:
            try:
                sock = listener.accept()[0]
            except OSError:
                return
            with closing(sock):
                sock.sendall(port)

    def stop(self) -> None:
        for sock in self.sockets:
            sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()


def tally(world: World, family: int, how_many: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for _ in range(how_many):
        with closing(world.pod.connect(family, VIP[family], 80)) as client:
            assert peer_of(client) == (VIP[family], 80)
            found[port_of(client)] += 1
    return found


def test_connections_are_shared_by_weight(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
    for family in sorted(world.families):
        Endpoints(world, family, 8081, 8082, 8083)
        hooks.balance(Balanced(VIP[family], 80, targets(family, p8081=7, p8082=3, p8083=0)))
        found = tally(world, family, 400)
        assert set(found) == {8081, 8082}
        assert abs(found[8081] - 280) < 60  # six standard deviations
        hooks.unbalance(VIP[family], 80)
    assert moved(hooks, key) == {Count.BALANCED: 400 * len(world.families)}


def test_mapped_form_and_mptcp(hooks: Hooks, dual: World) -> None:
    key = hooks.enrol_pod(dual.pod.fd, workload(dual))
    Endpoints(dual, 4, 8081)
    hooks.balance(Balanced(VIP[4], 80, targets(4, p8081=1)))
    client = stream(dual, 6)
    client.connect((f"::ffff:{VIP[4]}", 80))
    assert peer_of(client) == (f"::ffff:{VIP[4]}", 80)
    assert port_of(client) == 8081
    client = stream(dual, 4, IPPROTO_MPTCP)
    client.connect((VIP[4], 80))
    assert port_of(client) == 8081
    assert moved(hooks, key) == {Count.BALANCED: 2}
    hooks.unbalance(VIP[4], 80)


def test_without_an_endpoint_connections_are_refused_at_once(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="open"))
    for family in sorted(world.families):
        listener = world.outbound(family)
        for nobody in ((), targets(family, p8081=0)):
            hooks.balance(Balanced(VIP[family], 80, nobody))
            with pytest.raises(ConnectionRefusedError):
                world.connect(world.pod, family, VIP[family], 80)
        assert not pending(listener)
        # Another port of the VIP, and the VIP when it is no longer balanced, are the proxy's.
        world.connect(world.pod, family, VIP[family], 81)
        world.accept(listener)
        hooks.unbalance(VIP[family], 80)
        world.connect(world.pod, family, VIP[family], 80)
        world.accept(listener)
    families = len(world.families)
    assert moved(hooks, key) == {Count.REFUSED_NO_ENDPOINT: 2 * families, Count.STEERED: 2 * families}
    assert hooks.balanced() == {}


def test_a_workload_that_needs_the_proxy_gets_it(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, balance=False))
    for family in sorted(world.families):
        Endpoints(world, family, 8081)
        hooks.balance(Balanced(VIP[family], 80, targets(family, p8081=1)))
        listener = world.outbound(family)
        exchange(world.connect(world.pod, family, VIP[family], 80), world.accept(listener))
        hooks.unbalance(VIP[family], 80)
    assert moved(hooks, key) == {Count.STEERED: len(world.families)}


def test_a_service_at_a_real_address_is_within_the_lists(hooks: Hooks, dual: World) -> None:
    """Excluded, it is left alone; a VIP is nowhere else, so lists don't matter there."""
    scope = Scope(out_exclude_ports=(80,))
    key = hooks.enrol_pod(dual.pod.fd, workload(dual, scope=scope))
    for family in (4, 6):
        Endpoints(dual, family, 8081)
        far = dual.far(family, 80)
        for address in (VIP[family], FAR[family]):
            hooks.balance(Balanced(address, 80, targets(family, p8081=1)))
        tally(dual, family, 1)
        exchange(dual.connect(dual.pod, family, FAR[family], 80), dual.accept(far))
    assert moved(hooks, key) == {Count.BALANCED: 2, Count.BYPASS_EXCLUDED: 2}
    for address, port in list(hooks.balanced()):
        hooks.unbalance(address, port)


def test_affinity_keeps_a_workload_with_its_endpoint(hooks: Hooks, dual: World) -> None:
    hooks.enrol_pod(dual.pod.fd, workload(dual))
    ports = {f"p{port}": 1 for port in range(8081, 8089)}
    Endpoints(dual, 4, *range(8081, 8089))
    hooks.balance(Balanced(VIP[4], 80, targets(4, **ports), affinity=True))
    assert len(tally(dual, 4, 60)) == 1
    hooks.balance(Balanced(VIP[4], 80, targets(4, **ports)))
    assert len(tally(dual, 4, 60)) > 1
    hooks.unbalance(VIP[4], 80)


def test_endpoints_change_without_a_gap(hooks: Hooks, dual: World) -> None:
    """Connections go on while every change replaces all endpoints; none fails, none goes to one that is gone."""
    before = entries(hooks)
    key = hooks.enrol_pod(dual.pod.fd, workload(dual, policy="closed"))
    Endpoints(dual, 4, *range(8081, 8089))
    hooks.balance(Balanced(VIP[4], 80, targets(4, p8081=1)))
    stop, failed, done = threading.Event(), [], Counter[int]()

    def load() -> None:
        while not stop.is_set():
            try:
                done.update(tally(dual, 4, 1))
            except (OSError, AssertionError) as exc:
                failed.append(exc)
                return

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for turn in range(300):
            ports = {f"p{8081 + (turn + more) % 8}": 1 + more for more in range(1 + turn % 4)}
            hooks.balance(Balanced(VIP[4], 80, targets(4, **ports)))
        hooks.balance(Balanced(VIP[4], 80, targets(4, p8085=1)))
        assert set(tally(dual, 4, 20)) == {8085}
        wait_for(lambda: bool(failed) or sum(done.values()) > 100, "connections under the changes")
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert moved(hooks, key) == {Count.BALANCED: sum(done.values()) + 20}
    assert hooks.balanced() == {(VIP[4], 80): 1}
    hooks.unbalance(VIP[4], 80)
    hooks.withdraw(key)
    assert entries(hooks) == before
