"""The brain of a node: configuration, identities, steering, admin. May die; traffic goes on without it.

What it finds at its start is taken over: shards that the supervisor already holds are not sent again,
workloads that are attached and steered as they should be are left alone. One loop compares what should be
with what is, so a start, a restart, a new namespace and a repaired one are the same thing::

    absent --namespace appears--> attaching --listeners are there--> steering --rules are there--> steered
       ^_____________ namespace gone, workload removed (rules off first) ______________________________|

What goes wrong on the way leads to ``failed``, which is tried again; under failure policy ``closed`` the rules are put
there even so, and refuse what has no listener. Steered ones are looked at again and again: rules that somebody flushed
are put back, and counted.

Order: SVIDs and shards before listeners, listeners before rules; rules off before listeners.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redirect import Ports, RedirectError, Steering, dialable, reachable, remove, steer
from redirect.netns import open_netns

from .addr import ServiceKey, SpiffeId
from .admin import Admin
from .arena import ArenaReader
from .channel import Channel, ChannelBroken, Message
from .child import Joined, join
from .config import source
from .config.load import Loader
from .config.shard import MeshShard, ServiceShard, Shard, SvidShard, encode_shard
from .config.snapshot import Context, LocalWorkload, Snapshot
from .errors import ConfigError, IdentityError, NetproxyError
from .identity.ca import CertificateAuthority
from .identity.svid import SvidStore, issue_svid, renew_at
from .journal import Journal
from .observe.metrics import Condition
from .settings import REGIONS_PER_WORKER

_RECONCILE_S = 0.2
"""A deleted namespace is noticed within this; its veth stays until we let go."""
_REPLY_TIMEOUT_S = 15.0
_RETRY_S = 0.5
_CHECK_S = 2.0
"""Between two looks at what is steered; a look that finds nothing costs 6 to 8 ms."""
_CHECKS_AT_ONCE = 4
"""In a turn of `_RECONCILE_S`, so at most 160 ms in each second: more than 40 workloads are looked at less often."""
_BRING_UPS = 32
"""Workloads that wait for their listeners at the same time: each may wait for a worker that does not answer."""
_THREADS = 8
"""Calls into namespaces at the same time. libnftables itself does one command at a time."""
_CA_TIMEOUT_S = 3.0
"""A CA on a file system that does not answer must not stop the brain; it is opened in a thread of its own."""
_AGAIN_S = 5.0
"""Between two looks at a CA or a state disk that failed."""
_CA = SpiffeId("")
"""Key of the CA's own error among those of the identities."""

_T = TypeVar("_T")


class _Superseded(Exception):
    """What was begun for a workload is no longer wanted: its namespace went, or we stop."""


