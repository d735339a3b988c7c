"""eBPF steering on the real kernel, outbound: a listener in the pod stands for the proxy.

The hooks are attached at the root of all cgroups, as in use, and touch nothing but the namespaces that are enrolled.
They are pinned in a bpffs of the test's own.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from redirect import Ports, RedirectError, Scope
from redirect.bpf import Count, Hooks, Key, Proxy, Workload, clean
from redirect.bpf.bpffs import cgroup_root
from redirect.netns import inside
from tests.kernel.test_steering import (
    FAR,
    LOOPBACK,
    PEER,
    POD,
    VIP,
    World,
    exchange,
    make_world,
    original_dst,
    pending,
)

IPPROTO_MPTCP = 262
MARK, MASK = 0x539, 0xFFF
NODE = "bpf-a"
AF = {4: socket.AF_INET, 6: socket.AF_INET6}


@contextmanager
def mounted_bpffs(path: Path) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="module")
def bpffs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted_bpffs(tmp_path_factory.mktemp("bpf")) as path:
        yield path


@pytest.fixture(scope="module")
def loaded(bpffs: Path) -> Iterator[Path]:
    """So that the tests of a module compile once."""
    Hooks.open(NODE, mount=bpffs).close()
    try:
        yield bpffs
    finally:
        clean(NODE, mount=bpffs)


@pytest.fixture
def hooks(loaded: Path) -> Iterator[Hooks]:
    with Hooks.open(NODE, mount=loaded) as opened:
        opened.configure(Proxy(mark=MARK, mask=MASK))
        yield opened
    with Hooks.open(NODE, mount=loaded) as again:  # a test may have closed them
        for key in again.enrolled():
            again.withdraw(key)


@pytest.fixture(params=[{4}, {6}, {4, 6}], ids=["v4", "v6", "dual"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as stack:
        yield make_world(stack, frozenset(request.param))


@pytest.fixture
def dual() -> Iterator[World]:
    with ExitStack() as stack:
        yield make_world(stack, frozenset({4, 6}))


def workload(world: World, **more: object) -> Workload:
    own = tuple(POD[family] for family in sorted(world.families))
    return replace(Workload(frozenset(world.families), own_addresses=own), **more)  # type: ignore[arg-type]


def moved(hooks: Hooks, key: Key) -> dict[Count, int]:
    """Counters that are not zero."""
    return {what: number for what, number in hooks.counters(key).items() if number}


def stream(world: World, family: int, protocol: int = 0) -> socket.socket:
    with inside(world.pod.fd):
        sock = world.keep(socket.socket(AF[family], socket.SOCK_STREAM, protocol))
    sock.settimeout(10)
    return sock


def peer_of(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getpeername()[:2]
    return host, port


# --- who gets a connection


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_connects_reach_the_listener_with_their_destination(hooks: Hooks, world: World, policy: str) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy=policy))
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        for destination in (FAR[family], VIP[family], PEER[family]):
            client = world.connect(world.pod, family, destination)
            server = world.accept(listener)
            assert original_dst(server, family) == (destination, 8080)
            assert peer_of(client) == (destination, 8080)
            assert server.getpeername()[:2] == client.getsockname()[:2]
            exchange(client, server)
        assert not pending(far)
    assert moved(hooks, key) == {Count.STEERED: 3 * len(world.families)}


def test_who_is_not_enrolled_is_not_touched(hooks: Hooks, world: World) -> None:
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
        assert not pending(listener)
        plain = world.connect(world.pod, family, LOOPBACK[family], 15001)
        server = world.accept(listener)
        assert peer_of(plain) == (LOOPBACK[family], 15001)
        with pytest.raises(FileNotFoundError):
            original_dst(server, family)
    assert hooks.enrolled() == {}


def test_long_answers_of_getsockopt_stay_whole(hooks: Hooks) -> None:
    """More than a page, which is all that the hook sees: the groups of a peer, whom nobody steers."""
    code = (
        "import ctypes, os, socket\n"
        "os.setgroups(range(1, 2001))\n"
        "one, other = socket.socketpair()\n"
        "groups, size = (ctypes.c_uint32 * 2000)(), ctypes.c_uint32(8000)\n"
        "SO_PEERGROUPS = 59\n"  # Python asks for 1024 octets at most
        "asked = (one.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups, ctypes.byref(size))\n"
        "assert ctypes.CDLL(None).getsockopt(*asked) == 0\n"
        "assert (size.value, list(groups)) == (8000, [*range(1, 2001)])\n"
    )
    subprocess.run(["python3", "-c", code], check=True)
    assert "link_getsockopt" in {link.name for link in hooks.links() if link.target}


def test_a_connection_to_the_listener_itself_has_no_destination(hooks: Hooks, world: World) -> None:
    """Also one from a port that a steered connection had before."""
    hooks.enrol_pod(world.pod.fd, workload(world))
    for family in sorted(world.families):
        listener = world.outbound(family)
        first = stream(world, family)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind((LOOPBACK[family], 0))
        port = first.getsockname()[1]
        first.connect((FAR[family], 8080))
        server = world.accept(listener)
        assert original_dst(server, family) == (FAR[family], 8080)
        # The client's side is gone at once with a reset, so that the port is free.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        first.close()
        server.close()
        again = stream(world, family)
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((LOOPBACK[family], port))
        again.connect((LOOPBACK[family], 15001))
        with pytest.raises(FileNotFoundError):
            original_dst(world.accept(listener), family)


def test_a_socket_that_speaks_ipv4_in_mapped_form(hooks: Hooks, dual: World) -> None:
    key = hooks.enrol_pod(dual.pod.fd, workload(dual))
    listener = dual.outbound(4)
    client = stream(dual, 6)
    client.connect((f"::ffff:{FAR[4]}", 8080))
    server = dual.accept(listener)
    assert peer_of(client) == (f"::ffff:{FAR[4]}", 8080)
    assert original_dst(server, 4) == (FAR[4], 8080)
    exchange(client, server)
    assert moved(hooks, key) == {Count.STEERED: 1}


def test_a_listener_for_both_families(hooks: Hooks, dual: World) -> None:
    """It accepts IPv4 in mapped form, and its socket is asked as one of IPv4."""
    hooks.enrol_pod(dual.pod.fd, workload(dual))
    with inside(dual.pod.fd):
        listener = dual.keep(socket.create_server(("::", 15001), family=socket.AF_INET6, dualstack_ipv6=True))
    listener.settimeout(10)
    client = dual.connect(dual.pod, 4, FAR[4])
    server = dual.accept(listener)
    assert original_dst(server, 4) == (FAR[4], 8080)
    exchange(client, server)


def test_connect_without_waiting(hooks: Hooks, world: World) -> None:
    hooks.enrol_pod(world.pod.fd, workload(world))
    for family in sorted(world.families):
        listener = world.outbound(family)
        client = stream(world, family)
        client.setblocking(False)
        assert client.connect_ex((FAR[family], 8080)) in (0, 115)  # EINPROGRESS
        server = world.accept(listener)
        client.settimeout(10)
        exchange(client, server)
        assert peer_of(client) == (FAR[family], 8080)
        assert original_dst(server, family) == (FAR[family], 8080)


def test_mptcp_is_steered_as_tcp(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world))
    for family in sorted(world.families):
        listener = world.outbound(family)
        client = stream(world, family, IPPROTO_MPTCP)
        client.connect((FAR[family], 8080))
        server = world.accept(listener)
        assert peer_of(client) == (FAR[family], 8080)
        assert original_dst(server, family) == (FAR[family], 8080)
        exchange(client, server)
    assert moved(hooks, key) == {Count.STEERED: len(world.families)}


def test_a_socket_that_is_connected_again_has_the_latest_peer(hooks: Hooks, dual: World) -> None:
    key = hooks.enrol_pod(dual.pod.fd, workload(dual, inbound=False))
    listener, app = dual.outbound(4), dual.keep(dual.pod.listener(4, POD[4], 8080))
    client = stream(dual, 4)
    client.connect((FAR[4], 8080))
    dual.accept(listener)
    assert peer_of(client) == (FAR[4], 8080)
    # An address of AF_UNSPEC takes the connection back; Python has no way to say it.
    assert ctypes.CDLL(None).connect(client.fileno(), bytes(16), 16) == 0
    client.connect((POD[4], 8080))
    exchange(client, dual.accept(app))
    assert peer_of(client) == (POD[4], 8080)
    assert moved(hooks, key) == {Count.STEERED: 1, Count.BYPASS_LOCAL: 1}


# --- who passes


def test_marked_sockets_pass(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world))
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        for mark in (MARK, 0xA0000 | MARK):
            exchange(world.connect(world.pod, family, FAR[family], mark=mark), world.accept(far))
        assert not pending(listener)
        world.connect(world.pod, family, FAR[family], mark=MARK - 1)
        world.accept(listener)
    assert moved(hooks, key) == {Count.BYPASS_PROXY: 2 * len(world.families), Count.STEERED: len(world.families)}


def test_the_proxys_cgroup_passes(hooks: Hooks, world: World, cgroup: Path) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world))
    hooks.configure(Proxy(cgroups=(cgroup,)))
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        with in_cgroup(cgroup):
            exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
        # Marks do not count any more.
        world.connect(world.pod, family, FAR[family], mark=MARK)
        world.accept(listener)
    assert moved(hooks, key) == {Count.BYPASS_PROXY: len(world.families), Count.STEERED: len(world.families)}


def test_own_addresses_and_loopback_pass(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="closed", inbound=False))
    for family in sorted(world.families):
        listener = world.outbound(family)
        for address in (POD[family], LOOPBACK[family]):
            app = world.keep(world.pod.listener(family, address, 8080))
            exchange(world.connect(world.pod, family, address), world.accept(app))
        assert not pending(listener)
    assert moved(hooks, key) == {Count.BYPASS_LOCAL: 2 * len(world.families)}


def test_a_socket_bound_to_a_device_passes(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world))
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        client = stream(world, family)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        client.connect((FAR[family], 8080))
        exchange(client, world.accept(far))
        assert not pending(listener)
    assert moved(hooks, key) == {Count.BYPASS_DEVICE: len(world.families)}


def test_a_socket_bound_to_the_pods_address_is_steered(hooks: Hooks, world: World) -> None:
    hooks.enrol_pod(world.pod.fd, workload(world))
    for family in sorted(world.families):
        listener = world.outbound(family)
        client = stream(world, family)
        client.bind((POD[family], 0))
        client.connect((FAR[family], 8080))
        server = world.accept(listener)
        assert original_dst(server, family) == (FAR[family], 8080)
        exchange(client, server)


def test_a_family_that_is_not_steered_passes(hooks: Hooks, dual: World) -> None:
    for steered, other in ((4, 6), (6, 4)):
        wanted = workload(dual, policy="closed", families=frozenset({steered}))
        key = hooks.enrol_pod(dual.pod.fd, wanted)
        far = dual.far(other)
        exchange(dual.connect(dual.pod, other, FAR[other]), dual.accept(far))
        with pytest.raises(ConnectionRefusedError):
            dual.connect(dual.pod, steered, FAR[steered])
    assert moved(hooks, key) == {Count.BYPASS_FAMILY: 2, Count.REFUSED_NO_LISTENER: 2}


def test_datagrams_pass(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
    for family in sorted(world.families):
        server = world.keep(world.peer.datagram(family))
        server.bind((FAR[family], 5300))
        client = world.keep(world.pod.datagram(family))
        client.connect((FAR[family], 5300))
        client.send(b"there")
        assert server.recv(100) == b"there"
    assert moved(hooks, key) == {}


def test_draining_steers_no_more_and_keeps_what_is_known(hooks: Hooks, world: World) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
    for family in sorted(world.families):
        listener, far = world.outbound(family), world.far(family)
        client = world.connect(world.pod, family, FAR[family])
        server = world.accept(listener)
        hooks.enrol_pod(world.pod.fd, workload(world, policy="closed", outbound=False))
        assert (peer_of(client), original_dst(server, family)) == ((FAR[family], 8080),) * 2
        exchange(client, server)
        exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
        hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
    assert moved(hooks, key) == {Count.STEERED: len(world.families), Count.BYPASS_DISABLED: len(world.families)}


# --- lists


def lands(hooks: Hooks, world: World, family: int, address: str, port: int) -> str:
    """Where a connection comes out: "proxy" or "far"."""
    listener, far = world.outbound(family), world.far(family, port)
    client = world.connect(world.pod, family, address, port)
    found = [name for name, one in (("proxy", listener), ("far", far)) if pending(one)]
    for sock in (listener, far, client):
        sock.close()
    assert len(found) == 1
    return found[0]


SCOPES: list[tuple[str, Callable[[int], Scope], Callable[[int], list[tuple[str, int, str]]]]] = [
    (
        "excluded network",
        lambda family: Scope(out_exclude_cidrs=(network(FAR[family]),)),
        lambda family: [(FAR[family], 8080, "far")],
    ),
    (
        "a narrower network within an excluded one is excluded too",
        lambda family: Scope(
            out_exclude_cidrs=(network(FAR[family], wide=True),), out_include_cidrs=(network(FAR[family]),)
        ),
        lambda family: [(FAR[family], 8080, "far")],
    ),
    (
        "another excluded network",
        lambda family: Scope(out_exclude_cidrs=("192.0.2.0/24", "2001:db8:99::/48")),
        lambda family: [(FAR[family], 8080, "proxy")],
    ),
    (
        "included network",
        lambda family: Scope(out_include_cidrs=(network(FAR[family]),)),
        lambda family: [(FAR[family], 8080, "proxy")],
    ),
    (
        "another included network",
        lambda family: Scope(out_include_cidrs=("192.0.2.0/24", "2001:db8:99::/48")),
        lambda family: [(FAR[family], 8080, "far")],
    ),
    (
        "excluded port",
        lambda family: Scope(out_exclude_ports=(8080, 9090)),
        lambda family: [(FAR[family], 8080, "far"), (FAR[family], 8081, "proxy")],
    ),
    (
        "included port",
        lambda family: Scope(out_include_ports=(8081,)),
        lambda family: [(FAR[family], 8080, "far"), (FAR[family], 8081, "proxy")],
    ),
    (
        "exclusion wins",
        lambda family: Scope(out_include_ports=(8080, 8081), out_exclude_ports=(8080,)),
        lambda family: [(FAR[family], 8080, "far"), (FAR[family], 8081, "proxy")],
    ),
    (
        "user",
        lambda family: Scope(out_exclude_uids=(os.getuid(),)),
        lambda family: [(FAR[family], 8080, "far")],
    ),
    (
        "another user",
        lambda family: Scope(out_exclude_uids=(os.getuid() + 7,)),
        lambda family: [(FAR[family], 8080, "proxy")],
    ),
]


def network(address: str, *, wide: bool = False) -> str:
    if ":" in address:
        return "2001:db8::/32" if wide else f"{address}/128"
    return "198.51.0.0/16" if wide else f"{address}/32"


@pytest.mark.parametrize("case", SCOPES, ids=[name.replace(" ", "-") for name, *_ in SCOPES])
def test_lists(
    hooks: Hooks, dual: World, case: tuple[str, Callable[[int], Scope], Callable[[int], list[tuple[str, int, str]]]]
) -> None:
    _, scope, expected = case
    for family in (4, 6):
        hooks.enrol_pod(dual.pod.fd, workload(dual, scope=scope(family)))
        for address, port, where in expected(family):
            assert lands(hooks, dual, family, address, port) == where, (address, port)


def test_vips_are_taken_whatever_is_listed(hooks: Hooks, dual: World) -> None:
    scope = Scope(
        out_include_ports=(1,), out_exclude_ports=(8080,), out_exclude_uids=(os.getuid(),),
        out_exclude_cidrs=("240.0.0.0/8", "fd00::/16"),
    )  # fmt: skip
    key = hooks.enrol_pod(dual.pod.fd, workload(dual, scope=scope))
    for family in (4, 6):
        listener = dual.outbound(family)
        client = dual.connect(dual.pod, family, VIP[family])
        exchange(client, dual.accept(listener))
    assert moved(hooks, key) == {Count.STEERED: 2}


def test_lists_that_change_leave_no_entry_behind(hooks: Hooks, dual: World) -> None:
    before = entries(hooks)
    for port in range(1, 6):
        hooks.enrol_pod(dual.pod.fd, workload(dual, scope=Scope(out_exclude_ports=(port,))))
    after = entries(hooks)
    assert after["values"] == before["values"] + 1
    for key in hooks.enrolled():
        hooks.withdraw(key)
    assert entries(hooks) == before


def entries(hooks: Hooks) -> dict[str, int]:
    """How many each map of the node has, by bpftool. Caches of connections and arrays are left out."""
    found = {}
    for name in ("pods", "cgroups", "ports", "networks", "values", "listeners", "services", "endpoints", "counters"):
        path = hooks.place / f"map_{name}"
        text = subprocess.run(["bpftool", "map", "dump", "pinned", path], capture_output=True, text=True, check=True)
        found[name] = int(text.stdout.strip().splitlines()[-1].split()[1])
    return found


def test_enrolling_again_changes_nothing(hooks: Hooks, dual: World) -> None:
    wanted = workload(dual, scope=Scope(out_exclude_ports=(1, 2), in_exclude_cidrs=("192.0.2.0/24",)))
    key = hooks.enrol_pod(dual.pod.fd, wanted)
    listener = dual.outbound(4)
    dual.connect(dual.pod, 4, FAR[4])
    dual.accept(listener)
    raw = subprocess.run(["bpftool", "map", "dump", "pinned", hooks.place / "map_pods"], capture_output=True)
    assert hooks.is_current(key, wanted)
    assert hooks.enrol_pod(dual.pod.fd, wanted) == key
    again = subprocess.run(["bpftool", "map", "dump", "pinned", hooks.place / "map_pods"], capture_output=True)
    assert again.stdout == raw.stdout
    assert moved(hooks, key) == {Count.STEERED: 1}
    for other in (replace(wanted, policy="closed"), replace(wanted, scope=Scope()), replace(wanted, workers=2)):
        assert not hooks.is_current(key, other)


def test_a_workload_that_makes_no_sense_is_refused() -> None:
    both = frozenset({4, 6})
    for wrong in (
        {"families": frozenset()},
        {"families": both, "policy": "ajar"},
        {"families": both, "workers": 0},
        {"families": both, "vip_cidrs": ("240.240.0.1/16",)},
        {"families": both, "own_addresses": ("eth0",)},
    ):
        with pytest.raises(RedirectError):
            Workload(**wrong)  # type: ignore[arg-type]


# --- no proxy


def test_without_a_listener_open_goes_direct_and_closed_refuses(hooks: Hooks, world: World) -> None:
    for family in sorted(world.families):
        far = world.far(family)
        key = hooks.enrol_pod(world.pod.fd, workload(world, policy="open"))
        client = world.connect(world.pod, family, FAR[family])
        exchange(client, world.accept(far))
        assert peer_of(client) == (FAR[family], 8080)
        hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
        with pytest.raises(ConnectionRefusedError):
            world.connect(world.pod, family, FAR[family])
        assert not pending(far)
        # It comes back, and goes.
        listener = world.outbound(family)
        world.connect(world.pod, family, FAR[family])
        world.accept(listener)
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            world.connect(world.pod, family, FAR[family])
    families = len(world.families)
    assert moved(hooks, key) == {
        Count.DIRECT_NO_LISTENER: families, Count.REFUSED_NO_LISTENER: 2 * families, Count.STEERED: families,
    }  # fmt: skip


def test_what_listens_elsewhere_is_not_the_proxy(hooks: Hooks, world: World) -> None:
    """On the pod's address, in the neighbour, with another port, or connected and not listening."""
    hooks.enrol_pod(world.pod.fd, workload(world, policy="closed"))
    for family in sorted(world.families):
        world.keep(world.pod.listener(family, POD[family], 15001))
        world.keep(world.peer.listener(family, LOOPBACK[family], 15001))
        world.keep(world.pod.listener(family, LOOPBACK[family], 15002))
        with pytest.raises(ConnectionRefusedError):
            world.connect(world.pod, family, FAR[family])


