"""A stage for demonstrations and tests: nodes and pods as network namespaces on one machine.

::

    pod --veth-- [br0] node-a --veth (the wire)-- node-b [br0] --veth-- pod
    10.80.1.0/24, fd80:1::/64   10.80.0.0/30, fd80::/64   10.80.2.0/24, fd80:2::/64

Everything carries the stage's prefix, lives in namespaces of its own and goes with `close`. The host's own
network is not touched. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyroute2
from pyroute2 import netns as _netns

WIRE = "wire0"
_ETC_NETNS = Path("/etc/netns")
# Their methods are made at run time or have no types.
IPRoute: Any = vars(pyroute2)["IPRoute"]
netns: Any = _netns


class Pod:
    """A namespace with one interface, behind a node's bridge."""

    def __init__(self, stage: Stage, name: str, node: Node, addresses: list[str]) -> None:
        self.stage, self.name, self.node, self.addresses = stage, name, node, addresses
        self.netns = f"{stage.prefix}-{name}"
        self.path = f"/run/netns/{self.netns}"

    @property
    def ip(self) -> str:
        return self.addresses[0]

    def command(self, *argv: str) -> list[str]:
        """As it would be typed: with the pod's /etc/hosts."""
        return ["ip", "netns", "exec", self.netns, *argv]

    def run(self, *argv: str, timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*argv), capture_output=True, text=True, timeout=timeout, check=check, stdin=subprocess.DEVNULL
        )

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        return self.stage.start(self.command(*argv), **options)

    def hosts(self, names: Mapping[str, str | list[str]]) -> None:
        """name -> address or addresses, as the pod's /etc/hosts."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for name, found in names.items():
            lines += [f"{address} {name}" for address in ([found] if isinstance(found, str) else found)]
        self._etc("hosts", lines)

    def resolv(self, *nameservers: str, search: str = "", options: str = "") -> None:
        """The pod's /etc/resolv.conf."""
        lines = [f"nameserver {address}" for address in nameservers]
        lines += [f"search {search}"] if search else []
        self._etc("resolv.conf", lines + ([f"options {options}"] if options else []))

    def _etc(self, name: str, lines: list[str]) -> None:
        folder = _ETC_NETNS / self.netns
        folder.mkdir(parents=True, exist_ok=True)
        # In place: a process that was started with the file mounted sees what is in it now.
        (folder / name).write_text("\n".join(lines) + "\n")


class Node:
    """A namespace that stands for a host: a bridge for its pods, the wire to its neighbour."""

    def __init__(self, stage: Stage, name: str, number: int) -> None:
        self.stage, self.name, self.number = stage, name, number
        self.netns = f"{stage.prefix}-{name}"

    def command(self, *argv: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.netns}", *argv]

    def run(self, *argv: str, timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*argv), capture_output=True, text=True, timeout=timeout, check=check, stdin=subprocess.DEVNULL
        )

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        return self.stage.start(self.command(*argv), **options)


