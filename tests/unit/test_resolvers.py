from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from netproxy.addr import SpiffeId, WorkloadKey
from netproxy.config.snapshot import LocalWorkload
from netproxy.resolvers import MAX_FILE, Found, Resolvers

VIPS = ("240.240.0.0/16", "fd00:240::/32")
KEY = "shop/web"


def workload(netns: str = "/run/netns/web", nameservers: tuple[str, ...] = ()) -> LocalWorkload:
    return LocalWorkload(
        WorkloadKey(KEY), "shop", "web", SpiffeId("spiffe://x"), "web", ("10.0.0.1",), netns, "open",
        nameservers=nameservers,
    )  # fmt: skip


class Host:
    """A root folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.resolvers = Resolvers(15053, root=str(root))

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def look(self, *workloads: LocalWorkload) -> bool:
        return self.resolvers.look(workloads or (workload(),), VIPS)

    @property
    def found(self) -> Found:
        return self.resolvers.found(KEY)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_which_resolvers_are_not_the_word_of_the_workload(host: Host) -> None:
    host.write("etc/resolv.conf", "nameserver 127.0.0.53\nnameserver 10.0.0.1\n")
    host.look()
    assert host.found.nameservers == ("127.0.0.53", "10.0.0.1")
    assert host.found.trusted == ("10.0.0.1",)
    (host.root / "etc/resolv.conf").unlink()
    host.look()
    assert host.found.trusted == ("10.0.0.1",)
    host.look(workload(f"/proc/{os.getpid()}/ns/net"))
    assert host.found.trusted == ()
    assert host.look(workload(nameservers=("127.0.0.1", "10.0.0.2")))
    assert host.found.trusted == ("127.0.0.1", "10.0.0.2")


@pytest.mark.parametrize(
    ("text", "nameservers", "note"),
    [
        ("nameserver 10.0.0.1\n", ("10.0.0.1",), ""),
        (
            "# x\nsearch a b\nnameserver\t10.0.0.1  # y\noptions ndots:5\nnameserver FD00:0::1",
            ("10.0.0.1", "fd00::1"),
            "",
        ),
        ("nameserver 10.0.0.1\nnameserver 10.0.0.1\n", ("10.0.0.1",), ""),
        ("nameserver ::ffff:10.0.0.1\n", ("10.0.0.1",), ""),
        ("nameserver 127.0.0.53\nnameserver ::1\n", ("127.0.0.53", "::1"), ""),
        (" nameserver 10.0.0.1\nnameservers 10.0.0.2\nnameserver\n;nameserver 10.0.0.3\n", (), "names no nameserver"),
        ("", (), "names no nameserver"),
        (
            "".join(f"nameserver 10.0.0.{n}\n" for n in range(1, 6)),
            ("10.0.0.1", "10.0.0.2", "10.0.0.3"),
            "only the first 3 of 5 are asked",
        ),
        ("nameserver dns.example\nnameserver 10.0.0.1\n", ("10.0.0.1",), "dns.example is no address"),
        ("nameserver fe80::1%eth0\n", (), "fe80::1 is link-local"),
        ("nameserver fe80::1\n", (), "fe80::1 is link-local"),
        ("nameserver 240.240.0.10\nnameserver fd00:240::1\n", (), "240.240.0.10 is a virtual address"),
        ("nameserver 0.0.0.0\nnameserver 224.0.0.251\n", (), "0.0.0.0 can't be asked; 224.0.0.251 can't be asked"),
        ("nameserver " + "9" * 500, (), "9" * 64 + " is no address"),
        ("nameserver \x1b[31m\udcff\n".encode("utf-8", "surrogateescape").decode("latin-1"), (), "is no address"),
    ],
)
def test_files(host: Host, text: str, nameservers: tuple[str, ...], note: str) -> None:
    host.write("etc/resolv.conf", text)
    host.look()
    assert host.found.nameservers == nameservers
    assert note in host.found.note
    assert bool(note) == bool(host.found.note)
    assert host.found.source == str(host.root / "etc/resolv.conf")


@pytest.mark.parametrize("netns", ["/run/netns/web", "/var/run/netns/web"])
def test_a_named_namespace_may_have_its_own(host: Host, netns: str) -> None:
    host.write("etc/resolv.conf", "nameserver 10.0.0.1\n")
    assert host.look(workload(netns))
    assert host.found.nameservers == ("10.0.0.1",)
    host.write("etc/netns/web/resolv.conf", "nameserver 10.0.0.2\n")
    assert host.look(workload(netns))
    assert host.found == Found(("10.0.0.2",), str(host.root / "etc/netns/web/resolv.conf"), trusted=("10.0.0.2",))
    assert not host.look(workload(netns))
    (host.root / "etc/netns/web/resolv.conf").unlink()
    assert host.look(workload(netns))
    assert host.found.nameservers == ("10.0.0.1",)
    for other in ("/run/netns/..", "/run/docker/netns/web", "/run/netns/a/web"):
        host.look(workload(other))
        assert host.found.source == str(host.root / "etc/resolv.conf")


def test_a_process_has_its_own(host: Host) -> None:
    host.look(workload(f"/proc/{os.getpid()}/ns/net"))
    assert host.found.source == f"/proc/{os.getpid()}/root/etc/resolv.conf"
    host.look(workload("/proc/4194305/ns/net"))
    assert "No such file" in host.found.note


def test_what_is_declared_counts(host: Host) -> None:
    host.write("etc/resolv.conf", "nameserver 10.0.0.1\n")
    host.look(workload(nameservers=("10.0.0.9", "240.240.0.1")))
    assert host.found == Found(
        ("10.0.0.9",),
        "Workload",
        "240.240.0.1 is a virtual address, which leads to us and not to a resolver",
        ("10.0.0.9",),
    )
    assert host.look(workload())
    assert host.found.nameservers == ("10.0.0.1",)


def test_it_is_read_again_when_it_changes(host: Host) -> None:
    host.write("etc/resolv.conf", "nameserver 10.0.0.1\n")
    assert host.look()
    assert not host.look()
    host.write("etc/resolv.conf", "nameserver 10.0.0.22\n")
    assert host.look()
    assert host.found.nameservers == ("10.0.0.22",)
    # Other virtual addresses make other resolvers usable.
    assert host.resolvers.look((workload(),), ("10.0.0.0/24",))
    assert host.found.nameservers == ()
    assert host.look()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def large(path: Path) -> None:
    path.write_text("nameserver 10.0.0.7\n" + "#" * MAX_FILE)


def nothing(path: Path) -> None:
    pass


def loop(path: Path) -> None:
    path.symlink_to("resolv.conf")


@pytest.mark.parametrize("make", [fifo, device, folder, large, nothing, loop])
def test_what_can_not_be_read_leaves_what_was_known(host: Host, make: Callable[[Path], None]) -> None:
    host.write("etc/resolv.conf", "nameserver 10.0.0.1\n")
    host.look()
    path = host.root / "etc/resolv.conf"
    path.unlink()
    make(path)
    assert not host.look()
    assert host.found.nameservers == ("10.0.0.1",)
    assert "what was known before stays" in host.found.note
    # Of one that was never known there is nothing.
    assert host.look(workload(), workload("/run/netns/web")) is False
    fresh = Resolvers(15053, root=str(host.root))
    fresh.look((workload(),), VIPS)
    assert fresh.found(KEY).nameservers == ()
    assert fresh.found(KEY).note
    # A new brain knows what the one before it knew.
    fresh = Resolvers(15053, host.resolvers.nameservers, root=str(host.root))
    assert fresh.look((workload(),), VIPS)
    assert fresh.found(KEY) == host.found


def test_a_link_leads_nowhere_else(host: Host, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "resolv.conf"
    outside.write_text("nameserver 10.6.6.6\n")
    host.write("run/stub.conf", "nameserver 10.0.0.1\n")
    path = host.root / "etc/resolv.conf"
    path.parent.mkdir()
    path.symlink_to("/run/stub.conf")
    host.look()
    assert host.found.nameservers == ("10.0.0.1",)
    for target in (str(outside), "../" * 20 + str(outside).lstrip("/")):
        path.unlink()
        path.symlink_to(target)
        host.look()
        assert host.found.nameservers == ("10.0.0.1",)
        assert "No such file" in host.found.note


def test_our_own_port_is_no_resolver(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.resolvers = Resolvers(53, root=str(tmp_path))
    host.write("etc/resolv.conf", "nameserver 127.0.0.1\nnameserver ::1\nnameserver 10.0.0.1\n")
    host.look()
    assert host.found.nameservers == ("10.0.0.1",)
    assert "where we listen ourselves" in host.found.note


def test_a_workload_that_goes_is_forgotten(host: Host) -> None:
    host.write("etc/resolv.conf", "nameserver 10.0.0.1\n")
    host.look()
    assert host.resolvers.look((), VIPS)
    assert host.found == Found()
