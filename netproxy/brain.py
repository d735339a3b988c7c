"""The brain of a node: configuration, identities, steering, admin. May die; traffic goes on without it.

What it finds at its start is taken over: shards that the supervisor already holds are not sent again, workloads that
are attached and steered as they should be are left alone. `pods` has the life of a workload, `certificates` that of an
identity, `state` the folder that survives.

Order: SVIDs and shards before listeners, listeners before rules; rules off before listeners.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from . import __version__, compiled
from .addr import SpiffeId
from .admin import Admin
from .arena import ArenaReader
from .certificates import Certificates
from .channel import Channel, ChannelBroken, Message
from .child import Joined, join
from .codec import h1, h2
from .config import source
from .config.balanced import why_proxied
from .config.load import Loader
from .config.shard import ServiceShard, Shard, WorkloadShard, encode_shard
from .config.snapshot import Context, Snapshot
from .dump import config_dump, statuses
from .errors import ConfigError
from .log import WARNING, debug, debugging, level, log, log_exception, set_level
from .observe.metrics import Condition, access_lines
from .pods import RECONCILE_S, Pods
from .resolvers import Resolvers
from .settings import REGIONS_PER_WORKER
from .state import StateFolder

_REPLY_TIMEOUT_S = 15.0


class Brain:
    def __init__(self, joined: Joined) -> None:
        self.settings = joined.settings
        self.arena = ArenaReader(joined.arena_fd, REGIONS_PER_WORKER * joined.settings.workers)
        self.snapshot: Snapshot | None = None
        self.config_error = ""
        self.applied_at = time.time()
        self.wake = asyncio.Event()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._channel: Channel = joined.channel
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._versions: dict[str, str] = {}
        self._fingerprint: object = None
        self._took_over = False
        self._loader = Loader(self.settings.config, os.path.join(self.settings.state_dir, "last-good.json"))
        # Files block.
        self._reader = ThreadPoolExecutor(1, "config")
        self.state = StateFolder(self.settings.state_dir)
        self.certificates = Certificates(self.settings, self.state, self._reader)
        self.workloads = Pods(self.settings, self)
        self.resolvers = Resolvers(self.settings.dns_port, self.state.load("nameservers"))
        self._synced = asyncio.Event()
        self._stopping = False
        self._idle = asyncio.Event()
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
            case "listeners":
                reply = self._replies.pop(fields["id"], None)
                if reply is not None and not reply.done():
                    reply.set_result(fields | {"fds": message.fds})
                else:
                    for fd in message.fds:
                        os.close(fd)
            case "attach" | "state":
                reply = self._replies.pop(fields["id"], None)
                if reply is not None and not reply.done():
                    reply.set_result(json.loads(message.body) if message.op == "state" else fields)
            case "resteer":
                self.workloads.resteer(json.loads(message.body), released=bool(fields.get("released")))
            case "stop":
                self.spawn(self._stop())
            case "finish":
                self.spawn(self._finish())
            case "leave":
                self._end(0)
            case other:
                log(f"unknown message {other!r}", WARNING)

    def send(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> None:
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

    async def ask(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
        number = next(self._ids)
        reply: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._replies[number] = reply
        self.send(op, fds, id=number, **fields)
        try:
            async with asyncio.timeout(_REPLY_TIMEOUT_S):
                return await reply
        finally:
            self._replies.pop(number, None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None:
            log_exception("a part of the brain failed", exc)
            self._end(1)

    def _end(self, code: int) -> None:
        if not self.ended.done():
            self.ended.set_result(code)

    # -- main ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._synced.wait()
        self.children = await self.ask("state")
        self._versions = dict(self.children["shards"])
        self.state.make()
        self.spawn(self.workloads.watch())
        self.spawn(self.workloads.balancing.keep())
        await self._configure()
        self.workloads.reconcile()
        await self.workloads.begun()
        self.send("ready")
        self.children = await self.ask("state")
        next_poll = time.monotonic() + self.settings.poll_s
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_S):
                    await self.wake.wait()
            self.wake.clear()
            if self._stopping:
                break
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self.settings.poll_s
                await self._configure()
                await self._look_for_resolvers()
                self.children = await self.ask("state")
            await self._renew()
            self.workloads.reconcile()
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
            vips = self.state.load("vips") if self.snapshot is None else self.snapshot.vips
            context = Context(self.settings.node, vips=vips)
            snapshot = await self._loop.run_in_executor(self._reader, self._loader.load, context)
        except ConfigError as exc:
            if str(exc) != self.config_error:
                log(f"configuration: {exc}; what was in force stays", WARNING)
            self.config_error = str(exc)
            return
        self._fingerprint = seen
        self.config_error = ""
        for error in snapshot.rejected:
            log(f"rejected: {error}", WARNING)
        self.snapshot = snapshot
        self.applied_at = time.time()
        self.state.note("last-good", self._loader.memory_error)
        self.state.save("vips", snapshot.vips)
        await self.certificates.want({item.identity for item in snapshot.local_workloads}, snapshot.mesh.trust_domain)
        await self._look(snapshot)
        self._publish(snapshot)
        await self.workloads.want(
            snapshot.local_workloads, tuple(snapshot.vip_networks), snapshot.steering, snapshot.balanced
        )
        if not self._took_over:
            self._took_over = True
            await self.workloads.take_over(self.children["attached"])

    async def _look(self, snapshot: Snapshot) -> bool:
        """For the resolvers of workloads. True when some have changed."""
        arguments = (snapshot.local_workloads, snapshot.vip_networks)
        changed = await self._loop.run_in_executor(self._reader, self.resolvers.look, *arguments)
        if changed:
            self.state.save("nameservers", self.resolvers.nameservers)
        return changed

    async def _look_for_resolvers(self) -> None:
        if self.snapshot is not None and await self._look(self.snapshot):
            self._publish(self.snapshot)

    def _shards(self, snapshot: Snapshot | None) -> dict[str, Shard]:
        """What workers are to know: of the files, and of what this node found out itself."""
        shards: dict[str, Shard] = dict(snapshot.shards) if snapshot is not None else {}
        for item in snapshot.local_workloads if snapshot is not None else ():
            key = f"workload/{item.key}"
            if isinstance(shard := shards[key], WorkloadShard):
                found = self.resolvers.found(item.key)
                shards[key] = replace(shard, nameservers=found.nameservers, trusted_nameservers=found.trusted)
        return shards | {shard.key(): shard for shard in self.certificates.svids.values()}

    def _publish(self, snapshot: Snapshot) -> None:
        """Send what changed. What is new goes first, so that nobody learns of a route before its backend."""
        shards = self._shards(snapshot)
        encoded = {key: encode_shard(shard) for key, shard in shards.items()}
        versions = {key: hashlib.sha256(data).hexdigest()[:16] for key, data in encoded.items()}
        for key in {f"svid/{item.identity}" for item in snapshot.local_workloads} - set(versions):
            # We have none, the supervisor has: what workers use now is better than nothing.
            if key in self._versions:
                versions[key] = self._versions[key]
        changed = [key for key, version in versions.items() if self._versions.get(key) != version]
        order = {"mesh": 0, "svid": 1, "workload": 2, "service": 3, "external": 4}
        if snapshot.mesh.outbound_policy == "deny":
            # Last: what the same change allows must not end before it is known.
            order["mesh"] = 5
        changed.sort(key=lambda key: (order[key.partition("/")[0]], key in self._versions, key))
        for key in changed:
            self.send("put", key=key, version=versions[key], body=encoded[key])
            if debugging():
                debug(f"published {key} in version {versions[key]}, before {self._versions.get(key, 'none')}")
        for key in set(self._versions) - set(versions):
            debug(f"withdrew {key}")
            self.send("drop", key=key)
        self._versions = versions

    async def _save_again(self) -> None:
        """What could not be written while the disk was full or read-only."""
        if self.snapshot is None or not self.state.should_retry() or not self.state.make():
            return
        self.state.save("vips", self.snapshot.vips)
        self.state.save("nameservers", self.resolvers.nameservers)
        await self._loop.run_in_executor(self._reader, self._loader.save)
        self.state.note("last-good", self._loader.memory_error)
        await self.certificates.save_again()

    async def _renew(self) -> None:
        if self.snapshot is not None:
            wanted = {item.identity for item in self.snapshot.local_workloads}
            if await self.certificates.renew(wanted, self.snapshot.mesh.trust_domain):
                self._publish(self.snapshot)

    def uncertified(self, identity: SpiffeId) -> str:
        """Why workers have no certificate of `identity`; "" when they have one."""
        return "" if f"svid/{identity}" in self._versions else self.certificates.error or "it is under way"

    # -- stop ---------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Rules off where the policy is open; the hooks stay so that established connections live on."""
        self._stopping = True
        self.wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await self._idle.wait()
        done = await self.workloads.unsteer()
        self.send("unsteered", body=json.dumps(done).encode())

    async def _finish(self) -> None:
        await self.workloads.clean()
        self._end(0)

    # -- what others see ----------------------------------------------------------------------------

    def engines(self) -> dict[str, str]:
        """What the workers speak HTTP with."""
        return {
            "http1": h1.chosen(self.settings.http1_engine),
            "http2": h2.chosen(self.settings.http2_engine),
            "relay": compiled.relay(),
            "streams": compiled.streams(),
        }

    def condition(self) -> Condition:
        pods = self.workloads.pods
        return Condition(
            node=self.settings.node,
            engines=self.engines(),
            steering={key: (pod.mechanism or "none", pod.want.failure_policy, pod.state) for key, pod in pods.items()},
            certificates={identity: svid.not_after for identity, svid in self.certificates.svids.items()},
            rejected=len(self.snapshot.rejected) if self.snapshot else 0,
            restarts=self.children.get("restarts", {}),
            processes={(c["role"], c["slot"]): c["state"] == "ready" for c in self.children.get("children", [])},
            config_ok=not self.config_error,
            config_age_s=time.time() - self.applied_at,
            repairs={key: (pod.repairs, pod.vigil.gap_s, pod.vigil.last_gap_s) for key, pod in pods.items()},
            unsteered={key: pod.vigil.unsteered.count for key, pod in pods.items() if pod.state == "steered"},
            steered={key: self.workloads.counters(pod) for key, pod in pods.items()},
        )

    async def config_dump(self, kind: str, name: str) -> dict[str, Any]:
        """Raises ConfigError when there is no such thing."""
        held = (await self.ask("state"))["shards"]
        snapshot = self.snapshot
        shards = self._shards(snapshot)
        about = {
            "node": self.settings.node,
            "netproxy": __version__,
            "config": {"path": self.settings.config, "error": self.config_error, "applied_at": self.applied_at},
        }
        # Of a large mesh it takes its time, which is not the loop's.
        versions = (dict(self._versions), held)
        return about | await asyncio.to_thread(config_dump, snapshot, shards, versions, kind=kind, name=name)

    def log_level(self) -> str:
        return level()

    async def set_log_level(self, name: str) -> None:
        """Of all processes of this node, also of those that start later. Raises ValueError."""
        set_level(name)
        self.send("log_level", level=name)
        self.children = await self.ask("state")

    def healthy(self) -> tuple[bool, str]:
        """For /healthz: is traffic served, for every workload whose namespace exists, as configured?"""
        workers = [c for c in self.children.get("children", []) if c["role"] == "worker" and c["state"] == "ready"]
        if self._stopping:
            return False, "stopping"
        if not workers:
            return False, "no worker is ready"
        if self.snapshot is None:
            return False, f"no configuration: {self.config_error}"
        pods = self.workloads.pods
        failed = [(key, pod.failure) for key, pod in sorted(pods.items()) if pod.failure]
        if failed:
            return (
                False,
                f"{len(failed)} of {len(pods)} workloads failed, first {failed[0][0]}: {failed[0][1]}",
            )
        return True, "ok"

    def status(self) -> dict[str, Any]:
        """For ``netproxy status``; see docs of the CLI."""
        snapshot, choice = self.snapshot, self.workloads.mechanisms.choice()
        return {
            "node": self.settings.node,
            "healthy": self.healthy()[0],
            "detail": self.healthy()[1],
            "engine": self.engines(),
            "config": {
                "path": self.settings.config,
                "error": self.config_error,
                "age_s": round(time.time() - self.applied_at, 1),
                "shards": len(self._versions),
            },
            "steering": {
                "wanted": self.workloads.mechanisms.wanted,
                "mechanism": (choice.mechanism or "none") if choice else "none",
                "reason": choice.reason if choice else "not tried yet",
                "outbound_port": self.settings.outbound_port,
            },
            "processes": self.children.get("children", []),
            "supervisor_pid": self.children.get("pid"),
            "restarts": self.children.get("restarts", {}),
            "workloads": [
                {
                    "workload": key,
                    "state": pod.state,
                    "detail": pod.detail,
                    "steering": (pod.mechanism or "none") if pod.state == "steered" else "none",
                    "steering_wanted": pod.want.steering,
                    "steering_reason": self.workloads.why_so(pod),
                    "failure_policy": pod.want.failure_policy,
                    "policy_in_force": self.workloads.policy_in_force(pod),
                    "steering_note": pod.undropped,
                    "connections": {result: count for result, count in self.workloads.counters(pod).items() if count},
                    "last_gap_s": round(pod.vigil.last_gap_s, 3),
                    "unsteered_connections": {
                        "count": pod.vigil.unsteered.count,
                        "first": [item._asdict() for item in pod.vigil.unsteered.shown],
                        "complete": pod.vigil.unsteered.complete,
                    },
                    "families": sorted(pod.dial_families),
                    "steered_families": sorted(pod.families),
                    "repairs": pod.repairs,
                    "dns": {"capture": pod.dns, **asdict(self.resolvers.found(key))},
                    "addresses": list(pod.want.addresses),
                    "identity": pod.want.identity,
                    "certificate_not_after": self.certificates.svids[pod.want.identity].not_after
                    if pod.want.identity in self.certificates.svids
                    else None,
                    "netns": pod.want.netns,
                    "cgroup": str(pod.cgroup or ""),
                }
                for key, pod in sorted(self.workloads.pods.items())
            ],
            "log_level": level(),
            "access_log": {"target": self.settings.access_log, "error": ""}
            | self.children.get("access_log", {})
            | access_lines(self.arena),
            "identity_error": self.certificates.error,
            "state_error": self.state.error,
            "services": [
                _service(s, self.workloads.balancing.failed)
                for s in snapshot.shards.values()
                if isinstance(s, ServiceShard)
            ]
            if snapshot
            else [],
            "last_good": list(snapshot.kept) if snapshot else [],
            "rejected": [str(error) for error in snapshot.rejected] if snapshot else [],
            "objects": statuses(snapshot) if snapshot else [],
        }


def _service(shard: ServiceShard, unbalanced: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    """`unbalanced`: why, by address and port."""
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
                "needs_proxy": why_proxied(port)
                or next((why for vip in shard.vips if (why := unbalanced.get((vip, port.port)))), ""),
            }
            for port in shard.ports
        ],
    }


async def _run(joined: Joined) -> int:
    asyncio.get_running_loop().set_exception_handler(_on_exception)
    brain = Brain(joined)
    brain.start()
    brain.spawn(brain.run())
    admin = Admin(brain, joined.settings)
    try:
        await admin.start()
        return await brain.ended
    finally:
        await admin.stop()


def _on_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    exc = context.get("exception")
    if isinstance(exc, Exception):
        log_exception(str(context.get("message")), exc)
    else:
        log(str(context.get("message")), WARNING)


def main() -> int:
    code = asyncio.run(_run(join("brain")))
    # Threads may be inside a blocking call; nothing of theirs is worth waiting for.
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
