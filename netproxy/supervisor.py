"""The main process of a node: tiny, root, standard library only, parses no traffic.

It holds what must outlive the others (network namespaces, listeners, the netlink sockets that own nft
tables, the shards of the last snapshot), makes sockets inside pod namespaces, and starts and restarts
brain and workers. See `channel` for the protocol. A child's life::

    started --hello--> syncing --ready--> ready --drain/stop--> leaving --exit--> (gone)
       \\___________________________ exit, any time ____________________________--> restarted with backoff

Rules:

* The brain may die at any time; its replacement is told what exists and takes over.
* A dead worker's listeners stay open here, so what waits in their queues is answered by the
  replacement. After `WORKER_GRACE_S` without one they are closed; when no worker at all is left that
  long, steering with failure policy ``open`` is released.
* SIGTERM, SIGINT: rules off, drain, exit. A second one: at once. SIGUSR2: this process executes itself
  anew with all descriptors kept, then replaces brain and workers one by one (upgrade). SIGHUP: the file of the
  access log is opened anew (after logrotate has moved it).
* Children die with us (PR_SET_PDEATHSIG), and so does every ``open`` table: its owner socket is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from . import log as own_log
from .attachments import Attached, Attachments, descriptors, disown, drop_duplicates, own
from .channel import VERSION, Channel, ChannelBroken, Message, memfd_with, read_memfd, socket_pair
from .log import ERROR, INFO, WARNING
from .log import log as _log
from .logfile import STDOUT, open_target
from .settings import ARENA_REGION_HEADER, REGIONS_PER_WORKER, NodeSettings, arena_region, arena_size

WORKER_GRACE_S = 2.0
ATTACH_TIMEOUT_S = 5.0
_BACKOFF_MAX_S = 5.0
_STABLE_S = 5.0
"""A child that lived this long is restarted at once; one that died sooner, with growing delay."""
_TAKEOVER = "NETPROXY_TAKEOVER"
_PYTHON = [sys.executable, "-P"]
"""-P: a file in the current folder must not be taken for a module, we are root."""
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
"""glibc's defaults give every large TLS buffer back at once: 63,000 page faults per 256 MiB, none with these, and
326 against 519 MB per CPU second (2 cores, uvloop, both ends in one process)."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_TRY_S = 60
"""How long the load of a new program may take before the upgrade to it is refused."""
_STOP_WAIT_S = 10.0
"""How long a stop waits for a brain that is just being restarted."""


@dataclass
class Child:
    role: str
    slot: int
    pid: int
    pidfd: int
    channel: Channel
    started: float
    state: str = "started"
    region: int = -1
    """Of the arena, a worker's."""
    replaces: int = 0
    """pid of the one that drains when this one is ready (upgrade)."""
    dismissed: bool = False
    """A brain that was told to make room for the next one (upgrade)."""


@dataclass
class Slot:
    """Place of one child: when it may start again, since when nobody is ready in it."""

    failures: int = 0
    start_at: float = 0.0
    down_since: float = 0.0


