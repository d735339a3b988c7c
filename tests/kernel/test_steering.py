"""Steering on the real kernel: a pod and a peer in namespaces of their own, joined by a veth pair.

The peer owns a far-away address too, so that what is not redirected arrives somewhere visible. Every case runs with
every mechanism and IP family; where one can't do what the others can, the case says what happens instead.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from redirect import (
    Applied,
    Mechanism,
    Ports,
    RedirectError,
    Scope,
    Steering,
    dialable,
    observe,
    reachable,
    remove,
    steer,
)
from redirect.apply import execute
from redirect.backend import BACKENDS
from redirect.bpf import Listener, clean
from redirect.bpf.bpffs import BPFFS, cgroup_root, nodes
from redirect.bpf.pins import place_of
from redirect.ebpf import ENTRIES
from redirect.netns import identity, inside, netns_cookie, open_netns
from redirect.plan import DIALECTS, AddRoute, CreateTable, Dropped, Plan, plan
from redirect.probe import probe
from redirect.wanted import MECHANISMS, FailurePolicy, Table

pytestmark = pytest.mark.kernel

NODE = "node-a"
PATIENCE_S = 10.0
SO_ORIGINAL_DST = 80
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
POD = {4: "10.99.1.2", 6: "fd99:1::2"}
PEER = {4: "10.99.1.1", 6: "fd99:1::1"}
FAR = {4: "198.51.100.7", 6: "2001:db8:7::7"}
VIP = {4: "240.240.3.4", 6: "fd00:240::3:4"}
POLICIES: list[FailurePolicy] = ["open", "closed"]

_counter = itertools.count()


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}"
        threading.Event().wait(0.005)


@dataclass
class Namespace:
    name: str
    fd: int = -1

    def run(self, *command: str) -> str:
        return sh("nsenter", f"--net=/run/netns/{self.name}", *command)

    def pipe(self, text: str, *command: str) -> None:
        """Give it to the command's standard input."""
        where = ["nsenter", f"--net=/run/netns/{self.name}"]
        done = subprocess.run([*where, *command], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def nft(self) -> str:
        return self.run("nft", "list", "ruleset")

    def rules(self) -> str:
        """Of everybody, by the tools of those who made them."""
        saves = [f"{command}-{variant}-save" for variant in ("nft", "legacy") for command in ("iptables", "ip6tables")]
        text = "\n".join([self.nft(), *(self.run(save) for save in saves)])
        lines = re.sub(r"\[\d+:\d+\]|packets \d+ bytes \d+", "", text).splitlines()
        # Comments have the time, tables come in an order that changes.
        return "\n".join(sorted(line for line in lines if not line.startswith("#")))

    def state(self) -> str:
        """All that steering could leave behind, by other tools than ours."""
        return "\n".join(
            [
                self.rules(),
                self.run("ip", "route", "show", "table", "all"),
                self.run("ip", "-6", "route", "show", "table", "all"),
                self.run("ip", "rule"),
                self.run("ip", "-6", "rule"),
            ]
        )

    def socket(self, family: int) -> socket.socket:
        with inside(self.fd):
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        sock.settimeout(PATIENCE_S)
        return sock

    def datagram(self, family: int) -> socket.socket:
        with inside(self.fd):
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        sock.settimeout(PATIENCE_S)
        return sock

    def listener(self, family: int, address: str, port: int, *, transparent: bool = False) -> socket.socket:
        sock = self.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if transparent:
            option = (socket.SOL_IP, IP_TRANSPARENT) if family == 4 else (socket.IPPROTO_IPV6, IPV6_TRANSPARENT)
            sock.setsockopt(*option, 1)
        sock.bind((address, port))
        sock.listen(128)
        return sock

    def connect(self, family: int, address: str, port: int, *, mark: int = 0) -> socket.socket:
        sock = self.socket(family)
        try:
            if mark:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock


@dataclass
class World:
    families: frozenset[int]
    mechanism: Mechanism
    pod: Namespace
    peer: Namespace
    stack: ExitStack
    held: list[int] = field(default_factory=list)
    inbounds: list[tuple[int, socket.socket]] = field(default_factory=list)
    """With their family."""

    def steering(self, policy: FailurePolicy = "open", **more: object) -> Steering:
        return replace(Steering(NODE, self.families, policy, mechanism=self.mechanism), **more)  # type: ignore[arg-type]

    @property
    def iptables(self) -> bool:
        return self.mechanism.startswith("iptables")

    @property
    def ebpf(self) -> bool:
        return self.mechanism == "ebpf"

    def has(self, generation: int, node: str = NODE) -> bool:
        """By the tools of those who steer, not by ours."""
        if not self.ebpf:
            return self.name(generation, node) in self.pod.rules()
        shown = json.loads(sh("bpftool", "-j", "map", "dump", "pinned", str(place_of(node, BPFFS) / "map_pods")))
        keys = [int.from_bytes(bytes(int(octet, 16) for octet in entry["key"]), sys.byteorder) for entry in shown]
        return netns_cookie(self.pod.fd) in keys

    def state(self) -> tuple[str, list[Table]]:
        return self.pod.state(), [*observe(self.pod.fd, NODE, ("ebpf",)).tables] if self.ebpf else []

    def source(self, family: int) -> str:
        """Of a connection that was steered: with eBPF it was made to loopback, from there."""
        return LOOPBACK[family] if self.ebpf else POD[family]

    def name(self, generation: int, node: str = NODE) -> str:
        return DIALECTS[self.mechanism].table_name(node, generation)

    def refuses(self, where: Namespace, family: int, address: str, port: int = 8080) -> None:
        """A connection into the pod that nobody takes. TPROXY of iptables drops where nftables goes on to a reset."""
        with closing(where.socket(family)) as sock:
            sock.settimeout(0.2 if self.iptables else PATIENCE_S)
            with pytest.raises(TimeoutError if self.iptables else ConnectionRefusedError):
                sock.connect((address, port))

    def steer(self, desired: Steering) -> Applied:
        applied = steer(self.pod.fd, desired, listeners=self.listeners())
        if applied.owner_fd is not None:
            self.held.append(applied.owner_fd)
        return applied

    def listeners(self) -> list[Listener]:
        """What eBPF has to be given; others find it by its port."""
        found = [(family, sock) for family, sock in self.inbounds if sock.fileno() >= 0]
        return [Listener(4 if family == 4 else 6, 0, sock.fileno()) for family, sock in found]

    def close_owners(self, *, but_newest: bool = False) -> None:
        while len(self.held) > int(but_newest):
            os.close(self.held.pop(0))

    def keep(self, sock: socket.socket) -> socket.socket:
        self.stack.callback(sock.close)
        return sock

    def outbound(self, family: int) -> socket.socket:
        return self.keep(self.pod.listener(family, LOOPBACK[family], 15001))

    def inbound(self, family: int) -> socket.socket:
        sock = self.keep(self.pod.listener(family, LOOPBACK[family], 15006, transparent=True))
        self.inbounds.append((family, sock))
        with inside(self.pod.fd):
            ENTRIES.serve(NODE, self.listeners())
        return sock

    def app(self, family: int, port: int = 8080) -> socket.socket:
        return self.keep(self.pod.listener(family, POD[family], port))

    def far(self, family: int, port: int = 8080) -> socket.socket:
        return self.keep(self.peer.listener(family, FAR[family], port))

    def connect(self, where: Namespace, family: int, address: str, port: int = 8080, *, mark: int = 0) -> socket.socket:
        return self.keep(where.connect(family, address, port, mark=mark))

    def accept(self, listener: socket.socket) -> socket.socket:
        sock = listener.accept()[0]
        sock.settimeout(PATIENCE_S)
        return self.keep(sock)


def make_namespace(stack: ExitStack, role: str) -> Namespace:
    namespace = Namespace(f"steer{os.getpid()}n{next(_counter)}-{role}")
    stack.callback(subprocess.run, ["ip", "netns", "del", namespace.name], capture_output=True)
    sh("ip", "netns", "add", namespace.name)
    namespace.fd = open_netns(f"/run/netns/{namespace.name}")
    stack.callback(os.close, namespace.fd)
    print(f"{role}: nsenter --net=/run/netns/{namespace.name}")
    return namespace


def make_world(stack: ExitStack, wanted: frozenset[int], mechanism: Mechanism = "nftables") -> World:
    pod, peer = make_namespace(stack, "pod"), make_namespace(stack, "peer")
    sh("ip", "link", "add", "eth0", "netns", pod.name, "type", "veth", "peer", "name", "eth0", "netns", peer.name)
    length = {4: 24, 6: 64}
    for namespace, own in ((pod, POD), (peer, PEER)):
        # No link-local addresses: they would come late and change the tables under comparison.
        lines = ["link set eth0 addrgenmode none", "link set lo up"]
        lines += [f"addr add {own[family]}/{length[family]} dev eth0{' nodad' * (family == 6)}" for family in wanted]
        if namespace is peer:
            lines += [f"addr add {FAR[family]}/{32 if family == 4 else 128} dev lo" for family in wanted]
        namespace.pipe("\n".join([*lines, "link set eth0 up", ""]), "ip", "-batch", "-")
    every = {4: "0.0.0.0/0", 6: "::/0"}
    pod.pipe("".join(f"route add {every[family]} via {PEER[family]}\n" for family in wanted), "ip", "-batch", "-")
    for namespace in (pod, peer):
        wait_for(lambda ns=namespace: "LOWER_UP" in ns.run("ip", "link", "show", "eth0"), "carrier")  # type: ignore[misc]
    world = World(wanted, mechanism, pod, peer, stack)
    stack.callback(world.close_owners)
    stack.callback(withdraw, pod.fd)
    return world


def withdraw(netns_fd: int) -> None:
    """What eBPF has of ours is in no namespace, so it does not go with one."""
    with inside(netns_fd):
        for node in nodes():
            ENTRIES.withdraw(node)


def _kernel_has_legacy_iptables() -> bool:
    """Newer kernels may be built without. Asked of the command itself, not of our own rules."""
    command = ["unshare", "--net", "iptables-legacy", "--table", "nat", "--list-rules"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


TRIED = [found for found in MECHANISMS if found != "iptables-legacy" or _kernel_has_legacy_iptables()]


by_policy = pytest.mark.parametrize(
    ("mechanism", "policy"),
    [("nftables", "open"), ("ebpf", "open"), *((found, "closed") for found in TRIED)],
    indirect=["mechanism"],
)
"""Rules of iptables are the same for both policies."""
by_rules = pytest.mark.parametrize("mechanism", [found for found in TRIED if found != "ebpf"], indirect=True)
"""What is about rules that have a name, and those of others."""


@pytest.fixture(params=TRIED)
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    found: Mechanism = request.param
    return found


@pytest.fixture(params=[{4}, {6}, {4, 6}], ids=["v4", "v6", "dual"])
def world(request: pytest.FixtureRequest, mechanism: Mechanism) -> Iterator[World]:
    with ExitStack() as stack:
        yield make_world(stack, frozenset(request.param), mechanism)


@pytest.fixture
def dual(mechanism: Mechanism) -> Iterator[World]:
    with ExitStack() as stack:
        yield make_world(stack, frozenset({4, 6}), mechanism)


@pytest.fixture
def owning() -> Iterator[World]:
    """For what only nftables has: tables that belong to a socket."""
    with ExitStack() as stack:
        yield make_world(stack, frozenset({4, 6}))


def original_dst(sock: socket.socket, family: int) -> tuple[str, int]:
    if family == 4:
        port, address = struct.unpack_from("!2xH4s", sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
        return socket.inet_ntop(socket.AF_INET, address), port
    port, address = struct.unpack_from("!2xH4x16s", sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
    return socket.inet_ntop(socket.AF_INET6, address), port


def exchange(one: socket.socket, other: socket.socket) -> None:
    """Bytes go both ways, `one` first."""
    for sender, receiver, data in ((one, other, b"there"), (other, one, b"and back")):
        sender.sendall(data)
        assert receiver.recv(100) == data


def pending(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    finally:
        listener.settimeout(PATIENCE_S)
    return True


# --- outbound


@by_policy
def test_outbound_connects_reach_the_listener_with_their_destination(world: World, policy: FailurePolicy) -> None:
    world.steer(world.steering(policy))
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        for destination in (FAR[family], VIP[family], PEER[family]):
            client = world.connect(world.pod, family, destination)
            server = world.accept(listener)
            assert original_dst(server, family) == (destination, 8080)
            assert client.getsockname()[0] == world.source(family)
            assert client.getpeername()[:2] == (destination, 8080)
            assert server.getpeername()[:2] == client.getsockname()[:2]
            exchange(client, server)
        assert not pending(far)
        assert f"{LOOPBACK[family]}" in world.pod.run("ss", "-Htn", "sport", "=", ":15001")


def test_marked_sockets_bypass(world: World) -> None:
    world.steer(world.steering())
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        for mark in (0x539, 0xA0539):  # what is outside the mask does not matter
            client = world.connect(world.pod, family, FAR[family], mark=mark)
            server = world.accept(far)
            assert server.getpeername()[0] == POD[family]
            exchange(client, server)
        assert not pending(listener)
        world.connect(world.pod, family, FAR[family], mark=0x538)
        world.accept(listener)


def test_own_addresses_and_loopback_are_not_redirected(world: World) -> None:
    world.steer(world.steering("closed"))
    for family in sorted(world.families):
        listener, inbound = world.outbound(family), world.inbound(family)
        for address in (POD[family], LOOPBACK[family]):
            app = world.keep(world.pod.listener(family, address, 8080))
            exchange(world.connect(world.pod, family, address), world.accept(app))
        assert not pending(listener)
        assert not pending(inbound)


def test_a_family_that_is_not_steered_passes(dual: World) -> None:
    for steered, other in ((4, 6), (6, 4)):
        dual.steer(replace(dual.steering("closed"), families=frozenset({steered})))
        far, app = dual.far(other), dual.app(other)
        exchange(dual.connect(dual.pod, other, FAR[other]), dual.accept(far))
        exchange(dual.connect(dual.peer, other, POD[other]), dual.accept(app))
        with pytest.raises(ConnectionRefusedError):
            dual.connect(dual.pod, steered, FAR[steered])


# --- names

NAMES = Ports(dns=15053)


class Nameserver:
    """Answers queries over UDP and TCP with its own name, from the address that was asked."""

    def __init__(self, world: World, where: Namespace, family: int, address: str, port: int, name: bytes) -> None:
        self.udp = world.keep(where.datagram(family))
        self.udp.bind((address, port))
        self.tcp = world.keep(where.listener(family, address, port))
        self.name = name

    def answer(self) -> tuple[bytes, tuple[str, int]]:
        """The next query over UDP and who asked."""
        query, client = self.udp.recvfrom(512)
        self.udp.sendto(query + self.name, client)
        return query, client[:2]

    def asked(self) -> bool:
        return readable(self.udp) or readable(self.tcp)


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def nameservers(world: World, family: int) -> tuple[Nameserver, Nameserver]:
    """The proxy's and the one that the app asks."""
    proxy = Nameserver(world, world.pod, family, LOOPBACK[family], 15053, b" by the proxy")
    return proxy, Nameserver(world, world.peer, family, FAR[family], 53, b" from afar")


def ask(world: World, family: int, server: Nameserver, *, mark: int = 0, port: int = 0, connected: bool = True) -> int:
    """One query to FAR, which `server` answers. The port it was asked from."""
    with closing(world.pod.datagram(family)) as client:
        if mark:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.bind((POD[family], port))
        if connected:
            client.connect((FAR[family], 53))
            client.send(b"who?")
        else:
            client.sendto(b"who?", (FAR[family], 53))
        query, asker = server.answer()
        assert (query, asker) == (b"who?", client.getsockname()[:2])
        answer, source = client.recvfrom(512)
        assert (answer, source[:2]) == (b"who?" + server.name, (FAR[family], 53))
        return int(client.getsockname()[1])


@by_policy
def test_queries_reach_the_resolver_and_answers_come_from_whom_was_asked(world: World, policy: FailurePolicy) -> None:
    world.steer(world.steering(policy, ports=NAMES))
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        ask(world, family, proxy)
        ask(world, family, proxy, connected=False)
        outbound = world.outbound(family)
        client = world.connect(world.pod, family, FAR[family], 53)
        server = world.accept(proxy.tcp)
        assert original_dst(server, family) == (FAR[family], 53)
        exchange(client, server)
        assert not pending(outbound)
        assert not far.asked()
        # What goes to other ports is not ours over UDP, and the proxy's as ever over TCP.
        elsewhere = world.keep(world.peer.datagram(family))
        elsewhere.bind((FAR[family], 5353))
        with closing(world.pod.datagram(family)) as sock:
            sock.sendto(b"x", (FAR[family], 5353))
            assert elsewhere.recv(10) == b"x"
        world.connect(world.pod, family, FAR[family], 5353)
        world.accept(outbound)


def test_a_resolver_of_the_pod_itself_is_left_alone(world: World) -> None:
    world.steer(world.steering(ports=NAMES))
    for family in sorted(world.families):
        proxy, _ = nameservers(world, family)
        for address in (LOOPBACK[family], POD[family]):
            own = Nameserver(world, world.pod, family, address, 53, b" at home")
            with closing(world.pod.datagram(family)) as sock:
                sock.sendto(b"who?", (address, 53))
                own.answer()
                assert sock.recv(100) == b"who? at home"
        assert not proxy.asked()


def test_the_proxys_queries_and_the_apps_do_not_meet(world: World) -> None:
    """From the same port to the same nameserver, one after the other: conntrack remembers each for 30 s."""
    world.steer(world.steering(ports=NAMES))
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        port = ask(world, family, far, mark=0x539)
        ask(world, family, proxy, port=port)
        ask(world, family, far, mark=0x539, port=port)
        port = ask(world, family, proxy)
        ask(world, family, far, mark=0x539, port=port)
        ask(world, family, proxy, port=port, connected=False)
        assert not proxy.asked()
        assert not far.asked()


def test_connections_to_nameservers_do_not_meet_either(world: World) -> None:
    world.steer(world.steering(ports=NAMES))
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)

        def dial(listener: socket.socket, mark: int, port: int, family: int = family) -> int:
            client = world.keep(world.pod.socket(family))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if mark:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            client.bind((POD[family], port))
            client.connect((FAR[family], 53))
            server = world.accept(listener)
            exchange(client, server)
            own = int(client.getsockname()[1])
            for sock in (client, server):  # no TIME_WAIT: the port shall be free at once
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            return own

        port = dial(far.tcp, 0x539, 0)
        dial(proxy.tcp, 0, port)
        dial(far.tcp, 0x539, port)


def test_answers_to_the_proxy_are_established_for_rules_of_others(world: World) -> None:
    world.steer(world.steering(ports=NAMES))
    world.pod.run(
        "nft",
        "add table inet strict; add chain inet strict input { type filter hook input priority 0; policy drop; };"
        "add rule inet strict input ct state established,related accept; add rule inet strict input iifname lo accept;"
        "add rule inet strict input meta l4proto ipv6-icmp accept",
    )
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        ask(world, family, far, mark=0x539)
        ask(world, family, proxy)


def test_queries_under_way_end_well_when_the_rules_are_disabled(world: World) -> None:
    world.steer(world.steering(ports=NAMES))
    for family in sorted(world.families):
        proxy, far = nameservers(world, family)
        port = ask(world, family, far, mark=0x539)
        world.steer(world.steering(ports=NAMES, enabled=False))
        world.close_owners(but_newest=True)
        ask(world, family, far, mark=0x539, port=port)
        ask(world, family, far)
        assert not proxy.asked()
        world.steer(world.steering(ports=NAMES))
        world.close_owners(but_newest=True)


def test_closed_refuses_queries_when_nobody_listens(world: World) -> None:
    world.steer(world.steering("closed", ports=NAMES))
    for family in sorted(world.families):
        far = Nameserver(world, world.peer, family, FAR[family], 53, b"")
        with closing(world.pod.datagram(family)) as sock, pytest.raises(ConnectionRefusedError):
            sock.connect((FAR[family], 53))  # where eBPF refuses
            sock.send(b"who?")
            sock.recv(512)
        with pytest.raises(ConnectionRefusedError):
            world.connect(world.pod, family, FAR[family], 53)
        assert not far.asked()


# --- inbound


@by_policy
def test_inbound_connects_reach_the_transparent_listener(world: World, policy: FailurePolicy) -> None:
    first = world.steer(world.steering(policy))
    for family in sorted(world.families):
        app, listener = world.app(family), world.inbound(family)
        client = world.connect(world.peer, family, POD[family])
        server = world.accept(listener)
        assert server.getsockname()[:2] == (POD[family], 8080)
        assert server.getpeername()[:2] == client.getsockname()[:2]
        exchange(client, server)
        assert not pending(app)
        shown = world.pod.run("ss", "-Htn", "state", "established", "dport", "=", f":{client.getsockname()[1]}")
        assert POD[family] in shown and ":8080" in shown

        # The proxy reaches the app at its real address, by its mark and without.
        exchange(world.connect(world.pod, family, POD[family], mark=0x539), world.accept(app))

        # The connection goes on when the rules are replaced, and when they are gone.
        assert (
            world.steer(world.steering(policy, scope=Scope(in_exclude_ports=(family,)))).generation > first.generation
        )
        world.close_owners(but_newest=True)
        exchange(client, server)
        world.steer(world.steering(policy, enabled=False))
        world.close_owners(but_newest=True)
        exchange(server, client)
        world.steer(world.steering(policy))
        world.close_owners(but_newest=True)
        exchange(client, server)
        listener.close()
        exchange(client, server)


@pytest.fixture
def link_local(mechanism: Mechanism) -> Iterator[World]:
    """IPv4 only, as it is configured; IPv6 has link-local addresses, which came by themselves."""
    with ExitStack() as stack:
        world = make_world(stack, frozenset({4}), mechanism)
        for namespace in (world.pod, world.peer):
            namespace.run("ip", "addr", "add", "fe80::7/64" if namespace is world.pod else "fe80::1/64",
                          "dev", "eth0", "nodad")  # fmt: skip
        yield world


def dial_link_local(world: World, where: Namespace, address: str, *, patience_s: float = PATIENCE_S) -> socket.socket:
    sock = world.keep(where.socket(6))
    sock.settimeout(patience_s)
    with inside(where.fd):
        scope = socket.if_nametoindex("eth0")
    sock.connect((address, 8080, 0, scope))
    return sock


@by_policy
def test_link_local_does_not_lead_past_the_listener(link_local: World, policy: FailurePolicy) -> None:
    world = link_local
    assert dialable(world.pod.fd) == {4}
    assert reachable(world.pod.fd) == {4, 6}
    app, listener = world.keep(world.pod.listener(6, "::", 8080)), world.inbound(6)
    world.steer(replace(world.steering(policy), families=reachable(world.pod.fd)))
    client = dial_link_local(world, world.peer, "fe80::7")
    server = world.accept(listener)
    assert server.getsockname()[:2] == ("fe80::7", 8080)
    exchange(client, server)
    assert not pending(app)
    # What the pod itself dials is left alone: its interface would be lost.
    far = world.keep(world.peer.listener(6, "::", 8080))
    exchange(dial_link_local(world, world.pod, "fe80::1"), world.accept(far))


def test_closed_refuses_link_local_when_nobody_listens(link_local: World) -> None:
    world = link_local
    app = world.keep(world.pod.listener(6, "::", 8080))
    world.steer(replace(world.steering("closed"), families=reachable(world.pod.fd)))
    with pytest.raises(TimeoutError if world.iptables else ConnectionRefusedError):
        dial_link_local(world, world.peer, "fe80::7", patience_s=0.2 if world.iptables else PATIENCE_S)
    assert not pending(app)


def test_without_ipv6_only_ipv4_can_arrive(link_local: World) -> None:
    pod = link_local.pod
    pod.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    assert reachable(pod.fd) == {4}
    pod.run("sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0")
    assert reachable(pod.fd) == {4, 6}


def test_excluded_inbound_ports_reach_the_app(world: World) -> None:
    for excluded in ((9000,), (9000, 9001)):
        world.steer(world.steering("closed", scope=Scope(in_exclude_ports=excluded)))
        for family in sorted(world.families):
            with closing(world.pod.listener(family, POD[family], 9000)) as app:
                exchange(world.connect(world.peer, family, POD[family], 9000), world.accept(app))


# --- what of it is steered

EVERY = ("0.0.0.0/0", "::/0")
FARAWAY = tuple(f"{FAR[family]}/{length}" for family, length in ((4, 32), (6, 128)))
ELSEWHERE = ("192.0.2.0/24", "2001:db8:9::/48")
VIPS = ("240.240.0.0/16", "fd00:240::/32")
MANY = tuple(range(9000, 9040))
"""More ports than one rule of iptables can have."""
SCOPES: dict[str, tuple[Scope, bool, bool, bool]] = {
    "all excluded": (Scope(out_exclude_cidrs=EVERY), False, False, True),
    "network excluded": (Scope(out_exclude_cidrs=FARAWAY), False, False, True),
    "overlapping networks excluded": (Scope(out_exclude_cidrs=(*FARAWAY, *EVERY, *ELSEWHERE)), False, False, True),
    "other network excluded": (Scope(out_exclude_cidrs=ELSEWHERE), True, True, True),
    "VIPs excluded": (Scope(out_exclude_cidrs=VIPS), True, True, True),
    "network included": (Scope(out_include_cidrs=FARAWAY), True, True, True),
    "other network included": (Scope(out_include_cidrs=ELSEWHERE), False, True, True),
    "VIPs included": (Scope(out_include_cidrs=VIPS), False, True, True),
    "included, but excluded": (Scope(out_include_cidrs=EVERY, out_exclude_cidrs=FARAWAY), False, False, True),
    "port included": (Scope(out_include_ports=(8080, *MANY), out_include_cidrs=EVERY), True, True, True),
    "other port included": (Scope(out_include_ports=(*MANY, 18080)), False, True, True),
    "port excluded": (Scope(out_include_ports=(8080,), out_exclude_ports=(8080, *MANY)), False, True, True),
    "port of names excluded": (Scope(out_exclude_ports=(53,)), True, False, True),
    "user excluded": (Scope(out_exclude_uids=(0, 1)), False, False, True),
    "other user excluded": (Scope(out_exclude_uids=(1, 4294967294)), True, True, True),
    "client excluded": (Scope(in_exclude_cidrs=("10.99.1.0/24", "fd99:1::/64")), True, True, False),
    "all clients excluded": (Scope(in_exclude_cidrs=EVERY), True, True, False),
    "other client excluded": (Scope(in_exclude_cidrs=ELSEWHERE), True, True, True),
    "own port included": (Scope(in_include_ports=(8080, *MANY)), True, True, True),
    "other own port included": (Scope(in_include_ports=MANY), True, True, False),
    "own port included, but excluded": (Scope(in_include_ports=(8080,), in_exclude_ports=(8080,)), True, True, False),
}
"""And who takes them: connections to FAR, queries to FAR, connections from PEER. VIPs are taken always."""


def test_what_is_in_scope_is_steered_and_nothing_else(dual: World) -> None:
    takers = {}
    for family in (4, 6):
        proxy, nameserver = nameservers(dual, family)
        outbound, far, inbound, app = dual.outbound(family), dual.far(family), dual.inbound(family), dual.app(family)
        takers[family] = (far, outbound), (app, inbound), (nameserver, proxy)
    for name, (scope, out_taken, names_taken, in_taken) in SCOPES.items():
        print(name)
        desired = dual.steering("closed", scope=scope, ports=NAMES)
        assert dual.steer(desired).changed
        assert not dual.steer(desired).changed
        for family, (outward, inward, names) in takers.items():
            for where, address, listener in (
                (dual.pod, FAR[family], outward[out_taken]),
                (dual.pod, VIP[family], outward[True]),
                (dual.peer, POD[family], inward[in_taken]),
            ):
                with closing(where.connect(family, address, 8080)) as client, closing(listener.accept()[0]) as server:
                    assert server.getpeername()[:2] == client.getsockname()[:2]
            ask(dual, family, names[names_taken])


def test_forwarded_connections_are_left_alone(dual: World) -> None:
    behind = make_namespace(dual.stack, "behind")
    sh(
        "ip",
        "link",
        "add",
        "eth1",
        "netns",
        dual.pod.name,
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        behind.name,
    )
    address = {4: ("10.99.2.1", "10.99.2.2", "24"), 6: ("fd99:2::1", "fd99:2::2", "64")}
    for namespace, device, position in ((dual.pod, "eth1", 0), (behind, "eth0", 1)):
        namespace.run("ip", "link", "set", device, "addrgenmode", "none")
        # A router asks for its neighbours from a link-local address.
        namespace.run("ip", "addr", "add", f"fe80::{position + 1}/64", "dev", device, "nodad")
        for family, (*own, length) in address.items():
            extra = [] if family == 4 else ["nodad"]
            namespace.run("ip", "addr", "add", f"{own[position]}/{length}", "dev", device, *extra)
    for namespace, device in ((dual.pod, "eth1"), (behind, "eth0")):
        namespace.run("ip", "link", "set", device, "up")
    for family, (gateway, target, _) in address.items():
        behind.run("ip", f"-{family}", "route", "add", "default", "via", gateway)
        dual.peer.run("ip", f"-{family}", "route", "add", target, "via", POD[family])
    dual.pod.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    wait_for(lambda: "LOWER_UP" in behind.run("ip", "link", "show", "eth0"), "carrier")
    dual.steer(dual.steering("closed"))
    for family, (_, target, _) in address.items():
        server = dual.keep(behind.listener(family, target, 8080))
        exchange(dual.connect(dual.peer, family, target), dual.accept(server))


# --- what was there before, and what comes after


@by_policy
@pytest.mark.parametrize("pod_speaks_first", [True, False])
def test_established_connections_survive_steering(world: World, policy: FailurePolicy, pod_speaks_first: bool) -> None:
    pairs = []
    listeners = []
    for family in sorted(world.families):
        far, app = world.far(family), world.app(family)
        out = world.connect(world.pod, family, FAR[family])
        pairs.append((out, world.accept(far)))
        client = world.connect(world.peer, family, POD[family])
        pairs.append((world.accept(app), client))
        listeners += [world.outbound(family), world.inbound(family)]
    exchange(*pairs[0])
    world.steer(world.steering(policy))
    for in_pod, outside in pairs:
        exchange(*((in_pod, outside) if pod_speaks_first else (outside, in_pod)))
    assert not any(pending(listener) for listener in listeners)
    world.close_owners()
    remove(world.pod.fd, NODE)
    for in_pod, outside in pairs:
        exchange(in_pod, outside)


@by_policy
def test_disabled_keeps_redirected_connections_and_lets_new_ones_go_direct(world: World, policy: FailurePolicy) -> None:
    world.steer(world.steering(policy))
    old = []
    for family in sorted(world.families):
        listener = world.outbound(family)
        for destination in (FAR[family], VIP[family]):
            client = world.connect(world.pod, family, destination)
            old.append((client, world.accept(listener)))
        listener.close()
    assert world.steer(world.steering(policy, enabled=False)).changed
    world.close_owners(but_newest=True)
    assert "redirect" not in world.pod.rules().lower()
    for client, server in old:
        exchange(client, server)
        exchange(server, client)
    for family in sorted(world.families):
        far, app = world.far(family), world.app(family)
        exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
        exchange(world.connect(world.peer, family, POD[family]), world.accept(app))


def test_open_rules_go_with_their_owner(world: World) -> None:
    """Those of iptables have none, and so are closed."""
    before = world.pod.nft()
    applied = world.steer(world.steering())
    with pytest.raises(ConnectionRefusedError):
        world.connect(world.pod, min(world.families), FAR[min(world.families)])
    if world.iptables:
        assert applied.owner_fd is None
        assert world.steering().policy_in_force == "closed"
        assert [table.owner for table in observe(world.pod.fd, NODE).tables] == [None]
        assert remove(world.pod.fd, NODE).left == ()
    elif world.ebpf:
        # The kernel asks for the listener with each connection: nothing has to go.
        assert applied.owner_fd is None
        assert world.steering().policy_in_force == "open"
        assert [table.owner for table in observe(world.pod.fd, NODE).tables] == [None]
    else:
        assert applied.owner_fd is not None
        assert "flags owner" in world.pod.nft()
        spare = os.dup(applied.owner_fd)
        world.close_owners()
        assert "flags owner" in world.pod.nft()
        os.close(spare)
        assert world.pod.nft() == before
    for family in sorted(world.families):
        far, app = world.far(family), world.app(family)
        exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
        exchange(world.connect(world.peer, family, POD[family]), world.accept(app))


def test_open_rules_go_when_the_holder_is_killed(world: World) -> None:
    """Those of eBPF stay, and let pass what nobody takes."""
    program = (
        "import sys\nfrom redirect import Steering, steer\nfrom redirect.netns import open_netns\n"
        "fd = open_netns(sys.argv[1])\n"
        "kept = steer(fd, Steering('killed', frozenset(map(int, sys.argv[3:])), mechanism=sys.argv[2]))\n"
        "print(kept.generation, flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, f"/run/netns/{world.pod.name}", world.mechanism]
    command += map(str, world.families)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"1\n"
            assert world.has(1, "killed")
            if world.mechanism == "nftables":
                assert remove(world.pod.fd, "killed").left == ("netproxy-killed-g1",)
        finally:
            holder.send_signal(signal.SIGKILL)
    if world.ebpf:
        for family in sorted(world.families):
            far, app = world.far(family), world.app(family)
            exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
            exchange(world.connect(world.peer, family, POD[family]), world.accept(app))
    if world.mechanism != "nftables":  # they stay until somebody cleans up
        assert world.has(1, "killed")
        assert remove(world.pod.fd, "killed").left == ()
    wait_for(lambda: not world.has(1, "killed"), "the table to go")


def test_open_inbound_reaches_the_app_when_nobody_listens(world: World) -> None:
    world.steer(world.steering())
    for family in sorted(world.families):
        app = world.app(family)
        if world.iptables:
            world.refuses(world.peer, family, POD[family])
            assert not pending(app)
        else:
            exchange(world.connect(world.peer, family, POD[family]), world.accept(app))


def test_closed_rules_stay_and_refuse(world: World) -> None:
    assert world.steer(world.steering("closed")).owner_fd is None
    assert world.has(1)
    for family in sorted(world.families):
        far, app = world.far(family), world.app(family)
        for destination in (FAR[family], VIP[family]):
            with pytest.raises(ConnectionRefusedError):
                world.connect(world.pod, family, destination)
        world.refuses(world.peer, family, POD[family])
        assert not pending(far)
        assert not pending(app)


# --- replacing


@contextmanager
def connecting(world: World) -> Iterator[Callable[[], None]]:
    """Connections in both directions all the time, none of which may fail or pass by the proxy. Yields what waits for
    some of them."""
    stop = threading.Event()
    made = {"outbound": 0, "inbound": 0}
    failures: list[str] = []
    listeners = {family: (world.outbound(family), world.inbound(family)) for family in world.families}
    direct = [sock for family in world.families for sock in (world.far(family), world.app(family))]

    def connect_all_the_time() -> None:
        while not stop.is_set():
            for family, (outbound, inbound) in listeners.items():
                for name, where, address, listener in (
                    ("outbound", world.pod, FAR[family], outbound),
                    ("inbound", world.peer, POD[family], inbound),
                ):
                    try:
                        where.connect(family, address, 8080).close()
                        listener.accept()[0].close()
                    except OSError as exc:
                        failures.append(f"{name} IPv{family}: {exc!r}")
                        return
                    made[name] += 1

    def wait_for_some() -> None:
        target = made["inbound"] + 2
        wait_for(lambda: bool(failures) or made["inbound"] >= target, "connections")

    client = threading.Thread(target=connect_all_the_time)
    client.start()
    try:
        yield wait_for_some
        wait_for_some()
    finally:
        stop.set()
        client.join()
    assert failures == []
    assert not any(pending(listener) for listener in direct)


@pytest.mark.parametrize(
    ("mechanism", "changes"),
    [
        *((found, changes) for found in ("nftables", "ebpf") for changes in (["open"], ["open", "closed"])),
        *((found, ["closed"]) for found in TRIED),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
    indirect=["mechanism"],
)
def test_replacing_leaves_no_gap(world: World, changes: list[FailurePolicy]) -> None:
    world.steer(world.steering(changes[0]))
    with connecting(world) as wait_for_some:
        for turn in range(1, 9):
            wait_for_some()
            scope = Scope(in_exclude_ports=(turn,))
            applied = world.steer(world.steering(changes[turn % len(changes)], scope=scope))
            assert applied.generation == turn + 1
            world.close_owners(but_newest=applied.owner_fd is not None)
    assert [table.generation for table in observe(world.pod.fd, NODE).tables] == [9]


@pytest.mark.parametrize("policy", POLICIES)
def test_changing_the_mechanism_leaves_no_gap(policy: FailurePolicy) -> None:
    with ExitStack() as stack:
        world = make_world(stack, frozenset({4, 6}))
        world.steer(world.steering(policy))
        with connecting(world) as wait_for_some:
            for mechanism in [*TRIED[1:], *TRIED]:
                wait_for_some()
                applied = world.steer(world.steering(policy, mechanism=mechanism))
                world.close_owners(but_newest=applied.owner_fd is not None)
                *kept, table = observe(world.pod.fd, NODE).tables
                assert (table.mechanism, table.generation) == (mechanism, applied.generation)
                assert bool(kept) is bool(applied.undropped)
                assert mechanism == "ebpf" or not kept


@by_policy
def test_steering_twice_changes_nothing(world: World, policy: FailurePolicy) -> None:
    first = world.steer(world.steering(policy))
    assert first.changed
    before = world.state()
    again = world.steer(world.steering(policy))
    assert again == Applied(owner_fd=None, generation=first.generation, changed=False)
    assert world.state() == before


def test_older_owned_tables_are_named_until_they_go(owning: World) -> None:
    owning.steer(owning.steering())
    changed = owning.steer(owning.steering(enabled=False))
    assert changed.lingering == (f"netproxy-{NODE}-g1",)
    owning.close_owners(but_newest=True)
    assert owning.steer(owning.steering(enabled=False)).lingering == ()


# --- failing


BAD_SCOPE = Scope()
object.__setattr__(BAD_SCOPE, "in_exclude_ports", (1 << 17,))
"""What is outbound can be loaded; what is inbound can't, since no port has that many bits."""
TOO_MANY_WORKERS = 1000
"""For eBPF, which has room for any number in a list."""


@pytest.mark.parametrize(
    ("mechanism", "policy", "running"),
    [
        *(("nftables", policy, running) for policy in POLICIES for running in (None, *POLICIES)),
        *(("ebpf", policy, running) for policy in POLICIES for running in (None, *POLICIES)),
        *(
            (found, "closed", running)
            for found in ("iptables-nft", "iptables-legacy")
            for running in (None, "closed")
            if found in TRIED
        ),
    ],
    indirect=["mechanism"],
)
def test_a_failure_midway_leaves_the_kernel_as_it_was(
    dual: World, policy: FailurePolicy, running: FailurePolicy | None
) -> None:
    dual.steer(dual.steering("closed", vip_cidrs=()))  # what built-in tables leave
    remove(dual.pod.fd, NODE)
    if running:
        dual.steer(dual.steering(running, vip_cidrs=()))
    before, files = dual.state(), os.listdir("/proc/self/fd")
    good = CreateTable(dual.name(9), dual.steering(policy).wanted(), dual.mechanism)
    bad = replace(good, wanted=replace(good.wanted, scope=BAD_SCOPE, workers=TOO_MANY_WORKERS))
    routes = (AddRoute("240.240.0.0/16"), AddRoute("fd00:240::/32"))
    cases = {
        "create table": Plan((*routes, bad), (), 9, ()),
        "drop": Plan((*routes, good), (Dropped("nftables", "no such name"),), 9, ()),
        "add route": Plan((good, routes[0], routes[0]), (), 9, ()),
    }
    for step, wanted in cases.items():
        with pytest.raises(RedirectError) as caught:
            execute(dual.pod.fd, NODE, wanted)
        assert caught.value.step.startswith(step)
        assert str(identity(dual.pod.fd)) in str(caught.value)
        assert "not undone" not in str(caught.value)
        assert dual.state() == before
        assert os.listdir("/proc/self/fd") == files


@by_rules
def test_a_table_of_that_name_is_never_written_into(dual: World) -> None:
    if dual.iptables:
        for command in ("iptables", "ip6tables"):
            variant = dual.mechanism.partition("-")[2]
            dual.pod.run(f"{command}-{variant}", "-w", "-t", "nat", "-N", f"{dual.name(1)}o")
    else:
        dual.pod.run("nft", "add", "table", "inet", dual.name(1))
    before = dual.pod.state()
    for policy in POLICIES:
        step = CreateTable(dual.name(1), dual.steering(policy).wanted(), dual.mechanism)
        with pytest.raises(RedirectError, match=r"exist|supported|Invalid"):
            execute(dual.pod.fd, NODE, Plan((step,), (), 1, ()))
        assert dual.pod.state() == before


# --- removing, neighbours, drift


@by_policy
def test_remove_leaves_nothing(world: World, policy: FailurePolicy) -> None:
    """Of ours. Built-in chains of iptables come with the first rule and stay, empty."""
    world.pod.run("nft", "add table inet others; add chain inet others c")
    world.pod.run("ip", "route", "add", "240.241.0.0/16", "dev", "lo", "proto", "78")
    if world.iptables:
        world.steer(world.steering(policy))
        remove(world.pod.fd, NODE)
        assert "-A" not in world.pod.rules() and "np-" not in world.pod.rules()
    before = world.state()
    world.steer(world.steering(policy))
    assert world.state() != before
    assert world.has(1)
    world.close_owners()
    assert remove(world.pod.fd, NODE).left == ()
    assert world.state() == before
    assert not world.has(1)
    assert remove(world.pod.fd, NODE).left == ()


def test_remove_reports_what_only_the_owner_can_remove(owning: World) -> None:
    owning.steer(owning.steering())
    assert remove(owning.pod.fd, NODE).left == (f"netproxy-{NODE}-g1",)
    owning.close_owners()
    assert remove(owning.pod.fd, NODE).left == ()


@by_policy
def test_two_nodes_do_not_disturb_each_other(world: World, policy: FailurePolicy) -> None:
    other = world.steering(policy, node=f"{NODE}-1o", ports=Ports(outbound=25001, inbound=25006), mark=0x53A)
    world.steer(world.steering("closed"))
    remove(world.pod.fd, NODE)
    before = world.pod.state()
    world.steer(world.steering("closed"))
    assert remove(world.pod.fd, other.node).left == ()
    world.steer(other)
    alone = observe(world.pod.fd, other.node)
    assert [table.name for table in alone.tables] == [world.name(1, other.node)]
    assert not world.steer(world.steering("closed")).changed
    assert not world.steer(other).changed
    remove(world.pod.fd, NODE)
    assert observe(world.pod.fd, other.node) == alone
    assert observe(world.pod.fd, NODE).tables == ()
    for family in sorted(world.families):
        listener = world.keep(world.pod.listener(family, LOOPBACK[family], 25001))
        world.connect(world.pod, family, VIP[family])
        assert original_dst(world.accept(listener), family) == (VIP[family], 8080)
    world.close_owners()
    remove(world.pod.fd, other.node)
    assert world.pod.state() == before


def test_a_node_with_a_long_name(dual: World) -> None:
    """Longer than a chain's name can be, and like another one up to there."""
    one, other = (dual.steering("closed", node="node-with-a-very-long-name-of-its-own-" + end) for end in "ab")
    dual.steer(one)
    dual.steer(other)
    assert not dual.steer(one).changed
    remove(dual.pod.fd, one.node)
    assert len(observe(dual.pod.fd, other.node).tables) == 1
    remove(dual.pod.fd, other.node)


def _rule_handle(world: World, chain: str) -> str:
    table = f"netproxy-{NODE}-g1"
    entries = json.loads(world.pod.run("nft", "-j", "list", "chain", "inet", table, chain))["nftables"]
    return str(next(entry["rule"]["handle"] for entry in entries if "rule" in entry))


def _iptables(world: World, *arguments: str) -> str:
    """Of the first family that is steered."""
    command = "iptables" if 4 in world.families else "ip6tables"
    return world.pod.run(f"{command}-{world.mechanism.partition('-')[2]}", "-w", *arguments)


TABLE = f"inet netproxy-{NODE}-g1"
CHAIN = f"np-{NODE}-1"
MEDDLING: dict[str, tuple[Callable[[World], str] | None, Callable[[World], str]]] = {
    "a rule deleted": (
        lambda w: w.pod.run("nft", f"delete rule {TABLE} output handle {_rule_handle(w, 'output')}"),
        lambda w: _iptables(w, "-t", "nat", "-D", f"{CHAIN}o", "2"),
    ),
    "a rule added": (
        lambda w: w.pod.run("nft", f"add rule {TABLE} output accept"),
        lambda w: _iptables(w, "-t", "nat", "-A", f"{CHAIN}o", "-j", "ACCEPT"),
    ),
    "a rule inserted": (
        lambda w: w.pod.run("nft", f"insert rule {TABLE} prerouting tcp dport 80 return"),
        lambda w: _iptables(w, "-t", "mangle", "-I", f"{CHAIN}p", "-p", "tcp", "--dport", "80", "-j", "RETURN"),
    ),
    "a chain flushed": (
        lambda w: w.pod.run("nft", f"flush chain {TABLE} prerouting"),
        lambda w: _iptables(w, "-t", "mangle", "-F", f"{CHAIN}p"),
    ),
    "a chain added": (
        lambda w: w.pod.run("nft", f"add chain {TABLE} more"),
        lambda w: _iptables(w, "-t", "nat", "-N", f"{CHAIN}x"),
    ),
    "a set added": (lambda w: w.pod.run("nft", f"add set {TABLE} s {{ type ipv4_addr; }}"), None),
    "the policy changed": (lambda w: w.pod.run("nft", f"chain {TABLE} output {{ policy drop; }}"), None),
    "the jump deleted": (None, lambda w: _iptables(w, "-t", "nat", "-D", "OUTPUT", "-j", f"{CHAIN}o")),
    "the jump doubled": (None, lambda w: _iptables(w, "-t", "nat", "-A", "OUTPUT", "-j", f"{CHAIN}o")),
    "a rule before the jump": (
        None,
        lambda w: _iptables(w, "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "--dport", "80", "-j", "ACCEPT"),
    ),
    "the table deleted": (
        lambda w: w.pod.run("nft", f"delete table {TABLE}"),
        lambda w: _iptables(w, "-t", "nat", "-F") + _iptables(w, "-t", "nat", "-X"),
    ),
    "all flushed": (
        lambda w: w.pod.run("nft", "flush", "ruleset"),
        lambda w: (
            _iptables(w, "-t", "mangle", "-F")
            if w.mechanism == "iptables-legacy"
            else w.pod.run("nft", "flush", "ruleset")
        ),
    ),
    "the VIP route deleted": (lambda w: w.pod.run("ip", f"-{min(w.families)}", "route", "flush", "proto", "78"),) * 2,
    "lo set down": (lambda w: w.pod.run("ip", "link", "set", "lo", "down"),) * 2,
}


def _hook(name: str) -> Path:
    return place_of(NODE, BPFFS) / name


def _entry(world: World) -> list[str]:
    """Its key, as bpftool wants it."""
    octets = netns_cookie(world.pod.fd).to_bytes(8, sys.byteorder)
    return ["pinned", str(_hook("map_pods")), "key", "hex", *(f"{octet:02x}" for octet in octets)]


MEDDLING_WITH_HOOKS: dict[str, Callable[[World], object]] = {
    "the entry deleted": lambda w: sh("bpftool", "map", "delete", *_entry(w)),
    "a hook removed": lambda w: _hook("link_connect4").unlink(),
    "a hook detached": lambda w: sh("bpftool", "link", "detach", "pinned", str(_hook("link_sock_ops"))),
    "the inbound hook removed": lambda w: _hook(f"inbound_{netns_cookie(w.pod.fd)}").unlink(),
    "a map removed": lambda w: _hook("map_networks").unlink(),
    "all removed": lambda w: clean(NODE),
    **{what: how for what in ("the VIP route deleted", "lo set down") if (how := MEDDLING[what][0]) is not None},
}


@pytest.mark.parametrize("world", [{6}, {4, 6}], ids=["v6", "dual"], indirect=True)
@pytest.mark.parametrize(
    ("mechanism", "meddling"),
    [
        *(
            (found, what)
            for found in TRIED
            if found != "ebpf"
            for what, how in MEDDLING.items()
            if how[found != "nftables"] is not None
        ),
        *(("ebpf", what) for what in MEDDLING_WITH_HOOKS),
    ],
    indirect=["mechanism"],
)
def test_drift_is_seen_and_repaired(world: World, meddling: str) -> None:
    """Of iptables, rules of the first family that there is."""
    meddle = MEDDLING_WITH_HOOKS[meddling] if world.ebpf else MEDDLING[meddling][world.iptables]
    assert meddle is not None  # the other kind of mechanism may have no such thing
    desired = world.steering("closed")
    world.steer(desired)
    good = observe(world.pod.fd, NODE)
    assert plan(desired, good).empty
    meddle(world)
    found = observe(world.pod.fd, NODE)
    assert not plan(desired, found).empty
    assert steer(world.pod.fd, desired, found).changed
    repaired = observe(world.pod.fd, NODE)
    assert plan(desired, repaired).empty
    assert [table.listing for table in repaired.tables] == [good.tables[0].listing]
    for family in sorted(world.families):
        listener = world.outbound(family)
        world.connect(world.pod, family, VIP[family])
        world.accept(listener)


ODD = "caf\udce9"
"""Not UTF-8: what is put into a rule as a comment is any octets."""


@by_rules
def test_comments_of_others_are_any_octets(dual: World) -> None:
    desired = dual.steering("closed")
    for variant in ("nft", "legacy"):
        for command in ("iptables", "ip6tables"):
            rule = ("-A", "OUTPUT", "-p", "tcp", "--dport", "7", "-m", "comment", "--comment", ODD, "-j", "ACCEPT")
            dual.pod.run(f"{command}-{variant}", "-w", *rule)
    assert dual.steer(desired).changed
    assert not dual.steer(desired).changed
    meddled = f"{dual.name(1)}o"
    if dual.iptables:
        _iptables(dual, "-t", "nat", "-A", meddled, "-m", "comment", "--comment", ODD, "-j", "ACCEPT")
        _iptables(dual, "-t", "nat", "-A", "OUTPUT", "-m", "comment", "--comment", ODD, "-j", meddled)
    else:
        dual.pod.run("nft", f'add rule {TABLE} output accept comment "{ODD}"')
    assert dual.steer(desired).changed
    assert not dual.steer(desired).changed
    assert [table.generation for table in observe(dual.pod.fd, NODE).tables] == [2]
    assert remove(dual.pod.fd, NODE).left == ()


@pytest.mark.parametrize("policy", POLICIES)
def test_older_rules_that_somebody_flushes_meanwhile_are_no_failure(owning: World, policy: FailurePolicy) -> None:
    """Seen before the change, gone when they are to be dropped: the new ones stay."""
    owning.steer(owning.steering("closed"))
    seen = observe(owning.pod.fd, NODE)
    owning.pod.run("nft", "flush", "ruleset")
    desired = owning.steering(policy, ports=NAMES)
    owner = steer(owning.pod.fd, desired, seen).owner_fd
    if owner is not None:
        owning.held.append(owner)
    assert [table.name for table in observe(owning.pod.fd, NODE).tables] == [owning.name(2)]
    assert not owning.steer(desired).changed


def test_older_rules_that_cannot_be_removed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of iptables, whose chains go one family after the other: what is new stays in force."""
    with ExitStack() as stack:
        world = make_world(stack, frozenset({4, 6}), "iptables-nft")
        world.steer(world.steering("closed"))
        with monkeypatch.context() as patch:

            def refuse(names: tuple[str, ...]) -> None:
                raise RedirectError(f"{names[0]} is held")

            patch.setattr(BACKENDS["iptables-nft"], "delete", refuse)
            applied = world.steer(world.steering("closed", mechanism="nftables"))
            assert applied.changed
            assert "np-node-a-1 is held" in applied.undropped
            assert len(observe(world.pod.fd, NODE).tables) == 2
            assert not world.steer(world.steering("closed", mechanism="nftables")).changed
        again = world.steer(world.steering("closed", mechanism="nftables"))
        assert (again.changed, again.undropped) == (True, "")
        assert [table.mechanism for table in observe(world.pod.fd, NODE).tables] == ["nftables"]


class Broken:
    """As where the kernel has no such tables, or the commands are of another one."""

    def tables(self, node: str) -> list[Table]:
        raise RedirectError(f"no rules of {node}: not supported")


def test_mechanisms_that_do_not_answer_are_in_nobodys_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [other for other in MECHANISMS if other != world.mechanism]
    for other in others:
        monkeypatch.setitem(BACKENDS, other, Broken())
    assert world.steer(world.steering("closed")).changed
    assert not world.steer(world.steering("closed")).changed
    assert remove(world.pod.fd, NODE).left == ()
    assert observe(world.pod.fd, NODE).tables == ()
    with pytest.raises(RedirectError, match="not supported"):
        world.steer(world.steering("closed", mechanism=others[0]))
    monkeypatch.setitem(BACKENDS, world.mechanism, Broken())
    with pytest.raises(RedirectError, match="not supported"):
        observe(world.pod.fd, NODE)
    assert observe(world.pod.fd, NODE, ()).lo_up


def test_nobody_else_can_change_an_owned_table(owning: World) -> None:
    owning.steer(owning.steering())
    before = owning.pod.nft()
    for command in (f"delete table {TABLE}", f"flush chain {TABLE} output", f"add rule {TABLE} output accept"):
        with pytest.raises(AssertionError, match="not permitted"):
            owning.pod.run("nft", command)
    owning.pod.run("nft", "flush ruleset")
    assert owning.pod.nft() == before


# --- the ground it stands on


def test_families_are_those_with_a_routable_address(world: World) -> None:
    assert dialable(world.pod.fd) == world.families


def test_an_empty_namespace_has_no_family_and_lo_is_brought_up(mechanism: Mechanism) -> None:
    with ExitStack() as stack:
        namespace = make_namespace(stack, "bare")
        assert dialable(namespace.fd) == frozenset()
        assert not observe(namespace.fd, NODE).lo_up
        assert steer(namespace.fd, Steering(NODE, frozenset({4}), "closed", mechanism=mechanism)).changed
        assert "LOOPBACK,UP" in namespace.run("ip", "link", "show", "lo")
        withdraw(namespace.fd)


def test_many_threads_steer_many_namespaces_at_once(mechanism: Mechanism) -> None:
    with ExitStack() as stack:
        namespaces = [make_namespace(stack, f"t{number}") for number in range(8)]
        home = identity(stack.enter_context(OwnNamespace()))

        def one(namespace: Namespace) -> int | None:
            applied = steer(namespace.fd, Steering(NODE, frozenset({4, 6}), mechanism=mechanism))
            with OwnNamespace() as here:
                assert identity(here) == home
            return applied.owner_fd

        with ThreadPoolExecutor(len(namespaces)) as pool:
            owners = list(pool.map(one, namespaces))
        for namespace, owner in zip(namespaces, owners, strict=True):
            if mechanism == "nftables":
                assert owner is not None
                assert "flags owner" in namespace.nft()
                os.close(owner)
                assert namespace.nft() == ""
            else:
                assert len(observe(namespace.fd, NODE).tables) == 1
            withdraw(namespace.fd)


class OwnNamespace:
    def __enter__(self) -> int:
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def test_inside_returns_home_after_an_error(dual: World) -> None:
    with OwnNamespace() as home:
        with pytest.raises(ZeroDivisionError), inside(dual.pod.fd):
            with OwnNamespace() as here:
                assert identity(here) == identity(dual.pod.fd)
            raise ZeroDivisionError
        with OwnNamespace() as here:
            assert identity(here) == identity(home)
        with pytest.raises(RedirectError, match="enter namespace"), inside(sys.stderr.fileno()):
            pass


def test_only_network_namespaces_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        (str(tmp_path / "file"), "not a namespace file"),
        (str(tmp_path / "fifo"), "not a namespace file"),
        ("/dev/null", "not a namespace file"),
        ("/proc/self/ns/uts", "not a network namespace"),
        (str(tmp_path / "none"), "No such file"),
    ):
        with pytest.raises(RedirectError, match=reason):
            open_netns(path)


def test_this_machine_can_steer() -> None:
    before = sh("nft", "list", "ruleset"), nodes(), sorted(cgroup_root().iterdir())
    for mechanism in ("nftables", "ebpf"):
        found = probe(mechanism)
        assert (found.families, found.reason, found.ok) == (frozenset({4, 6}), "", True)
    assert (sh("nft", "list", "ruleset"), nodes(), sorted(cgroup_root().iterdir())) == before


def test_where_bpf_is_refused_the_reason_is_told() -> None:
    program = "from redirect.probe import choose, probe\nprint(probe('ebpf'))\nprint(choose('auto').mechanism)"
    # In a user namespace root is nobody to bpf(2); rules of its own network namespace it may have.
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True).stdout
    told, chosen = said.splitlines()
    assert "families=frozenset()" in told and "not permitted" in told
    assert chosen == "nftables"
