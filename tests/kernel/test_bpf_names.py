"""Queries for names under eBPF steering: the proxy's resolver answers in the name of who was asked."""

from __future__ import annotations

import socket

import pytest

from redirect import Scope
from redirect.bpf import Count, Hooks
from tests.kernel.test_bpf import bpffs, dual, hooks, loaded, moved, original_dst, peer_of, stream, workload, world
from tests.kernel.test_steering import FAR, NAMES, PEER, POD, World, ask, exchange, nameservers

__all__ = ["bpffs", "dual", "hooks", "loaded", "world"]


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_queries_reach_the_resolver_and_answers_come_from_whom_was_asked(
    hooks: Hooks, world: World, policy: str
) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, ports=NAMES, policy=policy))
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        ask(world, family, proxy)
        ask(world, family, proxy, connected=False)
        client = stream(world, family)
        client.connect((FAR[family], 53))
        server = world.accept(proxy.tcp)
        exchange(client, server)
        assert peer_of(client) == (FAR[family], 53)
        assert original_dst(server, family) == (FAR[family], 53)
        assert not far.asked()
    families = len(world.families)
    assert moved(hooks, key) == {Count.QUERIES: 2 * families, Count.STEERED: families}


def test_the_proxys_own_queries_pass(hooks: Hooks, world: World) -> None:
    """From the port of an app's query, too."""
    key = hooks.enrol_pod(world.pod.fd, workload(world, ports=NAMES))
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        port = ask(world, family, proxy)
        ask(world, family, far, mark=0x539, port=port)
        ask(world, family, far, mark=0x539, port=port, connected=False)
        ask(world, family, proxy, port=port)
    families = len(world.families)
    assert moved(hooks, key) == {Count.QUERIES: 2 * families, Count.BYPASS_PROXY: 2 * families}


def test_names_are_left_alone_where_nobody_answers_them(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
    for family in sorted(world.families):
        _, far = nameservers(world, family)
        ask(world, family, far)
        ask(world, family, far, connected=False)
    assert moved(hooks, key) == {}


def test_without_a_resolver_open_goes_direct_and_closed_refuses(hooks: Hooks, world: World) -> None:
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        proxy.udp.close()
        key = hooks.enrol_pod(world.pod.fd, workload(world, ports=NAMES, policy="open"))
        ask(world, family, far)
        ask(world, family, far, connected=False)
        hooks.enrol_pod(world.pod.fd, workload(world, ports=NAMES, policy="closed"))
        client = world.keep(world.pod.datagram(family))
        with pytest.raises(ConnectionRefusedError):
            client.sendto(b"who?", (FAR[family], 53))
        with pytest.raises(ConnectionRefusedError):
            client.connect((FAR[family], 53))
        assert not far.asked()
    families = len(world.families)
    assert moved(hooks, key) == {Count.DIRECT_NO_LISTENER: 2 * families, Count.REFUSED_NO_LISTENER: 2 * families}


def test_lists(hooks: Hooks, dual: World) -> None:
    """Names are taken whatever is included, and left alone where they are excluded."""
    for family in (4, 6):
        proxy, far = nameservers(dual, family)
        hooks.enrol_pod(dual.pod.fd, workload(dual, ports=NAMES, scope=Scope(out_include_ports=(1,))))
        ask(dual, family, proxy)
        ask(dual, family, proxy, connected=False)
        networks = ("198.51.100.0/24", "2001:db8::/32")
        for scope in (Scope(out_exclude_ports=(53,)), Scope(out_exclude_cidrs=networks)):
            hooks.enrol_pod(dual.pod.fd, workload(dual, ports=NAMES, scope=scope))
            ask(dual, family, far)
            ask(dual, family, far, connected=False)


def test_a_socket_that_asks_for_names_and_other_things(hooks: Hooks, world: World) -> None:
    hooks.enrol_pod(world.pod.fd, workload(world, ports=NAMES))
    for family in sorted(world.families):
        proxy, _ = nameservers(world, family)
        other = world.keep(world.peer.datagram(family))
        other.bind((PEER[family], 5300))
        client = world.keep(world.pod.datagram(family))
        client.bind((POD[family], 0))
        for _ in range(2):
            client.sendto(b"who?", (FAR[family], 53))
            assert proxy.answer()[0] == b"who?"
            assert client.recvfrom(100)[1][:2] == (FAR[family], 53)
            client.sendto(b"there", (PEER[family], 5300))
            data, asker = other.recvfrom(100)
            other.sendto(data, asker)
            answer, source = client.recvfrom(100)
            assert (answer, source[:2]) == (b"there", (PEER[family], 5300))
        # Connected elsewhere, a query in between does not change with whom.
        client.connect((PEER[family], 5300))
        client.sendto(b"who?", (FAR[family], 53))
        assert proxy.udp.recv(100) == b"who?"
        assert peer_of(client) == (PEER[family], 5300)
        # And connected to a nameserver.
        client.connect((FAR[family], 53))
        assert peer_of(client) == (FAR[family], 53)
        client.connect((PEER[family], 5300))
        assert peer_of(client) == (PEER[family], 5300)


def test_queries_in_mapped_form(hooks: Hooks, dual: World) -> None:
    key = hooks.enrol_pod(dual.pod.fd, workload(dual, ports=NAMES))
    proxy, _ = nameservers(dual, 4)
    nameserver = (f"::ffff:{FAR[4]}", 53)
    for connected in (True, False):
        client = dual.keep(dual.pod.datagram(6))
        if connected:
            client.connect(nameserver)
            assert peer_of(client) == nameserver
            client.send(b"who?")
        else:
            client.sendto(b"who?", nameserver)
        assert proxy.answer()[0] == b"who?"
        answer, source = client.recvfrom(100)
        assert (answer, source[:2]) == (b"who? by the proxy", nameserver)
    assert moved(hooks, key) == {Count.QUERIES: 2}


def test_who_is_not_enrolled_is_not_touched(hooks: Hooks, world: World) -> None:
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        ask(world, family, far)
        ask(world, family, far, connected=False)
        assert not proxy.asked()
    assert hooks.enrolled() == {}


def test_a_wildcard_resolver_is_found(hooks: Hooks, dual: World) -> None:
    hooks.enrol_pod(dual.pod.fd, workload(dual, ports=NAMES, policy="closed"))
    server = dual.keep(dual.pod.datagram(6))
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", 15053))
    for family in (4, 6):
        client = dual.keep(dual.pod.datagram(family))
        client.connect((FAR[family], 53))
        client.send(b"who?")
        data, asker = server.recvfrom(100)
        server.sendto(data, asker)
        answer, source = client.recvfrom(100)
        assert (answer, source[:2]) == (b"who?", (FAR[family], 53))
