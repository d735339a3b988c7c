"""eBPF steering on the real kernel, inbound: listeners on loopback stand for the proxy's workers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from redirect import RedirectError, Scope
from redirect.bpf import Count, Hooks, Key, Listener
from tests.kernel.test_bpf import (
    AF,
    bpffs,
    cgroup,
    dual,
    entries,
    hooks,
    in_cgroup,
    loaded,
    moved,
    workload,
    world,
)
from tests.kernel.test_steering import FAR, LOOPBACK, PEER, POD, World, exchange, pending

__all__ = ["bpffs", "cgroup", "dual", "hooks", "loaded", "world"]


def workers(world: World, family: int, how_many: int = 1) -> list[socket.socket]:
    """Listeners at the same port, as those of workers are, each with a queue of its own."""
    found = []
    for _ in range(how_many):
        sock = world.keep(world.pod.socket(family))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((LOOPBACK[family], 15006))
        sock.listen(128)
        found.append(sock)
    return found


def slots(family: int, sockets: Sequence[socket.socket]) -> list[Listener]:
    return [Listener(4 if family == 4 else 6, worker, sock.fileno()) for worker, sock in enumerate(sockets)]


def enrol(hooks: Hooks, world: World, listeners: dict[int, list[socket.socket]], **more: object) -> Key:
    every = [slot for family, sockets in listeners.items() for slot in slots(family, sockets)]
    return hooks.enrol_pod(world.pod.fd, workload(world, **more), every)


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_connections_come_to_the_listener_with_their_addresses(hooks: Hooks, world: World, policy: str) -> None:
    listeners = {family: workers(world, family) for family in world.families}
    key = enrol(hooks, world, listeners, policy=policy)
    for family in sorted(world.families):
        app = world.app(family)
        for port in (8080, 9999):  # an app that listens, and none
            client = world.connect(world.peer, family, POD[family], port)
            server = world.accept(listeners[family][0])
            assert server.getsockname()[:2] == (POD[family], port)
            assert server.getpeername()[:2] == client.getsockname()[:2]
            exchange(client, server)
        assert not pending(app)
    assert moved(hooks, key) == {Count.INBOUND_STEERED: 2 * len(world.families)}


def test_the_leg_to_the_app_passes(hooks: Hooks, world: World) -> None:
    """Whoever connects from inside: to an own address, from an own address, as the proxy does for the client."""
    listeners = {family: workers(world, family) for family in world.families}
    key = enrol(hooks, world, listeners, policy="closed")
    for family in sorted(world.families):
        app = world.app(family)
        exchange(world.connect(world.pod, family, POD[family], mark=0x539), world.accept(app))
        exchange(world.connect(world.pod, family, POD[family]), world.accept(app))
        client = world.keep(world.pod.socket(family))
        client.bind((POD[family], 40123))
        client.connect((POD[family], 8080))
        exchange(client, world.accept(app))
        client.close()
        assert not pending(listeners[family][0])
        # A client that has the same port is steered all the same.
        other = world.keep(world.peer.socket(family))
        other.bind((PEER[family], 40123))
        other.connect((POD[family], 8080))
        world.accept(listeners[family][0])
    assert moved(hooks, key)[Count.INBOUND_LOCAL] == 3 * len(world.families)


def test_loopback_is_not_touched(hooks: Hooks, world: World) -> None:
    listeners = {family: workers(world, family) for family in world.families}
    key = enrol(hooks, world, listeners, policy="closed")
    for family in sorted(world.families):
        app = world.keep(world.pod.listener(family, LOOPBACK[family], 8080))
        exchange(world.connect(world.pod, family, LOOPBACK[family]), world.accept(app))
    assert moved(hooks, key) == {Count.BYPASS_LOCAL: len(world.families)}


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_workers_share_and_stand_in_for_each_other(hooks: Hooks, world: World, policy: str) -> None:
    listeners = {family: workers(world, family, 3) for family in world.families}
    key = enrol(hooks, world, listeners, policy=policy, workers=3)
    for family in sorted(world.families):
        app, (one, two, three) = world.app(family), listeners[family]

        def knock(family: int = family) -> None:
            for _ in range(40):
                world.connect(world.peer, family, POD[family]).close()

        knock()
        assert sum(drained(sock) for sock in (one, two, three)) == 40
        one.close()
        two.close()
        knock()
        assert drained(three) == 40
        # All gone: the policy decides.
        hooks.unlisten(key, 4 if family == 4 else 6, 2)
        if policy == "open":
            exchange(world.connect(world.peer, family, POD[family]), world.accept(app))
        else:
            with pytest.raises(ConnectionRefusedError):
                world.connect(world.peer, family, POD[family])
        assert not pending(three)
        # And one comes back.
        hooks.listen(key, Listener(4 if family == 4 else 6, 1, three.fileno()))
        knock()
        assert drained(three) == 40
        assert not pending(app)
    what = Count.INBOUND_DIRECT_NO_LISTENER if policy == "open" else Count.INBOUND_REFUSED
    assert moved(hooks, key) == {Count.INBOUND_STEERED: 120 * len(world.families), what: len(world.families)}


def drained(listener: socket.socket) -> int:
    """How many connections waited. Each had its handshake done before this is asked."""
    listener.setblocking(False)
    found = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            listener.settimeout(10)
            return found
        found += 1


def test_every_worker_gets_some(hooks: Hooks, dual: World) -> None:
    listeners = {family: workers(dual, family, 3) for family in (4, 6)}
    enrol(hooks, dual, listeners, workers=3)
    for family in (4, 6):
        for port in range(41000, 41040):  # the same ones each time
            client = dual.keep(dual.peer.socket(family))
            client.bind((PEER[family], port))
            client.connect((POD[family], 8080))
        assert all(drained(sock) for sock in listeners[family])


SCOPES = {
    "excluded-port": (Scope(in_exclude_ports=(8080,)), Count.INBOUND_EXCLUDED),
    "another-included-port": (Scope(in_include_ports=(8081,)), Count.INBOUND_NOT_INCLUDED),
    "excluded-client": (Scope(in_exclude_cidrs=("10.99.1.0/24", "fd99:1::/64")), Count.INBOUND_EXCLUDED),
    "exclusion-wins": (Scope(in_include_ports=(8080,), in_exclude_ports=(8080,)), Count.INBOUND_EXCLUDED),
}


@pytest.mark.parametrize("name", SCOPES)
def test_what_a_list_lets_pass(hooks: Hooks, world: World, name: str) -> None:
    scope, what = SCOPES[name]
    listeners = {family: workers(world, family) for family in world.families}
    key = enrol(hooks, world, listeners, policy="closed", scope=scope)
    for family in sorted(world.families):
        app = world.app(family)
        exchange(world.connect(world.peer, family, POD[family]), world.accept(app))
        assert not pending(listeners[family][0])
    assert moved(hooks, key) == {what: len(world.families)}


@pytest.mark.parametrize(
    "scope",
    [
        Scope(in_exclude_ports=(8081,)),
        Scope(in_include_ports=(8080,)),
        Scope(in_exclude_cidrs=("192.0.2.0/24", "2001:db8:99::/48")),
        Scope(out_exclude_cidrs=("10.99.1.0/24", "fd99:1::/64"), out_include_ports=(1,)),
    ],
    ids=["another-excluded-port", "included-port", "another-excluded-client", "of-the-other-direction"],
)
def test_what_a_list_does_not_let_pass(hooks: Hooks, world: World, scope: Scope) -> None:
    listeners = {family: workers(world, family) for family in world.families}
    enrol(hooks, world, listeners, policy="closed", scope=scope)
    for family in sorted(world.families):
        client = world.connect(world.peer, family, POD[family])
        exchange(client, world.accept(listeners[family][0]))


def test_a_family_that_is_not_steered_passes(hooks: Hooks, dual: World) -> None:
    for steered, other in ((4, 6), (6, 4)):
        key = enrol(hooks, dual, {}, policy="closed", families=frozenset({steered}))
        app = dual.app(other)
        exchange(dual.connect(dual.peer, other, POD[other]), dual.accept(app))
        with pytest.raises(ConnectionRefusedError):
            dual.connect(dual.peer, steered, POD[steered])
    assert moved(hooks, key) == {Count.INBOUND_FAMILY: 2, Count.INBOUND_REFUSED: 2}


def test_established_connections_stay_with_whom_they_have(hooks: Hooks, world: World) -> None:
    for family in sorted(world.families):
        app, (listener,) = world.app(family), workers(world, family)
        before = world.connect(world.peer, family, POD[family]), world.accept(app)
        key = enrol(hooks, world, {family: [listener]}, policy="closed")
        exchange(*before)
        during = world.connect(world.peer, family, POD[family]), world.accept(listener)
        # Draining, then gone.
        enrol(hooks, world, {}, policy="closed", inbound=False)
        exchange(*during)
        exchange(world.connect(world.peer, family, POD[family]), world.accept(app))
        hooks.withdraw(key)
        exchange(*before)
        exchange(*during)
        exchange(world.connect(world.peer, family, POD[family]), world.accept(app))
        listener.close()


def test_draining_lets_new_connections_pass(hooks: Hooks, dual: World) -> None:
    """The program goes with the last workload of the namespace that takes connections."""
    listeners = {family: workers(dual, family) for family in (4, 6)}
    key = enrol(hooks, dual, listeners, policy="closed")
    assert [link.name for link in hooks.links() if link.name.startswith("inbound_")] == [f"inbound_{key.number}"]
    enrol(hooks, dual, {}, policy="closed", inbound=False)
    assert not [link for link in hooks.links() if link.name.startswith("inbound_")]


def test_fewer_workers_leave_no_listener_behind(hooks: Hooks, dual: World) -> None:
    key = enrol(hooks, dual, {4: workers(dual, 4, 3)}, workers=3)
    assert hooks.enrolled()[key].listeners == {(4, 0), (4, 1), (4, 2)}
    hooks.enrol_pod(dual.pod.fd, workload(dual, workers=1))
    assert hooks.enrolled()[key].listeners == {(4, 0)}


def test_udp_passes(hooks: Hooks, world: World) -> None:
    key = enrol(hooks, world, {}, policy="closed")
    for family in sorted(world.families):
        app, client = world.keep(world.pod.datagram(family)), world.keep(world.peer.datagram(family))
        app.bind((POD[family], 5300))
        client.sendto(b"there", (POD[family], 5300))
        assert app.recv(100) == b"there"
    assert moved(hooks, key) == {}


def test_a_service_of_the_host_gets_its_own_ports_only(hooks: Hooks, world: World, cgroup: Path) -> None:
    """The pod's namespace stands for the host's."""
    before = entries(hooks)
    scope = Scope(in_include_ports=(8080,))
    listeners = {family: workers(world, family) for family in world.families}
    every = [slot for family, sockets in listeners.items() for slot in slots(family, sockets)]
    key = hooks.enrol_cgroup(cgroup, world.pod.fd, workload(world, scope=scope, policy="closed"), every)
    for family in sorted(world.families):
        app, neighbour = world.app(family), world.app(family, 8081)
        client = world.connect(world.peer, family, POD[family])
        server = world.accept(listeners[family][0])
        assert server.getsockname()[:2] == (POD[family], 8080)
        exchange(client, server)
        exchange(world.connect(world.peer, family, POD[family], 8081), world.accept(neighbour))
        # From inside: the proxy's leg and the neighbours alike.
        exchange(world.connect(world.pod, family, POD[family]), world.accept(app))
        with in_cgroup(cgroup):
            exchange(world.connect(world.pod, family, POD[family], mark=0x539), world.accept(app))
        assert not pending(app)
    assert moved(hooks, key)[Count.INBOUND_STEERED] == len(world.families)
    hooks.withdraw(key)
    exchange(world.connect(world.peer, family, POD[family]), world.accept(app))
    assert entries(hooks) == before


def test_two_services_of_the_host_cannot_have_the_same_port(hooks: Hooks, dual: World, cgroup: Path) -> None:
    other = cgroup / "other"
    other.mkdir()
    try:
        wanted = workload(dual, scope=Scope(in_include_ports=(8080,)))
        key = hooks.enrol_cgroup(cgroup, dual.pod.fd, wanted)
        before = entries(hooks)
        with pytest.raises(RedirectError, match="port 8080"):
            hooks.enrol_cgroup(other, dual.pod.fd, wanted)
        with pytest.raises(RedirectError, match="ports"):
            hooks.enrol_cgroup(other, dual.pod.fd, workload(dual))
        with pytest.raises(RedirectError, match="namespace"):
            hooks.enrol_cgroup(other, dual.peer.fd, wanted)
        assert list(hooks.enrolled()) == [key]
        assert entries(hooks) == before
    finally:
        other.rmdir()


def test_a_socket_that_does_not_listen_is_no_listener(hooks: Hooks, dual: World) -> None:
    key = enrol(hooks, dual, {})
    for family in (4, 6):
        with closing(socket.socket(AF[family], socket.SOCK_STREAM)) as sock, pytest.raises(RedirectError):
            hooks.listen(key, Listener(4 if family == 4 else 6, 0, sock.fileno()))
    with pytest.raises(RedirectError, match="not enrolled"):
        hooks.listen(Key("pod", 1), Listener(4, 0, 0))
    hooks.unlisten(Key("pod", 1), 4, 0)
    far = dual.far(4)
    exchange(dual.connect(dual.pod, 4, FAR[4]), dual.accept(far))
