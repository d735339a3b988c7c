"""The failure policy decides in the kernel: a proxy is killed again and again, and nobody is told."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from redirect.bpf import Hooks, Listener
from tests.kernel.test_bpf import bpffs, dual, hooks, loaded, moved, workload
from tests.kernel.test_steering import FAR, LOOPBACK, POD, World, wait_for

__all__ = ["bpffs", "dual", "hooks", "loaded"]

ROUNDS = 10

PROXY = """
import select, socket, sys
listeners = [socket.socket(fileno=int(fd)) for fd in sys.argv[1:]]
print("ready", flush=True)
while True:
    for found in select.select(listeners, [], [])[0]:
        sock = found.accept()[0]
        sock.sendall(b"proxy")
        sock.close()
"""


class Proxy:
    """A process that holds the only descriptors of its listeners. Says "proxy" to each connection."""

    def __init__(self, world: World, hooks: Hooks, family: int) -> None:
        outbound = world.pod.listener(family, LOOPBACK[family], 15001)
        inbound = world.pod.listener(family, LOOPBACK[family], 15006)
        fds = [outbound.fileno(), inbound.fileno()]
        (key,) = hooks.enrolled()
        hooks.listen(key, Listener(4 if family == 4 else 6, 0, inbound.fileno()))
        command = [sys.executable, "-c", PROXY, *map(str, fds)]
        self.process = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE)
        outbound.close()
        inbound.close()
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def direct(world: World, listener: socket.socket) -> None:
    """Say "direct" to each connection."""

    def serve() -> None:
        listener.settimeout(None)
        while True:
            try:
                sock = listener.accept()[0]
            except OSError:
                return
            with closing(sock):
                sock.sendall(b"direct")

    thread = threading.Thread(target=serve)
    thread.start()
    world.stack.callback(thread.join)
    world.stack.callback(listener.shutdown, socket.SHUT_RDWR)


def outcome(world: World, family: int, inwards: bool) -> str:
    """Who answers a connection out of the pod, or into it."""
    try:
        if inwards:
            client = world.peer.connect(family, POD[family], 8080)
        else:
            client = world.pod.connect(family, FAR[family], 8080)
        with closing(client):
            return client.recv(100).decode()
    except ConnectionRefusedError:
        return "refused"


@pytest.mark.parametrize("inwards", [False, True], ids=["outbound", "inbound"])
@pytest.mark.parametrize("policy", ["open", "closed"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_proxy_that_is_killed(hooks: Hooks, dual: World, family: int, policy: str, inwards: bool) -> None:
    """Every connection begun after it is dead goes as the policy says, under load, of which those of the moment of
    death may break. With `closed` the far end, which answers when it can, never hears of one."""
    wanted = workload(dual, policy=policy)
    key = hooks.enrol_pod(dual.pod.fd, wanted)
    app = dual.app(family) if inwards else dual.far(family)
    stop, seen = threading.Event(), list[str]()

    def load() -> None:
        while not stop.is_set():
            try:
                seen.append(outcome(dual, family, inwards))
            except ConnectionResetError:
                seen.append("reset")

    direct(dual, app)
    dead = "direct" if policy == "open" else "refused"
    assert outcome(dual, family, inwards) == dead
    proxy = Proxy(dual, hooks, family)
    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(ROUNDS):
            assert outcome(dual, family, inwards) == "proxy"
            proxy.kill()
            at = len(seen)
            assert [outcome(dual, family, inwards) for _ in range(5)] == [dead] * 5
            wait_for(lambda at=at: dead in seen[at:] or not thread.is_alive(), "the load to see it")  # type: ignore[misc]
            proxy = Proxy(dual, hooks, family)
        at = len(seen)
        wait_for(lambda: len(seen) > at + 5 or not thread.is_alive(), "the load")
    finally:
        stop.set()
        thread.join()
        proxy.kill()
    # An empty answer: it was accepted, or waited to be, by a proxy that died.
    assert set(seen) - {"reset", ""} == {"proxy", dead}
    # The control: the far end does hear of them once nobody steers.
    hooks.withdraw(key)
    assert outcome(dual, family, inwards) == "direct"
    assert moved(hooks, key) == {}