class Supervisor:
    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, Child] = {}
        self.slots: dict[tuple[str, int], Slot] = {("brain", 0): Slot()}
        for slot in range(settings.workers):
            self.slots["worker", slot] = Slot()
        self.attachments = Attachments(settings.mark)
        self.shards: dict[str, tuple[str, bytes]] = {}
        self.arena_fd = -1
        self.stopping = ""
        self.stop_deadline = 0.0
        self.stop_by = 0.0
        """When a stop that waits for the brain begins without it; 0.0 while none does."""
        self.stop_retried = False
        self.upgrade_queue: list[int] = []
        self._trying = False
        self.lock_fd = -1
        self.restarts: dict[str, int] = {"brain": 0, "worker": 0}
        self.access_fd = -1
        self.access_error = ""
        """Why the file of the access log could not be opened anew; what was open stays in use."""

    # -- life ---------------------------------------------------------------------------------------

    def run(self) -> int:
        # Listeners, namespaces and sockets in transit are many; the usual soft limit of 1024 is for select(2).
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        self._signals: list[int] = []
        for number in _SIGNALS:
            signal.signal(number, lambda n, _frame: self._signals.append(n))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self.selector.register(self._wake_r, selectors.EVENT_READ, None)
        own_log.begin("supervisor", self.settings.log_level)
        if not self._resume():
            self._lock()
            if not self._open_access_log():
                return 2
            self.arena_fd = os.memfd_create("netproxy-arena", os.MFD_CLOEXEC)
            os.ftruncate(self.arena_fd, arena_size(REGIONS_PER_WORKER * self.settings.workers))
        with open(self.settings.pid_file, "w") as file:
            file.write(f"{os.getpid()}\n")
        _notify(f"STATUS=starting\nMAINPID={os.getpid()}")
        try:
            while not (self.stopping == "done" and not self.children):
                self._tick()
                now = time.monotonic()
                timeout = max(0.0, min(self._deadlines(), default=now + 60.0) - now)
                for key, mask in self.selector.select(timeout):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._wake_r, 512)
                    elif isinstance(key.data, subprocess.Popen):
                        self._on_tried(key.data, key.fd)
                    elif key.data.pid in self.children:
                        self._on_ready(key.data, key.fd, mask)
                while self._signals:
                    self._on_signal(self._signals.pop(0))
        finally:
            for child in list(self.children.values()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
        for name in (self.settings.pid_file,):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        return 0

    def _lock(self) -> None:
        """One supervisor per node; the lock goes with the process."""
        os.makedirs(self.settings.run_dir, mode=0o755, exist_ok=True)
        path = os.path.join(self.settings.run_dir, "lock")
        deadline = time.monotonic() + 2.0
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise SystemExit(f"netproxy: another agent runs as node {self.settings.node} ({path})") from None
                time.sleep(0.05)
        self.lock_fd = fd

    def _deadlines(self) -> list[float]:
        now = time.monotonic()
        out = []
        if not self.stopping:
            for (role, number), slot in self.slots.items():
                if not self._occupied(role, number):
                    out.append(slot.start_at)
                if role == "worker" and slot.down_since:
                    due = slot.down_since + WORKER_GRACE_S
                    if due > now or self.attachments.holds_listeners(number):
                        out.append(due)
        if self.stop_deadline:
            out.append(self.stop_deadline)
        if self.stop_by:
            out.append(self.stop_by)
        out += [item.deadline for item in self.attachments.by_key.values() if item.request >= 0]
        return out

    def _tick(self) -> None:
        now = time.monotonic()
        if not self.stopping:
            for (role, number), slot in self.slots.items():
                if not self._occupied(role, number) and now >= slot.start_at:
                    self._start(role, number)
                if role == "worker" and slot.down_since and now >= slot.down_since + WORKER_GRACE_S:
                    self._give_up_slot(number)
        for key, item in self.attachments.by_key.items():
            if item.request >= 0 and now >= item.deadline:
                self._answer_attach(key, item, "")
        if self.stop_by and now >= self.stop_by:
            self._begin_stop()
        if self.stop_deadline and now >= self.stop_deadline:
            self.stop_deadline = 0.0
            if self.stopping == "unsteer":
                _log("the brain did not take the steering off in time, releasing it", WARNING)
                self._after_unsteer(())
            else:
                for child in list(self.children.values()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)

    def _occupied(self, role: str, slot: int) -> bool:
        return any(c.role == role and c.slot == slot and c.state != "leaving" for c in self.children.values())

    # -- children -----------------------------------------------------------------------------------

    def _start(self, role: str, slot: int, replaces: int = 0) -> None:
        ours, theirs = socket_pair()
        try:
            with theirs:
                process = subprocess.Popen(
                    [*_PYTHON, "-m", f"netproxy.{role}", str(theirs.fileno()), str(slot), str(os.getpid())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env={**_MALLOC, **os.environ},
                )
            pid = process.pid
            process.returncode = 0  # reaped by us through the pidfd, not by Popen
            pidfd = os.pidfd_open(pid)
        except OSError as exc:
            # No memory, process or descriptor to be had just now.
            ours.close()
            _log(f"{role} {slot} can't be started: {exc}", ERROR)
            self._failed(role, slot, 0.0)
            return
        region = self._free_region(slot) if role == "worker" else -1
        child = Child(role, slot, pid, pidfd, Channel(ours), time.monotonic(), region=region, replaces=replaces)
        self._adopt(child)
        _log(f"{role} {slot} started, pid {pid}")

    def _failed(self, role: str, slot: int, lived_s: float) -> None:
        """Nobody is in this place any more: when may the next one start?"""
        place = self.slots[role, slot]
        now = time.monotonic()
        place.failures = 0 if lived_s >= _STABLE_S else place.failures + 1
        place.start_at = now + (0.0 if place.failures <= 1 else min(_BACKOFF_MAX_S, 0.1 * 2.0**place.failures))
        place.down_since = place.down_since or now

    def _free_region(self, slot: int) -> int:
        """A region of this worker's that no process uses; -1: all are in use."""
        used = {child.region for child in self.children.values()}
        first = slot * REGIONS_PER_WORKER
        return next((number for number in range(first, first + REGIONS_PER_WORKER) if number not in used), -1)

    def _adopt(self, child: Child) -> None:
        self.children[child.pid] = child
        self.selector.register(child.pidfd, selectors.EVENT_READ, child)
        self.selector.register(child.channel.fileno(), selectors.EVENT_READ, child)

    def _on_ready(self, child: Child, fd: int, mask: int) -> None:
        if fd == child.pidfd:
            self._on_exit(child)
            return
        try:
            if mask & selectors.EVENT_WRITE:
                child.channel.flush()
            if mask & selectors.EVENT_READ:
                for _ in range(256):
                    message = child.channel.receive()
                    if message is None:
                        break
                    try:
                        self._on_message(child, message)
                    finally:
                        for left in message.fds:
                            os.close(left)
            self._watch(child)
        except ChannelBroken as exc:
            # The pidfd reports the exit; one that lives on without a channel is of no use.
            self._cut_off(child, "" if self._may_leave(child) else f"channel: {exc}")
        except Exception as exc:  # noqa: BLE001 - whatever one child says must not end the others
            self._cut_off(child, f"a message that can't be handled: {exc!r}")

    def _may_leave(self, child: Child) -> bool:
        """Was it told to?"""
        return bool(self.stopping) or child.dismissed or child.state == "leaving"

    def _cut_off(self, child: Child, why: str) -> None:
        """`why` "": nothing is wrong with it."""
        if why:
            _log(f"{child.role} {child.slot}: {why}", ERROR)
        if child.channel.fileno() >= 0:
            self.selector.unregister(child.channel.fileno())
            child.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)

    def _watch(self, child: Child) -> None:
        fd = child.channel.fileno()
        if fd >= 0:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.channel.wants_write else 0)
            if self.selector.get_key(fd).events != events:
                self.selector.modify(fd, events, child)

    def _send(self, child: Child, op: str, fds: tuple[int, ...] | list[int] = (), **fields: Any) -> None:
        if child.channel.fileno() < 0:
            return
        try:
            child.channel.send(op, fds, **fields)
            self._watch(child)
        except ChannelBroken as exc:
            _log(f"{child.role} {child.slot}: {op}: {exc}", ERROR)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)

    def _on_exit(self, child: Child) -> None:
        status = 0
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(child.pid, 0)
        self.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        if child.channel.fileno() >= 0:
            self.selector.unregister(child.channel.fileno())
            child.channel.close()
        del self.children[child.pid]
        if child.region >= 0:
            # Its gauges count what is open, which is nothing any more; the counters stay.
            os.pwrite(self.arena_fd, bytes(ARENA_REGION_HEADER - 8), arena_region(child.region) + 8)
        code = os.waitstatus_to_exitcode(status)
        how = f"{'signal' if code < 0 else 'exit code'} {abs(code)}"
        expected = code in (0, -signal.SIGKILL) and self._may_leave(child)
        _log(f"{child.role} {child.slot} ended, pid {child.pid}, {how}", INFO if expected else WARNING)
        for key, item in self.attachments.by_key.items():
            if item.request >= 0 and child.role == "worker":
                item.waiting.discard(child.slot)
                if not item.waiting:
                    self._answer_attach(key, item, "")
        if child.role == "brain" and self.stopping == "unsteer" and not self.stop_retried:
            # It died before or during its last work, perhaps before we knew: the next one does it.
            self.stop_retried = True
            self.stopping, self.stop_deadline = "", 0.0
            self.stop_by = time.monotonic() + _STOP_WAIT_S
        elif self.stopping:
            self._on_exit_stopping(child)
            return
        if self._occupied(child.role, child.slot):
            self._next_upgrade()
            return
        self._failed(child.role, child.slot, time.monotonic() - child.started)
        self.restarts[child.role] += 1
        if child.role == "worker" and self._serves() and self.slots["worker", child.slot].failures > 1:
            # The next one waits before it starts: what comes until then is for the others, not for this one's queues.
            self._give_up_slot(child.slot)

    def _serves(self) -> bool:
        """Some worker does."""
        return any(c.role == "worker" and c.state == "ready" for c in self.children.values())

    def _give_up_slot(self, slot: int) -> None:
        """Nobody serves this slot for too long: what is in its queues is refused now, not never."""
        self.attachments.close_slot(slot)
        if self._serves():
            return
        released = [
            key
            for key, item in self.attachments.by_key.items()
            if item.owner is not None or (item.is_handed_out and item.policy == "open")
        ]
        if released:
            names = ", ".join(released)
            _log(f"no worker for {WORKER_GRACE_S:g} s: steering released (failure policy open): {names}", WARNING)
            disown(self.attachments.by_key[key] for key in released)
            # It can't be put back before a worker is ready, but until then the brain must not call it steered.
            self._to_brain("resteer", body=json.dumps(released).encode(), released=True)

    # -- messages -----------------------------------------------------------------------------------

    def _on_message(self, child: Child, message: Message) -> None:
        handler = getattr(self, f"_{child.role}_{message.op}", None) or getattr(self, f"_any_{message.op}", None)
        if handler is None:
            _log(f"{child.role} {child.slot}: unknown message {message.op!r}", WARNING)
            return
        handler(child, message)

    def _any_hello(self, child: Child, message: Message) -> None:
        if message.fields["v"] != VERSION:
            _log(f"{child.role} {child.slot} speaks protocol {message.fields['v']}, this is {VERSION}", ERROR)
            os.kill(child.pid, signal.SIGKILL)
            return
        child.state = "syncing"
        settings = self.settings.to_json()
        self._send(
            child,
            "welcome",
            (self.arena_fd,),
            v=VERSION,
            region=child.region,
            settings=settings,
            log_level=own_log.level(),
        )
        if child.role == "worker":
            if self.access_fd >= 0:
                self._send(child, "access_log", (self.access_fd,))
            for key, (version, body) in self.shards.items():
                self._send(child, "shard", key=key, version=version, body=body)
            for key, item in self.attachments.by_key.items():
                self._listen(child, key, item)
        self._send(child, "synced")

    def _any_ready(self, child: Child, _message: Message) -> None:
        child.state = "ready"
        self.slots[child.role, child.slot].down_since = 0.0
        if self.stop_by and child.role == "brain":
            self._begin_stop()
            return
        if child.replaces and child.replaces in self.children:
            old = self.children[child.replaces]
            old.state = "leaving"
            self._send(old, "drain", deadline_s=self.settings.drain_s)
        self._next_upgrade()
        if child.role == "worker":
            released = [
                k
                for k, item in self.attachments.by_key.items()
                if item.owner is None and item.policy == "open" and not item.is_handed_out
            ]
            if released:
                self._to_brain("resteer", body=json.dumps(released).encode())
        if self.slots and all(self._ready(role, slot) for role, slot in self.slots):
            _notify("READY=1\nSTATUS=running")

    def _ready(self, role: str, slot: int) -> bool:
        return any(c.role == role and c.slot == slot and c.state == "ready" for c in self.children.values())

    def _worker_listening(self, child: Child, message: Message) -> None:
        key = message.fields["workload"]
        item = self.attachments.by_key.get(key)
        if item is not None and item.request >= 0:
            item.waiting.discard(child.slot)
            if not item.waiting:
                self._answer_attach(key, item, "")

    def _answer_attach(self, key: str, item: Attached, error: str) -> None:
        request, item.request = item.request, -1
        if not error and not any(
            c.role == "worker" and c.slot in item.listeners and c.state in ("syncing", "ready")
            for c in self.children.values()
        ):
            error = "no worker runs"
        self._to_brain("attach", id=request, workload=key, error=error)

    def _worker_sockets(self, child: Child, message: Message) -> None:
        fields = message.fields
        item = self.attachments.by_key.get(fields["workload"])
        kind = fields.get("kind", "stream")  # a worker of before an upgrade sends none
        fds: list[int] = []
        error = "workload is not attached"
        if item is not None:
            fds, error = self.attachments.sockets(item, fields["family"], kind, int(fields["n"]))
        answer = {name: fields[name] for name in ("id", "workload", "family")}
        self._send(child, "sockets", fds, **answer, kind=kind, error=error)
        for fd in fds:
            os.close(fd)

    def _brain_put(self, _child: Child, message: Message) -> None:
        key, version = message.fields["key"], message.fields["version"]
        self.shards[key] = (version, message.body)
        for worker in self._workers():
            self._send(worker, "shard", key=key, version=version, body=message.body)

    def _brain_drop(self, _child: Child, message: Message) -> None:
        if self.shards.pop(message.fields["key"], None) is not None:
            for worker in self._workers():
                self._send(worker, "unshard", key=message.fields["key"])

    def _brain_attach(self, child: Child, message: Message) -> None:
        """Fields: workload, families, dial_families, outbound_port, inbound_port, dns_port, policy; the namespace."""
        fields = dict(message.fields)
        # The policy is no part of what the listeners depend on: a change of it closes nothing.
        key, request, policy = fields.pop("workload"), fields.pop("id"), fields.pop("policy")
        netns_fd = message.fds.pop()
        item = self.attachments.renew(key, netns_fd, fields)
        if item is None:
            self._detach(key)
            item = self.attachments.add(key, netns_fd, fields)
        item.policy = policy
        try:
            for number in range(self.settings.workers):
                self.attachments.listen(item, number)
        except OSError as exc:
            self._detach(key)
            self._send(child, "attach", id=request, workload=key, error=f"listeners: {exc}")
            return
        item.request, item.deadline = request, time.monotonic() + ATTACH_TIMEOUT_S
        item.waiting = set()
        for worker in self._workers():
            item.waiting.add(worker.slot)
            self._listen(worker, key, item)
        if not item.waiting:
            self._answer_attach(key, item, "")

    def _brain_listeners(self, child: Child, message: Message) -> None:
        key, family = message.fields["workload"], message.fields["family"]
        item = self.attachments.by_key.get(key)
        slots, fds = self.attachments.inbound(item, family) if item is not None else ([], [])
        self._send(child, "listeners", fds, id=message.fields["id"], workload=key, family=family, slots=slots)

    def _brain_own(self, _child: Child, message: Message) -> None:
        item = self.attachments.by_key.get(message.fields["workload"])
        if item is not None:
            own(item, message.fds.pop() if message.fds else -1)

    def _brain_detach(self, _child: Child, message: Message) -> None:
        self._detach(message.fields["workload"])

    def _brain_state(self, child: Child, message: Message) -> None:
        state = {
            "children": [
                {"role": c.role, "slot": c.slot, "pid": c.pid, "state": c.state, "age_s": time.monotonic() - c.started}
                for c in self.children.values()
            ],
            "restarts": self.restarts,
            "access_log": {"target": self.settings.access_log, "error": self.access_error},
            "log_level": own_log.level(),
            "pid": os.getpid(),
            "attached": self.attachments.state(),
            "shards": {key: version for key, (version, _) in self.shards.items()},
        }
        self._send(child, "state", id=message.fields["id"], body=json.dumps(state).encode())

    def _brain_log_level(self, _child: Child, message: Message) -> None:
        own_log.set_level(message.fields["level"])
        for worker in self._told_workers():
            self._send(worker, "log_level", level=message.fields["level"])

    def _brain_unsteered(self, _child: Child, message: Message) -> None:
        if self.stopping == "unsteer":
            self._after_unsteer(json.loads(message.body))

    def _workers(self) -> list[Child]:
        return [c for c in self.children.values() if c.role == "worker" and c.state in ("syncing", "ready")]

    def _told_workers(self) -> list[Child]:
        """Also those that drain; not those that have not said hello, since their first message is the welcome."""
        return [c for c in self.children.values() if c.role == "worker" and c.state != "started"]

    def _to_brain(self, op: str, **fields: Any) -> None:
        for child in self.children.values():
            if child.role == "brain" and child.state in ("syncing", "ready"):
                self._send(child, op, **fields)

    # -- access log ---------------------------------------------------------------------------------

    def _open_access_log(self) -> bool:
        """Also anew. When that fails, what is open stays in use."""
        path = self.settings.access_log
        try:
            fd = open_target(path)
        except OSError as exc:
            self.access_error = f"{path}: {exc.strerror}"
            _log(f"access log: {self.access_error}", ERROR)
            return False
        self.access_error = ""
        if self.access_fd >= 0:
            os.close(self.access_fd)
        self.access_fd = fd
        for worker in self._told_workers():
            self._send(worker, "access_log", (fd,))
        return True

    # -- workloads ----------------------------------------------------------------------------------

    def _listen(self, worker: Child, key: str, item: Attached) -> None:
        if worker.slot not in item.listeners:
            try:
                self.attachments.listen(item, worker.slot)
            except OSError as exc:
                _log(f"listeners of {key} for worker {worker.slot}: {exc}", ERROR)
                return
            if item.is_handed_out:
                self._to_brain("resteer", body=json.dumps([key]).encode())
        sockets = item.listeners[worker.slot]
        self._send(
            worker,
            "listen",
            [fd for _, _, fd in sockets],
            workload=key,
            sockets=[[kind, fam] for kind, fam, _ in sockets],
            dial=item.spec.get("dial_families", item.spec["families"]),  # a brain of before an upgrade sends none
        )

    def _detach(self, key: str) -> None:
        item = self.attachments.by_key.get(key)
        if item is None:
            return
        if item.request >= 0:
            self._to_brain("attach", id=item.request, workload=key, error="detached")
        for worker in self._told_workers():
            self._send(worker, "unlisten", workload=key)
        self.attachments.remove(key)

    # -- stop ---------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self.stopping or self.stop_by:
                for child in list(self.children.values()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)
                self.stopping = "done"
                return
            _log("stopping")
            _notify("STOPPING=1")
            if self.attachments.by_key and not self._ready("brain", 0):
                # Only the brain can take the rules off and keep the hooks that established connections need.
                self.stop_by = time.monotonic() + _STOP_WAIT_S
            else:
                self._begin_stop()
        elif number == signal.SIGHUP:
            if self.settings.access_log != STDOUT and self._open_access_log():
                _log(f"access log: {self.settings.access_log} is open anew")
        elif number == signal.SIGUSR2 and not self.stopping and not self.stop_by:
            self._try_upgrade()

    def _begin_stop(self) -> None:
        self.stop_by = 0.0
        self.stopping = "unsteer"
        self.stop_deadline = time.monotonic() + 10.0
        brains = [c for c in self.children.values() if c.role == "brain" and c.state == "ready"]
        for child in brains:
            self._send(child, "stop")
        if not brains:
            self._after_unsteer(())

    def _after_unsteer(self, workloads: tuple[str, ...] | list[str]) -> None:
        """Rules of these are off; other ``open`` ones go now, since nobody will accept new connections any more.

        What was accepted or waits in a queue is still served, then the workers go.
        """
        disown(item for key, item in self.attachments.by_key.items() if key not in workloads)
        self.stopping = "drain"
        self.stop_deadline = time.monotonic() + self.settings.drain_s + 5.0
        workers = [c for c in self.children.values() if c.role == "worker"]
        for child in workers:
            child.state = "leaving"
            self._send(child, "drain", deadline_s=self.settings.drain_s)
        if not workers:
            self._after_drain()

    def _on_exit_stopping(self, child: Child) -> None:
        if child.role == "brain":
            if self.stopping == "unsteer":
                self._after_unsteer(())
            elif self.stopping == "finish":
                self.stopping = "done"
        elif self.stopping == "drain" and not any(c.role == "worker" for c in self.children.values()):
            self._after_drain()

    def _after_drain(self) -> None:
        self.stopping = "finish"
        self.attachments.close_listeners()
        disown(self.attachments.by_key.values())
        brains = [c for c in self.children.values() if c.role == "brain"]
        self.stop_deadline = time.monotonic() + 10.0
        for child in brains:
            self._send(child, "finish")
        if not brains:
            self.stopping = "done"

    # -- upgrade ------------------------------------------------------------------------------------

    def _try_upgrade(self) -> None:
        """Can the program that is installed now be loaded at all? After execve it is too late to ask."""
        if self._trying:
            _log("upgrade: one is being tried already", WARNING)
            return
        # The alarm also ends one that waits: for a file system, or to tell a stuck reader what is wrong.
        code = f"import signal; signal.alarm({_TRY_S}); import netproxy.supervisor, netproxy.brain, netproxy.worker"
        try:
            process = subprocess.Popen([*_PYTHON, "-c", code], stdin=subprocess.DEVNULL)
            self.selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, process)
        except OSError as exc:
            _log(f"upgrade: can't be tried: {exc}", ERROR)
            return
        self._trying = True

    def _on_tried(self, process: subprocess.Popen[bytes], pidfd: int) -> None:
        self._trying = False
        self.selector.unregister(pidfd)
        os.close(pidfd)
        if process.wait():
            _log("upgrade: refused, the program installed now can't be loaded; going on as before", ERROR)
        elif not self.stopping and not self.stop_by:
            self._upgrade()

    def _upgrade(self) -> None:
        """Execute the (possibly new) program in this very process; children and descriptors stay."""
        _log("upgrade: executing anew")
        state: dict[str, Any] = {
            "arena": self.arena_fd,
            "lock": self.lock_fd,
            "access_log": self.access_fd,
            "log_level": own_log.level(),
            "children": [
                [c.role, c.slot, c.pid, c.pidfd, c.channel.fileno(), c.state, c.region]
                for c in self.children.values()
                if c.channel.fileno() >= 0
            ],
            "attached": self.attachments.takeover(),
            "shards": [[key, version, body.decode()] for key, (version, body) in self.shards.items()],
        }
        for child in self.children.values():
            with contextlib.suppress(ChannelBroken):
                if child.channel.wants_write:
                    child.channel.sock.settimeout(1.0)
                    child.channel.flush()
        fd = memfd_with("netproxy-takeover", json.dumps(state).encode())
        for number in _descriptors(state) | {fd}:
            os.set_inheritable(number, True)
        env = {**os.environ, _TAKEOVER: str(fd)}
        # Until the new program has its handlers, a signal would end it: they wait, the mask outlives execve.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            os.execve(sys.executable, [*_PYTHON, "-m", "netproxy.supervisor", self.settings.to_json()], env)
        except OSError as exc:
            _log(f"upgrade failed, going on as before: {exc}", ERROR)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(fd)
            for number in _descriptors(state):
                os.set_inheritable(number, False)
            drop_duplicates(state["attached"])

    def _resume(self) -> bool:
        text = os.environ.pop(_TAKEOVER, "")
        if not text:
            return False
        fd = int(text)
        state = json.loads(read_memfd(fd))
        os.close(fd)
        for number in _descriptors(state):
            os.set_inheritable(number, False)
        self.arena_fd = state["arena"]
        self.lock_fd = state["lock"]
        own_log.set_level(state.get("log_level", self.settings.log_level))
        self.access_fd = state.get("access_log", -1)
        if self.access_fd < 0:
            self._open_access_log()
        self.attachments.take_over(state["attached"])
        self.shards = {key: (version, body.encode()) for key, version, body in state["shards"]}
        for role, slot, pid, pidfd, channel_fd, child_state, region in state["children"]:
            channel = Channel(socket.socket(fileno=channel_fd))
            self._adopt(Child(role, slot, pid, pidfd, channel, time.monotonic(), child_state, region))
            self.upgrade_queue.append(pid)
        _log(f"upgrade: took {len(self.children)} children and {len(self.attachments.by_key)} workloads over")
        self._next_upgrade()
        return True

    def _next_upgrade(self) -> None:
        """Replace the next child. A worker drains when the new one is ready; two brains never run at once."""
        while self.upgrade_queue and not self.stopping:
            pid = self.upgrade_queue.pop(0)
            old = self.children.get(pid)
            if old is None or old.state == "leaving":
                continue
            if old.role == "worker" and self._free_region(old.slot) < 0:
                # Its predecessor of an upgrade before this one still drains; its end brings us back here.
                self.upgrade_queue.insert(0, pid)
                return
            if old.role == "brain":
                old.dismissed = True
                self._send(old, "leave")
            else:
                self._start(old.role, old.slot, replaces=pid)
            return


def _descriptors(state: dict[str, Any]) -> set[int]:
    out = {state["arena"], state["lock"]}
    if state.get("access_log", -1) >= 0:
        out.add(state["access_log"])
    for _, _, _, pidfd, channel_fd, *_ in state["children"]:
        out |= {pidfd, channel_fd}
    return out | descriptors(state["attached"])


def _notify(state: str) -> None:
    """sd_notify(3); does nothing outside systemd."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def main() -> int:
    return Supervisor(NodeSettings.from_json(sys.argv[1])).run()


if __name__ == "__main__":
    sys.exit(main())