def test_another_port_for_the_listener(hooks: Hooks, world: World) -> None:
    hooks.enrol_pod(world.pod.fd, workload(world, policy="closed", ports=Ports(outbound=15101, inbound=15106)))
    for family in sorted(world.families):
        listener = world.keep(world.pod.listener(family, LOOPBACK[family], 15101))
        client = world.connect(world.pod, family, FAR[family])
        exchange(client, world.accept(listener))


def test_two_pods_with_the_same_addresses_and_ports(hooks: Hooks) -> None:
    with ExitStack() as stack:
        worlds = [make_world(stack, frozenset({4, 6})) for _ in range(2)]
        keys = [hooks.enrol_pod(world.pod.fd, workload(world)) for world in worlds]
        for family in (4, 6):
            servers = []
            for world, port in zip(worlds, (8080, 8081), strict=True):
                listener = world.outbound(family)
                client = stream(world, family)
                client.bind((LOOPBACK[family], 45678))
                client.connect((FAR[family], port))
                servers.append(world.accept(listener))
            assert [original_dst(server, family)[1] for server in servers] == [8080, 8081]
        assert [moved(hooks, key) for key in keys] == [{Count.STEERED: 2}] * 2
        # One goes, the other stays.
        hooks.withdraw(keys[0])
        assert list(hooks.enrolled()) == [keys[1]]
        far = worlds[0].far(4)
        exchange(worlds[0].connect(worlds[0].pod, 4, FAR[4]), worlds[0].accept(far))
        assert original_dst(servers[1], 6) == (FAR[6], 8081)


