"""The brain of a node: configuration, identities, steering, admin. May die; traffic goes on without it.

What it finds at its start is taken over: shards that the supervisor already holds are not sent again,
workloads that are attached and steered as they should be are left alone. One loop compares what should be
with what is, so a start, a restart, a new namespace and a repaired one are the same thing::

    absent --namespace appears--> attaching --listeners are there--> steering --rules are there--> steered
       ^_____________ namespace gone, workload removed (rules off first) ______________________________|

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from redirect import Ports, RedirectError, Steering, families, remove, steer
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
_FAMILIES_S = 5.0


@dataclass
class Pod:
    """One local workload and how far it is."""

    want: LocalWorkload
    state: str = "absent"
    detail: str = "the namespace does not exist yet"
    netns_fd: int = -1
    ns_id: tuple[int, int] = (0, 0)
    families: frozenset[int] = frozenset()
    policy: str = ""
    vip_cidrs: tuple[str, ...] = ()
    retry_at: float = 0.0
    since: float = 0.0
    generation: int = 0

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
        self.svids: dict[str, SvidShard] = {}
        self.identity_error = ""
        self._channel: Channel = joined.channel
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._versions: dict[str, str] = {}
        self._renew: dict[str, float] = {}
        self._retry_identities = 0.0
        self._fingerprint: object = None
        self._took_over = False
        self._loader = Loader(self.settings.config, os.path.join(self.settings.state_dir, "last-good.json"))
        self._ca: CertificateAuthority | None = None
        self._store = SvidStore(os.path.join(self.settings.state_dir, "svid"))
        self._journal = Journal(self.settings.journal, self.settings.node)
        self._rng = random.Random()
        # Steering and files block; one thread keeps calls for one namespace in order.
        self._executor = ThreadPoolExecutor(1, "steering")
        self._reader = ThreadPoolExecutor(1, "config")
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

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        task.add_done_callback(self._spawned)

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
        os.makedirs(self.settings.state_dir, mode=0o700, exist_ok=True)
        await self._configure()
        await self._reconcile()
        self._send("ready")
        self.children = await self._ask("state")
        next_poll = time.monotonic() + self.settings.poll_s
        next_families = time.monotonic() + _FAMILIES_S
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
            if time.monotonic() >= next_families:
                next_families = time.monotonic() + _FAMILIES_S
                await self._check_families()
            await self._reconcile()
        self._idle.set()

    # -- configuration ------------------------------------------------------------------------------

    async def _configure(self) -> None:
        """Read the files if they changed; a folder that can't be read leaves the old snapshot in force."""
        try:
            seen = await self._loop.run_in_executor(self._reader, source.fingerprint, self.settings.config)
            if seen == self._fingerprint:
                self.config_error = ""  # a folder that went away is back as it was
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
        with open(f"{self._vip_file}.new", "w") as file:
            json.dump({key: list(value) for key, value in snapshot.vips.items()}, file)
        os.replace(f"{self._vip_file}.new", self._vip_file)

    # -- identities ---------------------------------------------------------------------------------

    def _authority(self, trust_domain: str) -> CertificateAuthority:
        if self._ca is None or self._ca.trust_domain != trust_domain:
            self._ca = CertificateAuthority.open(self.settings.ca_dir, trust_domain, now=time.time())
        return self._ca

    async def _identities(self, snapshot: Snapshot) -> None:
        """An SVID for every local identity: from the store while it is good, else issued."""
        wanted = {item.identity for item in snapshot.local_workloads}
        mesh = snapshot.shards["mesh"]
        assert isinstance(mesh, MeshShard)
        try:
            for identity in wanted - set(self.svids):
                self._install(await self._loop.run_in_executor(self._reader, self._obtain, identity, mesh.trust_domain))
            self.identity_error = ""
        except (IdentityError, OSError) as exc:
            self._identity_failed(exc)
        for gone in set(self.svids) - wanted:
            del self.svids[gone]
            self._renew.pop(gone, None)

    def _obtain(self, identity: SpiffeId, trust_domain: str) -> SvidShard:
        authority = self._authority(trust_domain)
        now = time.time()
        kept = self._store.load(identity, now=now, bundle_pem=authority.bundle_pem)
        return kept if kept is not None else self._issue(identity, trust_domain)

    def _issue(self, identity: SpiffeId, trust_domain: str) -> SvidShard:
        svid = issue_svid(self._authority(trust_domain), identity, now=time.time())
        self._store.save(svid)
        return svid

    def _install(self, svid: SvidShard) -> None:
        self.svids[svid.identity] = svid
        self._renew[svid.identity] = renew_at(svid, self._rng)

    def _identity_failed(self, exc: Exception) -> None:
        if str(exc) != self.identity_error:
            _log(f"identity: {exc}")
        self.identity_error = str(exc)

    async def _renew_svids(self) -> None:
        now = time.time()
        due = [identity for identity, at in self._renew.items() if at <= now]
        if self.snapshot is None:
            return
        missing = [item.identity for item in self.snapshot.local_workloads if item.identity not in self.svids]
        if missing and now < self._retry_identities:
            missing = []
        if not due and not missing:
            return
        mesh = self.snapshot.shards["mesh"]
        assert isinstance(mesh, MeshShard)
        try:
            for identity in {*due, *missing}:
                self._install(
                    await self._loop.run_in_executor(self._reader, self._issue, SpiffeId(identity), mesh.trust_domain)
                )
                _log(f"renewed the certificate of {identity}")
            self.identity_error = ""
        except (IdentityError, OSError) as exc:
            self._identity_failed(exc)
            self._retry_identities = now + 10 * _RETRY_S
            for identity in due:
                self._renew[identity] = now + 60 * (1 + self._rng.random())
        self._publish(self.snapshot)

    # -- workloads ----------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        # Those that went first: what we hold keeps their veth alive.
        for pod in list(self.pods.values()):
            if pod.netns_fd >= 0 and _ns_of(pod.want.netns) != pod.ns_id:
                await self._lost(pod)
        for pod in list(self.pods.values()):
            if self._stopping:
                return
            if pod.state == "steered" and (pod.policy != pod.want.failure_policy or pod.vip_cidrs != self._vips()):
                pod.set("attaching", "its configuration changed")
            if pod.state != "steered" and time.monotonic() >= pod.retry_at:
                await self._bring_up(pod)

    def _vips(self) -> tuple[str, ...]:
        return tuple(self.snapshot.vip_networks) if self.snapshot is not None else ()

    async def _bring_up(self, pod: Pod) -> None:
        key = _key(pod)
        try:
            if pod.netns_fd < 0:
                if not os.path.exists(pod.want.netns):
                    pod.set("absent", f"{pod.want.netns} does not exist yet")
                    return
                pod.netns_fd = await self._loop.run_in_executor(self._executor, open_netns, pod.want.netns)
                stat = os.fstat(pod.netns_fd)
                pod.ns_id = (stat.st_dev, stat.st_ino)
            if SpiffeId(pod.want.identity) not in self.svids:
                raise IdentityError(f"no certificate yet: {self.identity_error}")
            pod.families = await self._families(pod)
            await self._attach(pod)
            await self._steer(pod, enabled=True)
            pod.set("steered")
            _log(f"{key}: steered, families {sorted(pod.families)}, failure policy {pod.policy}")
        except (RedirectError, NetproxyError, OSError) as exc:
            if pod.detail != str(exc):
                _log(f"{key}: {exc}")
            pod.set("failed", str(exc))
            pod.retry_at = time.monotonic() + _RETRY_S
            if _ns_of(pod.want.netns) != pod.ns_id:
                await self._lost(pod)

    async def _families(self, pod: Pod) -> frozenset[int]:
        """Those it has, and those it is declared to have: its addresses may come one by one, after us."""
        found: frozenset[int] = await self._loop.run_in_executor(self._executor, families, pod.netns_fd)
        return found | {6 if ":" in address else 4 for address in pod.want.addresses}

    async def _check_families(self) -> None:
        """A namespace that got an address of another family later is steered for it too."""
        for pod in list(self.pods.values()):
            if pod.state == "steered":
                with contextlib.suppress(RedirectError, OSError):
                    if not await self._families(pod) <= pod.families:
                        pod.set("attaching", "it has an address of a new family")

    async def _attach(self, pod: Pod) -> None:
        """Listeners, before any rule."""
        key = _key(pod)
        pod.set("attaching", "waiting for listeners")
        self._journal.add(key, {"netns": pod.want.netns, "dev": pod.ns_id[0], "ino": pod.ns_id[1]})
        reply = await self._ask(
            "attach",
            (pod.netns_fd,),
            workload=key,
            families=sorted(pod.families),
            outbound_port=self.settings.outbound_port,
            inbound_port=self.settings.inbound_port,
            policy=pod.want.failure_policy,
        )
        if reply["error"]:
            raise RedirectError(reply["error"])

    async def _steer(self, pod: Pod, *, enabled: bool) -> None:
        """Put the rules there (`enabled`), or only the hooks that established connections need."""
        key = _key(pod)
        pod.set("steering", "putting the rules there")
        desired = self._steering(pod, enabled=enabled)
        applied = await self._loop.run_in_executor(self._executor, steer, pod.netns_fd, desired, None)
        if applied.owner_fd is not None:
            self._send("own", (applied.owner_fd,), workload=key, generation=applied.generation)
            os.close(applied.owner_fd)
        elif not desired.owned:
            # Plain rules are in force; an owned table of before, if any, goes with its owner.
            self._send("own", workload=key, generation=applied.generation)
        pod.generation = applied.generation
        pod.policy = pod.want.failure_policy
        pod.vip_cidrs = self._vips()

    def _steering(self, pod: Pod, *, enabled: bool) -> Steering:
        settings = self.settings
        return Steering(
            node=settings.node,
            families=frozenset(4 if f == 4 else 6 for f in pod.families),
            failure_policy="closed" if pod.want.failure_policy == "closed" else "open",
            ports=Ports(outbound=settings.outbound_port, inbound=settings.inbound_port),
            mark=settings.mark,
            mask=settings.mark_mask,
            vip_cidrs=self._vips(),
            enabled=enabled,
        )

    async def _lost(self, pod: Pod) -> None:
        """The namespace was deleted or replaced. Everything of ours in it must be closed, at once."""
        key = _key(pod)
        self._send("detach", workload=key)
        if pod.netns_fd >= 0:
            os.close(pod.netns_fd)
        pod.netns_fd, pod.ns_id, pod.generation, pod.retry_at = -1, (0, 0), 0, 0.0
        if pod.state != "absent":
            _log(f"{key}: its namespace is gone")
        pod.set("absent", f"{pod.want.netns} was deleted")
        self._journal.remove(key)

    async def _release(self, pod: Pod) -> None:
        """No longer wanted: rules off, then listeners, then the rest."""
        key = _key(pod)
        if pod.netns_fd < 0:
            return
        with contextlib.suppress(RedirectError, OSError):
            await self._loop.run_in_executor(self._executor, remove, pod.netns_fd, self.settings.node)
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
        done = []
        for pod in self.pods.values():
            if pod.netns_fd >= 0 and pod.generation and pod.policy == "open":
                try:
                    await self._steer(pod, enabled=False)
                    pod.set("draining")
                    done.append(_key(pod))
                except (RedirectError, OSError) as exc:
                    _log(f"{_key(pod)}: {exc}")
        self._send("unsteered", body=json.dumps(done).encode())

    async def _finish(self) -> None:
        """Workers are gone and owner sockets closed: remove routes. Where the policy is closed all stays."""
        for pod in self.pods.values():
            if pod.netns_fd >= 0 and pod.policy != "closed":
                try:
                    await self._loop.run_in_executor(self._executor, remove, pod.netns_fd, self.settings.node)
                    self._journal.remove(_key(pod))
                except (RedirectError, OSError) as exc:
                    _log(f"{_key(pod)}: {exc}")
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
        )

    def healthy(self) -> tuple[bool, str]:
        """For /healthz: is traffic served, and is the configuration in force?"""
        workers = [c for c in self.children.get("children", []) if c["role"] == "worker" and c["state"] == "ready"]
        if self._stopping:
            return False, "stopping"
        if not workers:
            return False, "no worker is ready"
        if self.snapshot is None:
            return False, f"no configuration: {self.config_error}"
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
                    "families": sorted(pod.families),
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
    admin = Admin(brain, joined.settings)
    await admin.start()
    brain._spawn(brain.run())
    try:
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