@dataclass(eq=False)
class Pod:
    """One local workload and how far it is."""

    want: LocalWorkload
    state: str = "absent"
    detail: str = "the namespace does not exist yet"
    netns_fd: int = -1
    ns_id: tuple[int, int] = (0, 0)
    families: frozenset[int] = frozenset()
    """To steer; `dial_families` are those it has, or is declared to have, addresses of."""
    dial_families: frozenset[int] = frozenset()
    policy: str = ""
    """Of the rules that are in force."""
    vip_cidrs: tuple[str, ...] = ()
    retry_at: float = 0.0
    since: float = 0.0
    generation: int = 0
    check_at: float = 0.0
    repairs: int = 0
    failure: str = ""
    """Of the last attempt, until one succeeds: `state` goes through the others while it is tried again."""
    task: asyncio.Task[None] | None = None
    epoch: int = 0
    """Counts decisions that make void what was begun before."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def set(self, state: str, detail: str = "") -> None:
        if state != self.state:
            self.since = time.time()
        self.state, self.detail = state, detail


class Brain:
    def __init__(self, joined: Joined) -> None:
        self.settings = joined.settings
        self.arena = ArenaReader(joined.arena_fd, REGIONS_PER_WORKER * joined.settings.workers)
        self.snapshot: Snapshot | None = None
        self.config_error = ""
        self.applied_at = time.time()
        self.pods: dict[str, Pod] = {}
        self.svids: dict[SpiffeId, SvidShard] = {}
        self._identity_errors: dict[SpiffeId, str] = {}
        self._state_errors: dict[str, str] = {}
        self._channel: Channel = joined.channel
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._versions: dict[str, str] = {}
        self._renew: dict[SpiffeId, float] = {}
        self._retry_identities = 0.0
        self._retry_state = 0.0
        self._unchecked: set[SpiffeId] = set()
        self._unsaved: set[SpiffeId] = set()
        self._fingerprint: object = None
        self._took_over = False
        self._loader = Loader(self.settings.config, os.path.join(self.settings.state_dir, "last-good.json"))
        self._ca: CertificateAuthority | None = None
        self._opening: asyncio.Future[CertificateAuthority] | None = None
        self._store = SvidStore(os.path.join(self.settings.state_dir, "svid"))
        self._journal = Journal(self.settings.journal, self.settings.node)
        self._rng = random.Random()
        # Steering and files block.
        self._executor = ThreadPoolExecutor(_THREADS, "steering")
        self._calls = asyncio.Semaphore(_THREADS)
        self._bring_ups = asyncio.Semaphore(_BRING_UPS)
        self._reader = ThreadPoolExecutor(1, "config")
        self._opener = ThreadPoolExecutor(1, "ca")
        self._wake = asyncio.Event()
        self._synced = asyncio.Event()
        self._stopping = False
        self._idle = asyncio.Event()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self.children: dict[str, Any] = {}

    # -- messages -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop.add_reader(self._channel.fileno(), self._on_channel)

    def _on_channel(self) -> None:
        try:
            for _ in range(64):
                message = self._channel.receive()
                if message is None:
                    return
                self._on_message(message)
        except ChannelBroken:
            os._exit(1)

    def _on_message(self, message: Message) -> None:
        fields = message.fields
        match message.op:
            case "synced":
                self._synced.set()
            case "attach" | "state":
                reply = self._replies.pop(fields["id"], None)
                if reply is not None and not reply.done():
                    reply.set_result(json.loads(message.body) if message.op == "state" else fields)
            case "resteer":
                for pod in [self.pods[key] for key in json.loads(message.body) if key in self.pods]:
                    pod.retry_at = 0.0
                    if fields.get("released"):
                        # A table that we handed over while this was under way would steer to nobody.
                        self._send("own", workload=_key(pod), generation=0)
                    if pod.state == "steered":
                        pod.set("attaching", "steering was released while no worker ran")
                self._wake.set()
            case "stop":
                self._spawn(self._stop())
            case "finish":
                self._spawn(self._finish())
            case "leave":
                self._end(0)
            case other:
                _log(f"unknown message {other!r}")

    def _send(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> None:
        try:
            self._channel.send(op, fds, **fields)
        except ChannelBroken:
            os._exit(1)
        if self._channel.wants_write:
            self._loop.add_writer(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        self._channel.flush()
        if not self._channel.wants_write:
            self._loop.remove_writer(self._channel.fileno())

    async def _ask(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
        number = next(self._ids)
        reply: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._replies[number] = reply
        self._send(op, fds, id=number, **fields)
        try:
            async with asyncio.timeout(_REPLY_TIMEOUT_S):
                return await reply
        finally:
            self._replies.pop(number, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            traceback.print_exception(task.exception())
            self._end(1)

    def _end(self, code: int) -> None:
        if not self.ended.done():
            self.ended.set_result(code)

    # -- main ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._synced.wait()
        self.children = await self._ask("state")
        self._versions = dict(self.children["shards"])
        try:
            os.makedirs(self.settings.state_dir, mode=0o700, exist_ok=True)
        except OSError as exc:
            self._state("folder", exc)
        self._spawn(self._watch())
        await self._configure()
        self._reconcile()
        await self._begun()
        self._send("ready")
        self.children = await self._ask("state")
        next_poll = time.monotonic() + self.settings.poll_s
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RECONCILE_S):
                    await self._wake.wait()
            self._wake.clear()
            if self._stopping:
                break
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self.settings.poll_s
                await self._configure()
                self.children = await self._ask("state")
            await self._renew_svids()
            self._reconcile()
        self._idle.set()

    # -- configuration ------------------------------------------------------------------------------

    async def _configure(self) -> None:
        """Read the files if they changed; a folder that can't be read leaves the old snapshot in force."""
        try:
            seen = await self._loop.run_in_executor(self._reader, source.fingerprint, self.settings.config)
            if seen == self._fingerprint:
                self.config_error = ""  # a folder that went away is back as it was
                await self._save_again()
                return
            context = Context(self.settings.node, vips=self._known_vips())
            snapshot = await self._loop.run_in_executor(self._reader, self._loader.load, context)
        except ConfigError as exc:
            if str(exc) != self.config_error:
                _log(f"configuration: {exc}; what was in force stays")
            self.config_error = str(exc)
            return
        self._fingerprint = seen
        self.config_error = ""
        for error in snapshot.rejected:
            _log(f"rejected: {error}")
        self.snapshot = snapshot
        self.applied_at = time.time()
        self._state("last-good", self._loader.memory_error)
        self._save_vips(snapshot)
        await self._identities(snapshot)
        self._publish(snapshot)
        wanted = {f"{item.namespace}/{item.name}": item for item in snapshot.local_workloads}
        for key, pod in list(self.pods.items()):
            if key not in wanted or wanted[key].netns != pod.want.netns:
                await self._release(pod)
                del self.pods[key]
        for key, item in wanted.items():
            if key in self.pods:
                self.pods[key].want = item
            else:
                self.pods[key] = Pod(item)
        if not self._took_over:
            self._took_over = True
            await self._take_over()

    async def _take_over(self) -> None:
        """Let go what predecessors left that is not wanted any more, or whose namespace went while no brain looked.

        Only when there is a configuration: without one, what is steered stays so.
        """
        left: dict[str, Any] = {**self._journal.entries, **self.children["attached"]}
        for key, place in left.items():
            pod = self.pods.get(key)
            if pod is None or _ns_of(pod.want.netns) != (place["dev"], place["ino"]):
                await self._forget(key)

    def _publish(self, snapshot: Snapshot) -> None:
        """Send what changed. What is new goes first, so that nobody learns of a route before its backend."""
        shards: dict[str, Shard] = dict(snapshot.shards)
        shards |= {shard.key(): shard for shard in self.svids.values()}
        encoded = {key: encode_shard(shard) for key, shard in shards.items()}
        versions = {key: hashlib.sha256(data).hexdigest()[:16] for key, data in encoded.items()}
        for key in {f"svid/{item.identity}" for item in snapshot.local_workloads} - set(versions):
            # We have none, the supervisor has: what workers use now is better than nothing.
            if key in self._versions:
                versions[key] = self._versions[key]
        changed = [key for key, version in versions.items() if self._versions.get(key) != version]
        order = {"mesh": 0, "svid": 1, "workload": 2, "service": 3}
        changed.sort(key=lambda key: (order[key.partition("/")[0]], key in self._versions, key))
        for key in changed:
            self._send("put", key=key, version=versions[key], body=encoded[key])
        for key in set(self._versions) - set(versions):
            self._send("drop", key=key)
        self._versions = versions

    @property
    def _vip_file(self) -> str:
        return os.path.join(self.settings.state_dir, "vips.json")

    def _known_vips(self) -> dict[ServiceKey, tuple[str, ...]]:
        if self.snapshot is not None:
            return dict(self.snapshot.vips)
        with contextlib.suppress(OSError, ValueError), open(self._vip_file) as file:
            return {ServiceKey(key): tuple(value) for key, value in json.load(file).items()}
        return {}

    def _save_vips(self, snapshot: Snapshot) -> None:
        try:
            with open(f"{self._vip_file}.new", "w") as file:
                json.dump({key: list(value) for key, value in snapshot.vips.items()}, file)
            os.replace(f"{self._vip_file}.new", self._vip_file)
        except OSError as exc:
            self._state("vips", exc)
        else:
            self._state("vips")

    # -- the state folder: without it we go on, and forget at a restart what could not be written --------

    @property
    def state_error(self) -> str:
        return _in_short(self._state_errors.values())

    def _state(self, what: str, failed: OSError | None = None) -> None:
        """`what` could be written, or failed. Logged when that changes."""
        if failed is None:
            if self._state_errors.pop(what, "") and not self._state_errors:
                _log("state: it can be written again")
        elif self._state_errors.get(what) != str(failed):
            self._state_errors[what] = str(failed)
            _log(f"state: {failed}; goes on without")

    async def _save_again(self) -> None:
        """What could not be written while the disk was full or read-only."""
        if not self._state_errors or self.snapshot is None or time.monotonic() < self._retry_state:
            return
        self._retry_state = time.monotonic() + _AGAIN_S
        try:
            os.makedirs(self.settings.state_dir, mode=0o700, exist_ok=True)
        except OSError:
            return
        self._state("folder")
        self._save_vips(self.snapshot)
        await self._loop.run_in_executor(self._reader, self._loader.save)
        self._state("last-good", self._loader.memory_error)
        for svid in [self.svids[identity] for identity in self._unsaved if identity in self.svids]:
            await self._loop.run_in_executor(self._reader, self._save_svid, svid)

    # -- identities ---------------------------------------------------------------------------------

    @property
    def identity_error(self) -> str:
        return _in_short(self._identity_errors.values())

    def _identity(self, identity: SpiffeId, failed: Exception | None = None) -> None:
        """`identity` (or the CA) is well, or failed. Logged when that changes."""
        if failed is None:
            self._identity_errors.pop(identity, None)
        elif self._identity_errors.get(identity) != str(failed):
            self._identity_errors[identity] = str(failed)
            _log(f"identity: {failed}")

    async def _authority(self, trust_domain: str) -> CertificateAuthority | None:
        """None when it can't be opened; `identity_error` says why."""
        try:
            if self._ca is None or self._ca.trust_domain != trust_domain:
                self._ca = None
                self._ca = await self._open_authority(trust_domain)
            self._identity(_CA)
        except (IdentityError, OSError) as exc:
            self._identity(_CA, exc)
        return self._ca

    async def _open_authority(self, trust_domain: str) -> CertificateAuthority:
        patience = 0.0  # one that is under way since the last look had its time
        if self._opening is None:
            patience = _CA_TIMEOUT_S
            self._opening = self._loop.run_in_executor(
                self._opener, lambda: CertificateAuthority.open(self.settings.ca_dir, trust_domain, now=time.time())
            )
        done, _ = await asyncio.wait({self._opening}, timeout=patience)
        if not done:
            raise IdentityError(f"{self.settings.ca_dir}: does not answer")
        opened, self._opening = self._opening, None
        authority = opened.result()
        return authority if authority.trust_domain == trust_domain else await self._open_authority(trust_domain)

    async def _identities(self, snapshot: Snapshot) -> None:
        """An SVID for every local identity: from the store while it is good, else issued."""
        wanted = {item.identity for item in snapshot.local_workloads}
        for gone in {*self.svids, *self._identity_errors} - wanted - {_CA}:
            self.svids.pop(gone, None)
            self._renew.pop(gone, None)
            self._identity_errors.pop(gone, None)
        self._unchecked &= wanted
        self._unsaved &= wanted
        await self._provide(wanted - set(self.svids), snapshot)

    async def _provide(self, identities: Iterable[SpiffeId], snapshot: Snapshot, *, renew: bool = False) -> bool:
        """SVIDs for `identities`, each by itself; is there a new one?

        While the CA can't be opened: from the store as they are, and looked at again when it can (`_unchecked`).
        """
        pending = sorted(identities)
        if not pending:
            return False
        mesh = snapshot.shards["mesh"]
        assert isinstance(mesh, MeshShard)
        authority = await self._authority(mesh.trust_domain)
        if authority is None:
            self._retry_identities = time.time() + _AGAIN_S
            pending = [identity for identity in pending if identity not in self.svids]
        installed = False
        for identity in pending:
            try:
                svid = await self._loop.run_in_executor(
                    self._reader, lambda who: self._obtain(who, authority, renew=renew), identity
                )
            except (IdentityError, OSError) as exc:
                self._identity(identity, exc)
                self._retry_identities = time.time() + _AGAIN_S
                continue
            self._identity(identity)
            if svid is None:
                continue
            installed = True
            self.svids[identity] = svid
            self._renew[identity] = renew_at(svid, self._rng)
            if authority is None:
                self._unchecked.add(identity)
            else:
                self._unchecked.discard(identity)
            if renew:
                _log(f"renewed the certificate of {identity}")
        return installed

    def _obtain(self, identity: SpiffeId, authority: CertificateAuthority | None, *, renew: bool) -> SvidShard | None:
        """None: there is none, and nobody to issue it. Raises IdentityError. Blocks on files."""
        now = time.time()
        if not renew:
            try:
                kept = self._store.load(
                    identity, now=now, bundle_pem=authority.bundle_pem if authority else None, due=authority is None
                )
                if kept is not None:
                    return kept
            except IdentityError as exc:
                if authority is None:
                    raise
                _log(f"identity: {exc}; a new certificate takes its place")
        if authority is None:
            return None
        svid = issue_svid(authority, identity, now=now)
        self._save_svid(svid)
        return svid

    def _save_svid(self, svid: SvidShard) -> None:
        try:
            self._store.save(svid)
        except OSError as exc:
            self._unsaved.add(svid.identity)
            self._state("svid", exc)
        else:
            self._unsaved.discard(svid.identity)
            if not self._unsaved:
                self._state("svid")

    async def _renew_svids(self) -> None:
        if self.snapshot is None:
            return
        now = time.time()
        due = {identity for identity, at in self._renew.items() if at <= now}
        lacking = {item.identity for item in self.snapshot.local_workloads} - set(self.svids) | self._unchecked
        if now < self._retry_identities:
            lacking = set()
        new = await self._provide(lacking - due, self.snapshot)
        new |= await self._provide(due, self.snapshot, renew=True)
        for identity in due:
            if self._renew[identity] <= now:  # not renewed
                self._renew[identity] = now + 60 * (1 + self._rng.random())
        if new:
            self._publish(self.snapshot)

    # -- workloads ----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Namespaces that went: what we hold keeps their veth alive. Waits for nobody, also during a drain."""
        while not self.ended.done():
            for pod in list(self.pods.values()):
                if pod.netns_fd >= 0 and _ns_of(pod.want.netns) != pod.ns_id:
                    self._lost(pod)
                    self._wake.set()
            await asyncio.sleep(_RECONCILE_S)

    def _reconcile(self) -> None:
        """Begin what is to be done. Each workload has a task of its own, at most one at a time."""
        now = time.monotonic()
        for pod in self.pods.values():
            if pod.state == "steered" and (pod.policy != pod.want.failure_policy or pod.vip_cidrs != self._vips()):
                pod.set("attaching", "its configuration changed")
        idle = [pod for pod in self.pods.values() if pod.task is None]
        for pod in idle:
            if pod.state != "steered" and now >= pod.retry_at:
                self._begin(pod, self._bring_up(pod, pod.epoch))
        due = [pod for pod in idle if pod.state == "steered" and now >= pod.check_at]
        for pod in sorted(due, key=lambda pod: pod.check_at)[:_CHECKS_AT_ONCE]:
            pod.check_at = now + _CHECK_S
            self._begin(pod, self._check(pod, pod.epoch))

    def _begin(self, pod: Pod, work: Coroutine[Any, Any, None]) -> None:
        def ended(_task: asyncio.Task[None]) -> None:
            pod.task = None

        pod.task = self._spawn(work)
        pod.task.add_done_callback(ended)

    async def _begun(self) -> None:
        """All that was begun until now has ended."""
        tasks = [pod.task for pod in self.pods.values() if pod.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    def _vips(self) -> tuple[str, ...]:
        return tuple(self.snapshot.vip_networks) if self.snapshot is not None else ()

    async def _inside(self, pod: Pod, epoch: int, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call `function` of `redirect` on the pod's namespace in a thread. One call at a time for each namespace.

        Raises `_Superseded` instead when meanwhile the namespace went, or others decide about it.
        """
        async with pod.lock, self._calls:
            if pod.epoch != epoch or pod.netns_fd < 0:
                raise _Superseded
            # Its own descriptor: the pod's may be closed, and its number used again, while the thread is at work.
            fd = os.dup(pod.netns_fd)

            def call() -> _T:
                try:
                    return function(fd, *arguments)
                finally:
                    os.close(fd)

            return await self._loop.run_in_executor(self._executor, call)

    async def _bring_up(self, pod: Pod, epoch: int) -> None:
        key = _key(pod)
        try:
            if pod.netns_fd < 0 and not await self._open(pod, epoch):
                return
            async with self._bring_ups:
                pod.families, pod.dial_families = await self._families(pod, epoch)
                if f"svid/{pod.want.identity}" not in self._versions:
                    raise IdentityError(f"no certificate yet: {self.identity_error}")
                await self._attach(pod, epoch)
                await self._steer(pod, epoch, enabled=True)
            pod.set("steered")
            pod.failure = ""
            # Spread over time, so that those which came together are not looked at together.
            pod.check_at = time.monotonic() + _CHECK_S * (0.5 + self._rng.random())
            _log(f"{key}: steered, families {sorted(pod.dial_families)}, failure policy {pod.policy}")
        except _Superseded:
            return
        except (RedirectError, NetproxyError, OSError) as exc:
            if pod.epoch == epoch:
                await self._failed(pod, epoch, exc)

    async def _open(self, pod: Pod, epoch: int) -> bool:
        """False: it does not exist yet."""
        if not os.path.exists(pod.want.netns):
            pod.set("absent", f"{pod.want.netns} does not exist yet")
            return False
        fd = await self._loop.run_in_executor(self._executor, open_netns, pod.want.netns)
        if pod.epoch != epoch:
            os.close(fd)
            raise _Superseded
        stat = os.fstat(fd)
        pod.netns_fd, pod.ns_id = fd, (stat.st_dev, stat.st_ino)
        return True

    async def _failed(self, pod: Pod, epoch: int, exc: Exception) -> None:
        """Tried again soon. Until then nothing may pass that the policy does not let pass."""
        detail = str(exc) or type(exc).__name__
        try:
            if pod.netns_fd >= 0 and pod.want.failure_policy == "closed":
                await self._close(pod, epoch)
            elif pod.netns_fd >= 0 and pod.policy == "closed":
                # Its policy is open now, and only what we put there for the old one stands in its way.
                await self._inside(pod, epoch, remove, self.settings.node)
                pod.policy, pod.generation = "", 0
        except _Superseded:
            return
        except (RedirectError, OSError) as second:
            detail = f"{detail}; failure policy {pod.want.failure_policy}: {second}"
        if pod.epoch != epoch:
            return
        if pod.failure != detail:
            _log(f"{_key(pod)}: {detail}")
        pod.failure = detail
        pod.set("failed", detail)
        pod.retry_at = time.monotonic() + _RETRY_S

    async def _close(self, pod: Pod, epoch: int) -> None:
        """The rules of policy ``closed`` without anything behind them: they refuse what no listener takes."""
        self._journal_add(pod)
        pod.families, pod.dial_families = await self._families(pod, epoch)
        await self._steer(pod, epoch, enabled=True)

    async def _families(self, pod: Pod, epoch: int) -> tuple[frozenset[int], frozenset[int]]:
        """Those to steer, and those it can dial.

        Steered is whatever can arrive: a link-local address comes by itself, any other may come later. Dialled are
        those it has, and those it is declared to have: its addresses may come one by one, after us.
        """
        found: frozenset[int]
        steered: frozenset[int]
        found, steered = await self._inside(pod, epoch, lambda fd: (dialable(fd), reachable(fd)))
        declared = {6 if ":" in address else 4 for address in pod.want.addresses}
        return steered | found | declared, found | declared

    async def _check(self, pod: Pod, epoch: int) -> None:
        """Of a steered one: somebody may have flushed rules or routes, or added an address."""
        try:
            families, dial_families = await self._families(pod, epoch)
            if pod.state != "steered":
                return
            if not (families <= pod.families and dial_families <= pod.dial_families):
                pod.set("attaching", "it has an address of a new family")
            elif await self._steer(pod, epoch, enabled=True):
                pod.repairs += 1
                _log(f"{_key(pod)}: rules or routes were not as they should be, repaired")
        except _Superseded:
            return
        except (RedirectError, OSError) as exc:
            if pod.epoch == epoch:
                await self._failed(pod, epoch, exc)

    def _journal_add(self, pod: Pod) -> None:
        self._journal.add(_key(pod), {"netns": pod.want.netns, "dev": pod.ns_id[0], "ino": pod.ns_id[1]})

    async def _attach(self, pod: Pod, epoch: int) -> None:
        """Listeners, before any rule."""
        pod.set("attaching", "waiting for listeners")
        self._journal_add(pod)
        reply = await self._ask(
            "attach",
            (pod.netns_fd,),
            workload=_key(pod),
            families=sorted(pod.families),
            dial_families=sorted(pod.dial_families),
            outbound_port=self.settings.outbound_port,
            inbound_port=self.settings.inbound_port,
            policy=pod.want.failure_policy,
        )
        if pod.epoch != epoch:
            raise _Superseded
        if reply["error"]:
            raise RedirectError(reply["error"])
        pod.set("steering", "putting the rules there")

    async def _steer(self, pod: Pod, epoch: int, *, enabled: bool) -> bool:
        """Put the rules there (`enabled`), or only the hooks that established connections need. False: they were."""
        key = _key(pod)
        policy, vips = pod.want.failure_policy, self._vips()
        desired = self._steering(pod, policy, enabled=enabled)
        state = pod.state
        applied = await self._inside(pod, epoch, steer, desired, None)
        if applied.owner_fd is not None:
            try:
                # What another has decided meanwhile stands: a table that nobody owns goes at once.
                if pod.epoch != epoch or (state == "steered" and pod.state != state):
                    raise _Superseded
                self._send("own", (applied.owner_fd,), workload=key, generation=applied.generation)
            finally:
                os.close(applied.owner_fd)
        elif pod.epoch != epoch:
            raise _Superseded
        elif applied.changed and not desired.owned:
            # Plain rules are in force; an owned table of before, if any, goes with its owner.
            self._send("own", workload=key, generation=applied.generation)
        pod.generation, pod.policy, pod.vip_cidrs = applied.generation, policy, vips
        return applied.changed

    def _steering(self, pod: Pod, policy: str, *, enabled: bool) -> Steering:
        settings = self.settings
        return Steering(
            node=settings.node,
            families=frozenset(4 if f == 4 else 6 for f in pod.families),
            failure_policy="closed" if policy == "closed" else "open",
            ports=Ports(outbound=settings.outbound_port, inbound=settings.inbound_port),
            mark=settings.mark,
            mask=settings.mark_mask,
            # Without an address to dial from, a VIP shall stay unreachable: clients then take the other family's.
            vip_cidrs=tuple(cidr for cidr in self._vips() if (6 if ":" in cidr else 4) in pod.dial_families),
            enabled=enabled,
        )

    def _lost(self, pod: Pod) -> None:
        """The namespace was deleted or replaced. Everything of ours in it must be closed, at once."""
        key = _key(pod)
        pod.epoch += 1
        self._send("detach", workload=key)
        if pod.netns_fd >= 0:
            os.close(pod.netns_fd)
        pod.netns_fd, pod.ns_id, pod.generation, pod.retry_at, pod.policy = -1, (0, 0), 0, 0.0, ""
        if pod.state != "absent":
            _log(f"{key}: its namespace is gone")
        pod.set("absent", f"{pod.want.netns} was deleted")
        pod.failure = ""
        self._journal.remove(key)

    async def _release(self, pod: Pod) -> None:
        """No longer wanted: rules off, then listeners, then the rest."""
        key = _key(pod)
        pod.epoch += 1
        if pod.netns_fd < 0:
            return
        with contextlib.suppress(RedirectError, OSError, _Superseded):
            await self._inside(pod, pod.epoch, remove, self.settings.node)
        if pod.netns_fd < 0:
            return  # deleted meanwhile
        self._send("own", workload=key, generation=0)
        self._send("detach", workload=key)
        os.close(pod.netns_fd)
        pod.netns_fd = -1
        self._journal.remove(key)
        _log(f"{key}: released")

    async def _forget(self, key: str) -> None:
        entry = self._journal.entries.get(key)
        if entry is not None and _ns_of(entry["netns"]) == (entry["dev"], entry["ino"]):
            with contextlib.suppress(RedirectError, OSError):
                fd = await self._loop.run_in_executor(self._executor, open_netns, entry["netns"])
                try:
                    await self._loop.run_in_executor(self._executor, remove, fd, self.settings.node)
                finally:
                    os.close(fd)
        self._send("detach", workload=key)
        self._journal.remove(key)

    # -- stop ---------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Rules off where the policy is open; the hooks stay so that established connections live on."""
        self._stopping = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await self._idle.wait()
        done: list[str] = []

        async def unsteer(pod: Pod) -> None:
            pod.epoch += 1  # who waits for listeners steers no more
            if pod.netns_fd >= 0 and pod.generation and pod.policy == "open":
                try:
                    pod.set("draining")
                    await self._steer(pod, pod.epoch, enabled=False)
                    done.append(_key(pod))
                except _Superseded:
                    pass
                except (RedirectError, OSError) as exc:
                    _log(f"{_key(pod)}: {exc}")

        await asyncio.gather(*map(unsteer, self.pods.values()))
        self._send("unsteered", body=json.dumps(done).encode())

    async def _finish(self) -> None:
        """Workers are gone and owner sockets closed: remove routes. Where the policy is closed all stays."""

        async def clean(pod: Pod) -> None:
            if pod.netns_fd >= 0 and pod.policy != "closed":
                try:
                    await self._inside(pod, pod.epoch, remove, self.settings.node)
                    self._journal.remove(_key(pod))
                except _Superseded:
                    pass
                except (RedirectError, OSError) as exc:
                    _log(f"{_key(pod)}: {exc}")

        await asyncio.gather(*map(clean, self.pods.values()))
        self._end(0)

    # -- what others see ----------------------------------------------------------------------------

    def condition(self) -> Condition:
        return Condition(
            node=self.settings.node,
            steering={key: ("nftables", pod.want.failure_policy, pod.state) for key, pod in self.pods.items()},
            certificates={identity: svid.not_after for identity, svid in self.svids.items()},
            rejected=len(self.snapshot.rejected) if self.snapshot else 0,
            restarts=self.children.get("restarts", {}),
            processes={(c["role"], c["slot"]): c["state"] == "ready" for c in self.children.get("children", [])},
            config_ok=not self.config_error,
            config_age_s=time.time() - self.applied_at,
            repairs={key: pod.repairs for key, pod in self.pods.items()},
        )

    def healthy(self) -> tuple[bool, str]:
        """For /healthz: is traffic served, for every workload whose namespace exists, as configured?"""
        workers = [c for c in self.children.get("children", []) if c["role"] == "worker" and c["state"] == "ready"]
        if self._stopping:
            return False, "stopping"
        if not workers:
            return False, "no worker is ready"
        if self.snapshot is None:
            return False, f"no configuration: {self.config_error}"
        failed = [(key, pod.failure) for key, pod in sorted(self.pods.items()) if pod.failure]
        if failed:
            return False, f"{len(failed)} of {len(self.pods)} workloads failed, first {failed[0][0]}: {failed[0][1]}"
        return True, "ok"

    def status(self) -> dict[str, Any]:
        """For ``netproxy status``; see docs of the CLI."""
        snapshot = self.snapshot
        return {
            "node": self.settings.node,
            "healthy": self.healthy()[0],
            "detail": self.healthy()[1],
            "engine": {"http1": "reference (h11)"},
            "config": {
                "path": self.settings.config,
                "error": self.config_error,
                "age_s": round(time.time() - self.applied_at, 1),
                "shards": len(self._versions),
            },
            "processes": self.children.get("children", []),
            "supervisor_pid": self.children.get("pid"),
            "restarts": self.children.get("restarts", {}),
            "workloads": [
                {
                    "workload": key,
                    "state": pod.state,
                    "detail": pod.detail,
                    "steering": "nftables" if pod.state == "steered" else "none",
                    "failure_policy": pod.want.failure_policy,
                    "families": sorted(pod.dial_families),
                    "steered_families": sorted(pod.families),
                    "repairs": pod.repairs,
                    "addresses": list(pod.want.addresses),
                    "identity": pod.want.identity,
                    "certificate_not_after": self.svids[pod.want.identity].not_after
                    if pod.want.identity in self.svids
                    else None,
                    "netns": pod.want.netns,
                }
                for key, pod in sorted(self.pods.items())
            ],
            "identity_error": self.identity_error,
            "state_error": self.state_error,
            "services": [_service(s) for s in snapshot.shards.values() if isinstance(s, ServiceShard)]
            if snapshot
            else [],
            "last_good": list(snapshot.kept) if snapshot else [],
            "rejected": [str(error) for error in snapshot.rejected] if snapshot else [],
            "objects": [
                {
                    "object": status.obj,
                    "file": status.file,
                    "line": status.line,
                    "conditions": [
                        {"type": c.type, "status": c.status, "reason": c.reason, "message": c.message}
                        for c in status.conditions
                    ],
                }
                for status in snapshot.statuses.values()
            ]
            if snapshot
            else [],
        }


def _key(pod: Pod) -> str:
    return f"{pod.want.namespace}/{pod.want.name}"


def _service(shard: ServiceShard) -> dict[str, Any]:
    return {
        "service": f"{shard.namespace}/{shard.name}",
        "vips": list(shard.vips),
        "ports": [
            {
                "port": port.port,
                "protocol": port.protocol,
                "endpoints": len(port.endpoints),
                "ready": sum(endpoint.ready for endpoint in port.endpoints),
                "rules": None if port.rules is None else len(port.rules),
            }
            for port in shard.ports
        ],
    }


def _in_short(errors: Iterable[str]) -> str:
    """Each once, the first few of them."""
    different = list(dict.fromkeys(errors))
    more = [f"and {len(different) - 3} more"] if len(different) > 3 else []
    return "; ".join([*different[:3], *more])


def _ns_of(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (0, 0)
    return (stat.st_dev, stat.st_ino)


def _log(text: str) -> None:
    print(f"netproxy brain: {text}", file=sys.stderr, flush=True)


async def _run(joined: Joined) -> int:
    brain = Brain(joined)
    brain.start()
    brain._spawn(brain.run())
    admin = Admin(brain, joined.settings)
    try:
        await admin.start()
        return await brain.ended
    finally:
        await admin.stop()


def main() -> int:
    code = asyncio.run(_run(join("brain")))
    # Threads may be inside a blocking call; nothing of theirs is worth waiting for.
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