# --- by cgroup


@pytest.fixture
def cgroup() -> Iterator[Path]:
    path = cgroup_root() / f"netproxy-test-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


@contextmanager
def in_cgroup(path: Path) -> Iterator[None]:
    """This process, with all its threads."""
    home = Path("/proc/self/cgroup").read_text().splitlines()[-1].partition("::")[2]
    (path / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (cgroup_root() / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))


def test_a_service_is_told_by_its_cgroup(hooks: Hooks, world: World, cgroup: Path) -> None:
    """In and below; its neighbours in the same network namespace are not touched."""
    below = cgroup / "below"
    below.mkdir()
    try:
        key = hooks.enrol_cgroup(cgroup, world.pod.fd, workload(world, inbound=False))
        for family in sorted(world.families):
            listener, far = world.outbound(family), world.far(family)
            exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
            for path in (cgroup, below):
                with in_cgroup(path):
                    client = world.connect(world.pod, family, FAR[family])
                server = world.accept(listener)
                assert original_dst(server, family) == (FAR[family], 8080)
                exchange(client, server)
            with in_cgroup(cgroup), closing(world.peer.connect(family, FAR[family], 8080)):
                world.accept(far)  # another namespace
        assert moved(hooks, key) == {Count.STEERED: 2 * len(world.families)}
        hooks.withdraw(key)
        with in_cgroup(cgroup):
            exchange(world.connect(world.pod, family, FAR[family]), world.accept(far))
    finally:
        below.rmdir()
