"""Steering beside rule sets that others put into the namespace, before ours and after: Docker's, firewalld's, and those
that break it, which `blocked` has to name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest

from redirect import observe
from redirect.obstacles import blocked
from tests.kernel.test_steering import (
    FAR,
    NAMES,
    NODE,
    POD,
    World,
    ask,
    dual,
    exchange,
    mechanism,
    nameservers,
    original_dst,
    owning,
    pending,
)

__all__ = ["dual", "mechanism", "owning"]

DOCKER = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d {container}/{bits} ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d {loopback} -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {network} ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8088 -j DNAT --to-destination {published}
COMMIT
"""
"""As dockerd makes it for one container with a published port."""

FIREWALLD = """\
table inet firewalld {
	chain mangle_PREROUTING {
		type filter hook prerouting priority mangle + 10; policy accept;
		jump mangle_PREROUTING_ZONES
	}
	chain mangle_PREROUTING_ZONES { return; }
	chain nat_PREROUTING {
		type nat hook prerouting priority dstnat + 10; policy accept;
	}
	chain nat_OUTPUT {
		type nat hook output priority -90; policy accept;
	}
	chain nat_POSTROUTING {
		type nat hook postrouting priority srcnat + 10; policy accept;
	}
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_INPUT_ZONES {
		meta l4proto { icmp, ipv6-icmp } accept
		tcp dport 8080 ct state new accept
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT {
		type filter hook output priority filter + 10; policy accept;
		ct state { established, related } accept
		oifname "lo" accept
	}
}
"""
"""As firewalld makes it, with one zone and one open port."""


def docker(world: World, variant: str) -> None:
    for family in sorted(world.families):
        text = DOCKER.format(
            container={4: "172.17.0.2", 6: "fd17::2"}[family],
            bits={4: 32, 6: 128}[family],
            loopback={4: "127.0.0.0/8", 6: "::1/128"}[family],
            network={4: "172.17.0.0/16", 6: "fd17::/64"}[family],
            published={4: "172.17.0.2:80", 6: "[fd17::2]:80"}[family],
        )
        command = {4: "iptables", 6: "ip6tables"}[family]
        world.pod.pipe(text, f"{command}-{variant}-restore", "--wait", "5")


OTHERS: dict[str, Callable[[World], object]] = {
    "docker by iptables-nft": lambda world: docker(world, "nft"),
    "docker by iptables-legacy": lambda world: docker(world, "legacy"),
    "firewalld": lambda world: world.pod.pipe(FIREWALLD, "nft", "-f", "-"),
}


def way_out(world: World) -> str:
    return blocked(world.pod.fd, observe(world.pod.fd, NODE).routes, 15001)


def assert_steered(world: World) -> None:
    listening = []
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        outbound, inbound, app = world.outbound(family), world.inbound(family), world.app(family)
        client = world.connect(world.pod, family, FAR[family])
        server = world.accept(outbound)
        assert original_dst(server, family) == (FAR[family], 8080)
        exchange(client, server)
        ask(world, family, proxy)
        ask(world, family, far, mark=0x539)
        client = world.connect(world.peer, family, POD[family])
        server = world.accept(inbound)
        assert server.getsockname()[:2] == (POD[family], 8080)
        exchange(client, server)
        exchange(world.connect(world.pod, family, POD[family], mark=0x539), world.accept(app))
        assert not pending(app)
        listening += [proxy.udp, proxy.tcp, far.udp, far.tcp, outbound, inbound, app]
    assert way_out(world) == ""
    for sock in listening:
        sock.close()


@pytest.mark.parametrize("others", OTHERS)
def test_rule_sets_of_others(dual: World, others: str) -> None:
    """There before ours; put there after, which for iptables means flushed, and put back; and both."""
    desired = dual.steering("closed", ports=NAMES)
    OTHERS[others](dual)
    assert dual.steer(desired).changed
    assert_steered(dual)
    OTHERS[others](dual) if "docker" in others else dual.pod.run("nft", "delete table inet firewalld")
    dual.steer(desired)
    assert_steered(dual)
    assert not dual.steer(desired).changed
    if "firewalld" in others:
        OTHERS[others](dual)
        assert not dual.steer(desired).changed
        assert_steered(dual)


def test_a_flush_of_nat_by_iptables(dual: World) -> None:
    """Also by the variant that is not ours."""
    desired = dual.steering("closed", ports=NAMES)
    dual.steer(desired)
    for variant in ("nft", "legacy"):
        for command in ("iptables", "ip6tables"):
            dual.pod.run(f"{command}-{variant}", "-w", "-t", "nat", "-F")
        assert dual.steer(desired).changed is (dual.mechanism == f"iptables-{variant}")
        assert_steered(dual)


OBSTACLES = {
    "a firewall without loopback": (
        "table inet strict { chain input { type filter hook input priority 0; policy drop;"
        " ct state established,related accept; meta l4proto ipv6-icmp accept; tcp dport 8080 accept; }\n}",
        "inet strict input",
    ),
    "a rule about our port": (
        "table inet odd { chain input { type filter hook input priority 0; tcp dport 15001 reject with tcp reset; }\n}",
        "inet odd input",
    ),
    "another proxy": (
        "table ip other { chain output { type nat hook output priority -101; tcp dport 1-65535 redirect to :9; }\n}",
        "ip other output",
    ),
    "no conntrack": (
        "table inet raw { chain output { type filter hook output priority -300; notrack; }\n}",
        "inet raw output",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_is_in_the_way_is_named(owning: World, obstacle: str) -> None:
    text, name = OBSTACLES[obstacle]
    desired = owning.steering("closed")
    owning.steer(desired)
    with closing(owning.outbound(4)), closing(owning.outbound(6)):
        assert way_out(owning) == ""
        owning.pod.pipe(text, "nft", "-f", "-")
        said = way_out(owning)
        assert name in said, said
        owning.pod.run("nft", "delete", "table", *name.split()[:2])
        assert way_out(owning) == ""
