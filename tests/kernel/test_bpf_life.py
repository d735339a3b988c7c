"""Load, restart, upgrade and removal of the eBPF hooks, on the real kernel and read back by bpftool."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from redirect import RedirectError, Scope
from redirect.bpf import Balanced, Count, Hooks, Listener, Proxy, Target, Workload, clean, layout, links, syscall
from redirect.bpf import hooks as hooks_module
from redirect.bpf.balance import endpoint_rows
from redirect.bpf.bpffs import cgroup_root, folder, nodes, sets
from redirect.bpf.programs import HELPERS, HOOKS
from redirect.netns import inside, unshare_netns
from tests.kernel.test_bpf import NODE, bpffs, dual, entries, hooks, loaded, moved, peer_of, workload
from tests.kernel.test_bpf_inbound import drained, enrol, workers
from tests.kernel.test_steering import FAR, POD, VIP, World, exchange, make_world, original_dst, wait_for

__all__ = ["bpffs", "dual", "hooks", "loaded"]

ROOT = Path(__file__).resolve().parents[2]


def bpftool(kind: str) -> dict[int, str]:
    """Names by id, of all programs, maps or links of the machine."""
    found = json.loads(subprocess.run(["bpftool", "-j", kind], capture_output=True, text=True, check=True).stdout)
    return {one["id"]: one.get("name", "") for one in found}


def ours() -> set[tuple[str, int]]:
    """What bpftool shows of any node: programs and maps by name, links by their programs."""
    programs = {number for number, name in bpftool("prog").items() if name.startswith("np_")}
    found = {("prog", number) for number in programs}
    found |= {("map", number) for number, name in bpftool("map").items() if name.startswith("np_")}
    shown = json.loads(subprocess.run(["bpftool", "-j", "link"], capture_output=True, text=True, check=True).stdout)
    return found | {("link", one["id"]) for one in shown if one.get("prog_id") in programs}


def kinds(found: set[tuple[str, int]]) -> dict[str, int]:
    return {kind: sum(1 for one, _ in found if one == kind) for kind in ("prog", "map", "link")}


@pytest.fixture
def own(bpffs: Path) -> Iterator[Callable[[str], Hooks]]:
    """Hooks of nodes of the test's own, removed with it."""
    with ExitStack() as stack:

        def opened(node: str) -> Hooks:
            stack.callback(clean, node, mount=bpffs)
            found = stack.enter_context(Hooks.open(node, mount=bpffs))
            found.configure(Proxy(mark=0x539, mask=0xFFF))
            return found

        yield opened


@contextmanager
def load(world: World, family: int) -> Iterator[Load]:
    """Connections out of the pod, one after the other, each of which has to reach the listener with its destination."""
    running = Load(world, family)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        yield running
        at = running.done
        wait_for(lambda: bool(running.failed) or running.done > at + 20, "connections after the change")
    finally:
        running.stop.set()
        thread.join()


@dataclass
class Load:
    world: World
    family: int
    done: int = 0
    failed: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with self.world.outbound(self.family) as listener:
            self._run(listener)

    def _run(self, listener: socket.socket) -> None:
        while not self.stop.is_set():
            try:
                with closing(self.world.pod.connect(self.family, FAR[self.family], 8080)) as client:
                    server = listener.accept()[0]
                    with closing(server):
                        assert original_dst(server, self.family) == (FAR[self.family], 8080)
                        assert peer_of(client) == (FAR[self.family], 8080)
                self.done += 1
            except (OSError, AssertionError) as exc:
                self.failed.append(exc)
                return


