"""Changes are heard of, or seen in the fingerprint; connections older than the rules are found. On the real kernel."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from redirect import Scope
from redirect.unsteered import Connection, unsteered
from redirect.watch import Watch
from tests.kernel.test_steering import (
    FAR,
    MEDDLING_WITH_HOOKS,
    NAMES,
    NODE,
    PEER,
    POD,
    VIP,
    World,
    _iptables,
    ask,
    dual,
    exchange,
    mechanism,
    nameservers,
    owning,
    wait_for,
    world,
)

__all__ = ["dual", "mechanism", "owning", "world"]


@pytest.fixture
def watch(dual: World) -> Iterator[Watch]:
    dual.steer(dual.steering("closed", ports=NAMES))
    with closing(Watch(dual.pod.fd, NODE)) as watch:
        yield watch


def hears(watch: Watch) -> bool:
    return bool(select.select(watch.filenos(), [], [], 0)[0])


def test_nothing_is_heard_of_traffic_and_looks(dual: World, watch: Watch) -> None:
    before = watch.fingerprint(dual.mechanism)
    for family in (4, 6):
        proxy, _ = nameservers(dual, family)
        listener = dual.outbound(family)
        exchange(dual.connect(dual.pod, family, VIP[family]), dual.accept(listener))
        ask(dual, family, proxy)
    assert not dual.steer(dual.steering("closed", ports=NAMES)).changed
    assert not hears(watch)
    assert watch.fingerprint(dual.mechanism) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pod.run("ip", "route", "flush", "proto", "78"),
        lambda w: w.pod.run("ip", "-6", "route", "flush", "proto", "78"),
        lambda w: w.pod.run("ip", "link", "set", "lo", "down"),
        lambda w: w.pod.run("ip", "addr", "add", "10.99.1.77/24", "dev", "eth0"),
        lambda w: w.pod.run("ip", "addr", "add", "fd99:1::77/64", "dev", "eth0", "nodad"),
    ],
    ids=["IPv4 route", "IPv6 route", "lo", "IPv4 address", "IPv6 address"],
)
def test_links_addresses_and_routes_are_heard(owning: World, change: Callable[[World], object]) -> None:
    with closing(Watch(owning.pod.fd, NODE)) as watch:
        owning.steer(owning.steering("closed"))
        watch.drain()
        assert not hears(watch)
        change(owning)
        wait_for(lambda: hears(watch), "the event")
        assert watch.drain()
        assert not watch.drain()


def test_rules_are_seen(dual: World, watch: Watch) -> None:
    """By an event too, unless they are of legacy iptables or entries of eBPF."""
    before = watch.fingerprint(dual.mechanism)
    if dual.iptables:
        _iptables(dual, "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
    elif dual.ebpf:
        MEDDLING_WITH_HOOKS["the entry deleted"](dual)
    else:
        dual.pod.run("nft", "flush", "ruleset")
    assert watch.fingerprint(dual.mechanism) != before
    if dual.mechanism not in ("iptables-legacy", "ebpf"):
        wait_for(lambda: hears(watch), "the event")


def test_a_flood_of_events_is_one_event(dual: World, watch: Watch) -> None:
    """Also when the queue overflows."""
    commands = "\n".join(f"add table inet t{number}\ndelete table inet t{number}" for number in range(3000))
    for line in range(0, 6000, 500):
        dual.pod.pipe("\n".join(commands.splitlines()[line : line + 500]) + "\n", "nft", "-f", "-")
    assert hears(watch)
    wait_for(lambda: not watch.drain(), "the flood to be read")
    assert not hears(watch)


def test_connections_older_than_the_rules(world: World) -> None:
    desired = world.steering("closed", ports=NAMES)
    old = []
    for family in sorted(world.families):
        far, app = world.far(family), world.app(family)
        out = world.connect(world.pod, family, FAR[family])
        world.accept(far)
        client = world.connect(world.peer, family, POD[family])
        world.accept(app)
        old += [(family, out, client)]
    world.steer(desired)
    expected = set()
    for family, out, client in old:
        shown = {4: "{}", 6: "[{}]"}[family].format
        expected |= {
            Connection(f"{shown(POD[family])}:{out.getsockname()[1]}", f"{shown(FAR[family])}:8080"),
            Connection(f"{shown(POD[family])}:8080", f"{shown(PEER[family])}:{client.getsockname()[1]}"),
        }
        # Through the proxy in both directions, by its own sockets, and within the pod.
        outbound, inbound = world.outbound(family), world.inbound(family)
        inbound.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
        world.connect(world.pod, family, FAR[family], 8081)
        world.accept(outbound)
        proxied = world.connect(world.peer, family, POD[family])
        accepted = world.accept(inbound)
        assert accepted.getpeername()[1] == proxied.getsockname()[1]
    found = unsteered(world.pod.fd, desired)
    assert (found.count, set(found.shown)) == (len(expected), expected)
    excluded = Scope(out_exclude_ports=(8080,), in_exclude_ports=(8080,))
    assert unsteered(world.pod.fd, world.steering("closed", ports=NAMES, scope=excluded)).count == 0