class Stage:
    """Use as a context manager, or call `close`. `families`: what pods get, 4, 6 or both."""

    def __init__(self, prefix: str, folder: Path, families: Iterable[int] = (4,), nodes: int = 2) -> None:
        self.prefix, self.folder = prefix, folder
        self.families = tuple(families)
        self.nodes: list[Node] = []
        self.pods: dict[str, Pod] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._numbers: dict[str, int] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for number in range(1, nodes + 1):
                self._add_node(f"node-{chr(96 + number)}", number)
            if nodes == 2:
                self._add_wire()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- building -----------------------------------------------------------------------------------

    def _add_node(self, name: str, number: int) -> None:
        node = Node(self, name, number)
        netns.create(node.netns)
        self.nodes.append(node)
        with IPRoute(netns=node.netns) as ip:
            _up(ip, "lo")
            # A fixed address: else it is that of some port, and changes for all pods when that one goes.
            ip.link("add", ifname="br0", kind="bridge", address=f"02:80:00:00:00:{number:02x}")
            bridge = _index(ip, "br0")
            for family, address, length in ((4, f"10.80.{number}.254", 24), (6, f"fd80:{number}::fe", 64)):
                if family in self.families:
                    _address(ip, bridge, address, length)
            ip.link("set", index=bridge, state="up")
        sysctl = ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]
        node.run(*sysctl)

    def _add_wire(self) -> None:
        a, b = self.nodes
        with IPRoute(netns=a.netns) as ip:
            ip.link("add", ifname=WIRE, kind="veth", peer={"ifname": WIRE, "net_ns_fd": b.netns})
        for node, other in ((a, b), (b, a)):
            with IPRoute(netns=node.netns) as ip:
                wire = _index(ip, WIRE)
                for family, address, length in ((4, f"10.80.0.{node.number}", 30), (6, f"fd80::{node.number}", 64)):
                    if family in self.families:
                        _address(ip, wire, address, length)
                ip.link("set", index=wire, state="up")
                if 4 in self.families:
                    ip.route("add", dst=f"10.80.{other.number}.0/24", gateway=f"10.80.0.{other.number}")
                if 6 in self.families:
                    ip.route("add", dst=f"fd80:{other.number}::/64", gateway=f"fd80::{other.number}", family=10)

    def add_pod(self, name: str, node: Node, families: Iterable[int] | None = None) -> Pod:
        number = self._numbers[node.name] = self._numbers.get(node.name, 0) + 1
        return self.make_pod(name, node, number, tuple(families or self.families))

    def make_pod(self, name: str, node: Node, number: int, families: tuple[int, ...]) -> Pod:
        """Also to make a deleted one again, with the same address."""
        plan = {4: (f"10.80.{node.number}.{number}", 24), 6: (f"fd80:{node.number}::{number}", 64)}
        pod = Pod(self, name, node, [plan[family][0] for family in families])
        netns.create(pod.netns)
        self.pods[name] = pod
        outside = f"v{number}"
        with IPRoute(netns=node.netns) as ip:
            ip.link("add", ifname=outside, kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod.netns})
            ip.link("set", index=_index(ip, outside), master=_index(ip, "br0"), state="up")
        with IPRoute(netns=pod.netns) as ip:
            _up(ip, "lo")
            eth0 = _index(ip, "eth0")
            for family in families:
                _address(ip, eth0, *plan[family])
            ip.link("set", index=eth0, state="up")
            if 4 in families:
                ip.route("add", dst="0.0.0.0/0", gateway=f"10.80.{node.number}.254")
            if 6 in families:
                ip.route("add", dst="::/0", gateway=f"fd80:{node.number}::fe", family=10)
        return pod

    def remove_pod(self, name: str) -> None:
        pod = self.pods.pop(name)
        netns.remove(pod.netns)
        shutil.rmtree(_ETC_NETNS / pod.netns, ignore_errors=True)

    # -- processes ----------------------------------------------------------------------------------

    def start(self, command: list[str], log: str = "", **options: Any) -> subprocess.Popen[bytes]:
        """A process of the stage; ended by `close`. `log`: a file in the folder for its output."""
        output: Any = subprocess.DEVNULL
        if log:
            output = open(self.folder / log, "ab")  # noqa: SIM115 - handed to the process
        options.setdefault("stdout", output)
        options.setdefault("stderr", output)
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        finally:
            if log:
                output.close()
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes], how: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        """End one process of the stage and wait for it. Its exit code."""
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            return process.wait(timeout)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process in self.processes:
                self.processes.remove(process)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 15.0
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        self.processes.clear()
        for name in list(self.pods):
            self.remove_pod(name)
        for node in self.nodes:
            netns.remove(node.netns)
        self.nodes.clear()


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> Any:
    """The first true answer. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.02)


def forget_stale(prefix: str) -> None:
    """Remove what a killed run with this prefix left: processes in its namespaces, then the namespaces."""
    for name in netns.listnetns():
        if name.startswith(f"{prefix}-"):
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            netns.remove(name)
            shutil.rmtree(_ETC_NETNS / name, ignore_errors=True)


def _index(ip: Any, name: str) -> int:
    return int(ip.link_lookup(ifname=name)[0])


def _up(ip: Any, name: str) -> None:
    ip.link("set", index=_index(ip, name), state="up")


def _address(ip: Any, index: int, address: str, length: int) -> None:
    if ":" in address:
        # Duplicate address detection would leave it unusable for a second; nobody else is here.
        ip.addr("add", index=index, address=address, prefixlen=length, flags=0x02)
    else:
        ip.addr("add", index=index, address=address, prefixlen=length)