def python(code: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


OTHER_PROGRAMS = """
import sys
from pathlib import Path
from redirect.bpf import compiler, loader
changed = Path(sys.argv[3]) / "connect.c"
old = next(path for path in compiler.SOURCES if path.name == "connect.c")
same = "return redirected4(ctx, CONNECTS)"
changed.write_text(old.read_text().replace(same, same + " || ctx->user_port == 0xffffffff"))
compiler.SOURCES = tuple(changed if path is old else path for path in compiler.SOURCES)
loader.load(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[4]))
print(compiler.version())
"""
"""What an upgrade of the sources does: one program is another, the maps are the same."""

OTHER_LAYOUT = """
import sys
from pathlib import Path
from redirect.bpf import layout, loader
layout.LAYOUT += 1
loader.load(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[4]))
"""

# --- restart


def test_a_restart_uses_what_is_pinned(hooks: Hooks, dual: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, the same programs and counters; steering goes on while nobody has the hooks open."""
    listeners = {4: workers(dual, 4)}
    wanted = workload(dual, scope=Scope(out_exclude_ports=(99,)), policy="closed")
    key = enrol(hooks, dual, listeners, scope=Scope(out_exclude_ports=(99,)), policy="closed")
    hooks.balance(Balanced(VIP[4], 80, (Target(FAR[4], 8081),)))
    before, state = hooks.links(), entries(hooks)
    hooks.close()

    listener = dual.outbound(4)
    client = dual.connect(dual.pod, 4, FAR[4])
    server = dual.accept(listener)
    assert original_dst(server, 4) == (FAR[4], 8080)
    exchange(client, server)
    dual.connect(dual.peer, 4, POD[4])
    assert drained(listeners[4][0]) == 1

    monkeypatch.setattr(hooks_module, "_run_loader", None)
    with Hooks.open(NODE, mount=hooks.place.parents[2]) as again:
        assert again.links() == before
        assert again.is_current(key, wanted)
        assert again.enrol_pod(dual.pod.fd, wanted) == key
        assert entries(again) == state
        assert again.enrolled()[key].listeners == {(4, 0)}
        assert moved(again, key) == {Count.STEERED: 1, Count.INBOUND_STEERED: 1}
        assert again.balanced() == {(VIP[4], 80): 1}
        again.unbalance(VIP[4], 80)
        # Changes are possible, too.
        again.enrol_pod(dual.pod.fd, workload(dual, outbound=False))
        again.withdraw(key)
        assert again.enrolled() == {}


def test_what_an_earlier_process_left_half_done_is_removed(hooks: Hooks, dual: World) -> None:
    """It was killed after it had written lists and endpoints, and before anything led to them."""
    before = entries(hooks)
    hooks._make_scope(workload(dual, scope=Scope(out_exclude_ports=(99,))))
    number = max(hooks._sets, default=0) + 1
    rows = endpoint_rows(Balanced(VIP[4], 80, (Target(FAR[4], 8081),)), number)
    syscall.update_batch(hooks._maps["endpoints"], rows)
    syscall.update(hooks._maps["counters"], bytes([9, 0, 0, 9]), bytes(hooks._cpus * 8 * layout.COUNTERS))
    after = entries(hooks)
    assert {name for name in after if after[name] != before[name]} == {"networks", "values", "endpoints", "counters"}
    Hooks.open(NODE, mount=hooks.place.parents[2]).close()
    assert entries(hooks) == before


@pytest.mark.parametrize("missing", ["link_connect4", "link_sock_ops", "map_image"])
def test_what_is_missing_is_made(own: Callable[[str], Hooks], dual: World, missing: str) -> None:
    """As after a loader that was killed."""
    with own("bpf-half") as found:
        key = found.enrol_pod(dual.pod.fd, workload(dual, policy="closed"))
        mount = found.place.parents[2]
        (found.place / missing).unlink()
    with Hooks.open("bpf-half", mount=mount) as again:
        assert list(again.enrolled()) == [key]
        listener = dual.outbound(4)
        client = dual.connect(dual.pod, 4, FAR[4])
        assert original_dst(dual.accept(listener), 4) == (FAR[4], 8080)
        assert peer_of(client) == (FAR[4], 8080)


def test_what_somebody_detached_is_attached_again(own: Callable[[str], Hooks], dual: World) -> None:
    found = own("bpf-detached")
    listeners = {family: workers(dual, family) for family in (4, 6)}
    key = enrol(found, dual, listeners, policy="closed")
    for link in found.links():
        if link.name in ("link_connect4", f"inbound_{key.number}"):
            subprocess.run(["bpftool", "link", "detach", "id", str(link.id)], check=True)
    assert {link.name for link in found.links() if not link.target} == {"link_connect4", f"inbound_{key.number}"}
    assert not found.is_current(key, workload(dual, policy="closed"))
    with Hooks.open("bpf-detached", mount=found.place.parents[2]) as again:
        enrol(again, dual, listeners, policy="closed")
        assert all(link.target for link in again.links())
        listener = dual.outbound(4)
        dual.connect(dual.pod, 4, FAR[4])
        dual.accept(listener)
        dual.connect(dual.peer, 4, POD[4])
        assert drained(listeners[4][0]) == 1


# --- upgrade


def test_programs_are_swapped_under_load(own: Callable[[str], Hooks], dual: World, tmp_path: Path) -> None:
    found = own("bpf-upgrade")
    enrol(found, dual, {4: workers(dual, 4)}, policy="closed")
    mount, before = found.place.parents[2], {link.name: link for link in found.links()}
    with load(dual, 4) as running:
        wait_for(lambda: running.done > 20, "the load")
        python(OTHER_PROGRAMS, "bpf-upgrade", mount, tmp_path, cgroup_root())
    assert not running.failed
    after = {link.name: link for link in found.links()}
    assert {name: link.id for name, link in after.items()} == {name: link.id for name, link in before.items()}
    assert all(after[name].program != before[name].program for name in before)
    # These sources are put back by the next one who opens.
    with load(dual, 4) as running, Hooks.open("bpf-upgrade", mount=mount) as again:
        assert {link.program for link in again.links()}.isdisjoint(link.program for link in after.values())
    assert not running.failed


def test_maps_of_another_layout_are_replaced_under_load(
    own: Callable[[str], Hooks], dual: World, tmp_path: Path
) -> None:
    mount = own("bpf-layout").place.parents[2]
    clean("bpf-layout", mount=mount)
    python(
        OTHER_LAYOUT + "from redirect.bpf import Hooks, Workload; from redirect.netns import open_netns\n"
        "hooks_module = sys.modules['redirect.bpf.hooks']; hooks_module.is_complete = lambda *a: True\n"
        "hooks = Hooks.open(sys.argv[1], mount=Path(sys.argv[2]))\n"
        "hooks.enrol_pod(open_netns(sys.argv[5]), Workload(frozenset({4, 6}), policy='closed'))\n",
        "bpf-layout", mount, tmp_path, cgroup_root(), f"/run/netns/{dual.pod.name}",
    )  # fmt: skip
    earlier = sets("bpf-layout", mount)
    with load(dual, 4) as running:
        wait_for(lambda: running.done > 20, "the load")
        found = own("bpf-layout")
        assert len(sets("bpf-layout", mount)) == 2
        listeners = {4: workers(dual, 4)}
        enrol(found, dual, listeners, policy="closed")
        wait_for(lambda: running.done > 40, "the load with both sets")
        dual.connect(dual.peer, 4, POD[4]).close()
        removed = found.retire()
    assert not running.failed
    assert {"link_connect4", "map_pods"} <= set(removed)
    assert [found.place] == sets("bpf-layout", mount) != earlier
    assert found.retire() == []
    dual.connect(dual.peer, 4, POD[4])
    assert drained(listeners[4][0]) >= 1


# --- removal


def test_clean_leaves_nothing(bpffs: Path, dual: World) -> None:
    before = ours()
    with Hooks.open("bpf-gone", mount=bpffs) as found:
        enrol(found, dual, {4: workers(dual, 4)}, policy="closed")
        found.balance(Balanced(VIP[4], 80, (Target(FAR[4], 8081),)))
        made = ours() - before
        assert kinds(made) == {"prog": 11, "map": 14, "link": 11}
        assert {number for kind, number in made if kind == "link"} == {link.id for link in found.links()}
    removed = clean("bpf-gone", mount=bpffs)
    assert len(removed) == 25
    assert "bpf-gone" not in nodes(bpffs)
    wait_for(lambda: ours() == before, "the kernel to free what was pinned")
    assert clean("bpf-gone", mount=bpffs) == []
    assert links("bpf-gone", mount=bpffs) == []
    far = dual.far(4)
    exchange(dual.connect(dual.pod, 4, FAR[4]), dual.accept(far))


def test_clean_leaves_what_is_not_ours(bpffs: Path) -> None:
    with Hooks.open("bpf-guest", mount=bpffs) as found:
        guest = found.place / "somebody"
        guest.mkdir()
    clean("bpf-guest", mount=bpffs)
    assert guest.is_dir()
    assert [path.name for path in guest.parent.iterdir()] == ["somebody"]
    guest.rmdir()
    guest.parent.rmdir()
    clean("bpf-guest", mount=bpffs)
    assert not folder("bpf-guest", bpffs).exists()
    with pytest.raises(RedirectError, match="node name"):
        clean("../netproxy", mount=bpffs)


def test_two_nodes_do_not_disturb_each_other(hooks: Hooks, own: Callable[[str], Hooks]) -> None:
    other = own("bpf-b")
    with ExitStack() as stack:
        mine, theirs = (make_world(stack, frozenset({4, 6})) for _ in range(2))
        keys = []
        for node, world in ((hooks, mine), (other, theirs)):
            keys.append(enrol(node, world, {family: workers(world, family) for family in (4, 6)}, policy="closed"))
        for family in (4, 6):
            for world in (mine, theirs):
                listener = world.outbound(family)
                client = world.connect(world.pod, family, FAR[family])
                assert original_dst(world.accept(listener), family) == (FAR[family], 8080)
                assert peer_of(client) == (FAR[family], 8080)
        assert moved(hooks, keys[0]) == moved(other, keys[1]) == {Count.STEERED: 2}
        assert (list(hooks.enrolled()), list(other.enrolled())) == ([keys[0]], [keys[1]])
        before = hooks.links()
        clean("bpf-b", mount=hooks.place.parents[2])
        assert hooks.links() == before
        far = theirs.far(4)
        exchange(theirs.connect(theirs.pod, 4, FAR[4]), theirs.accept(far))
        client = mine.connect(mine.pod, 4, FAR[4])
        assert peer_of(client) == (FAR[4], 8080)


def test_pods_that_come_and_go(hooks: Hooks) -> None:
    """Two hundred with the same address, half of them withdrawn when they are already gone."""
    before = entries(hooks)
    wanted = Workload(frozenset({4, 6}), own_addresses=("10.99.1.2",), policy="closed")
    seen = set()
    for turn in range(200):
        netns = bare_netns()
        key = hooks.enrol_pod(netns, wanted)
        with inside(netns), ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 15001)))
            inbound = stack.enter_context(socket.create_server(("127.0.0.1", 15006)))
            client = stack.enter_context(socket.socket())
            client.bind(("127.0.0.1", 45678))
            hooks.listen(key, Listener(4, 0, inbound.fileno()))
            client.connect((FAR[4], 1 + turn))
            server = stack.enter_context(listener.accept()[0])
            assert original_dst(server, 4) == (FAR[4], 1 + turn)
        assert moved(hooks, key) == {Count.STEERED: 1}
        seen.add(key)
        if turn % 2:
            os.close(netns)
            hooks.withdraw(key)
        else:
            hooks.withdraw(key)
            os.close(netns)
    assert len(seen) == 200
    assert entries(hooks) == before
    assert len([link for link in hooks.links() if link.name.startswith("inbound_")]) == 0
    flows = subprocess.run(
        ["bpftool", "map", "dump", "pinned", hooks.place / "map_flows"], capture_output=True, text=True
    )
    assert flows.stdout.strip() == "Found 0 elements"


def bare_netns() -> int:
    """A namespace without a name, with lo up. It is gone when the fd and its sockets are closed."""
    found: list[int] = []

    def make() -> None:
        unshare_netns()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            # SIOCSIFFLAGS: IFF_UP. struct ifreq is a name of 16 octets and 24 more.
            fcntl.ioctl(sock, 0x8914, struct.pack("16sH22x", b"lo", 1))
        found.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return found[0]


# --- the loader


def test_the_programs_call_what_they_are_meant_to() -> None:
    """bcc puts bpf_probe_read in where it takes a pointer for one of a traced program."""
    codes = json.loads(
        python(
            "import json; from redirect.bpf import compiler, programs\n"
            "print(json.dumps({name: sorted(programs.helpers(code)) for name, code in compiler.compiled().items()}))"
        )
    )
    assert set(codes) == {hook.name for hook in HOOKS}
    assert set().union(*codes.values()) == HELPERS


HIDDEN = ("/lib/modules", "/usr/src", "/usr/include")


def test_the_loader_needs_no_headers_of_the_kernel(tmp_path: Path) -> None:
    """In a mount namespace in which there are none, and a bpffs that goes with it."""
    cgroup = cgroup_root() / f"netproxy-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        script = [
            *(f'mkdir -p {path}; mount -t tmpfs none {path}; test -z "$(ls {path})"' for path in HIDDEN),
            f"mount -t bpf bpf {tmp_path}",
            f"{sys.executable} -m redirect.bpf.loader hidden {tmp_path} {cgroup}",
            f"ls {tmp_path}/netproxy/hidden/*",
        ]
        command = ["unshare", "--mount", "bash", "-ec", "\n".join(script)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    finally:
        cgroup.rmdir()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {f"link_{hook.name}" for hook in HOOKS if not hook.per_namespace} <= set(done.stdout.split())


def test_bpffs_is_mounted_where_it_is_not(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from redirect.bpf import bpffs\n"
        "assert bpffs.filesystem(Path(sys.argv[1])) != bpffs.BPF_MAGIC\n"
        "for _ in range(2): bpffs.mounted(Path(sys.argv[1]))\n"
        "print(open('/proc/self/mountinfo').read().count(sys.argv[1]))"
    )
    command = ["unshare", "--mount", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_what_the_kernel_does_not_permit_is_told(bpffs: Path) -> None:
    """An agent without capabilities: what was refused is in the message, and nothing is left attached."""
    before = ours()
    dropped = "-all"
    code = (
        "import sys; from pathlib import Path; from redirect import RedirectError; from redirect.bpf import Hooks\n"
        "try: Hooks.open('bpf-refused', mount=Path(sys.argv[1]))\n"
        "except RedirectError as exc: print(exc)"
    )
    command = ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped, sys.executable, "-c", code, str(bpffs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    clean("bpf-refused", mount=bpffs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "node bpf-refused: load hooks: create map np_config: [Errno 1] Operation not permitted"
    )
    wait_for(lambda: ours() == before, "what was pinned to go")


def test_a_compiler_that_is_not_there_is_told(bpffs: Path, tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc here')")
    command = [sys.executable, "-m", "redirect.bpf.loader", "bpf-none", str(bpffs), str(cgroup_root())]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr.strip()) == (1, "compile: bcc can't be imported: no bcc here")
    assert "bpf-none" not in nodes(bpffs)
