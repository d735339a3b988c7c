"""The local workloads of a node: each one's namespace, listeners and rules, from absent to steered and back.

One loop compares what should be with what is, so a start, a restart, a new namespace and a repaired one are the same
thing::

    absent --namespace appears--> attaching --listeners are there--> steering --rules are there--> steered
       ^_____________ namespace gone, workload removed (rules off first) ______________________________|

What goes wrong on the way leads to ``failed``, which is tried again; under failure policy ``closed`` the rules are put
there even so, and refuse what has no listener. Steered ones are watched (`steering`): rules that somebody flushed are
put back, and counted.

Order: listeners before rules; rules off before listeners. A part of the brain.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from redirect import Applied, Mechanism, Ports, RedirectError, Steering, dialable, reachable, remove, steer
from redirect.bpf import Key, Listener
from redirect.ebpf import counters, release
from redirect.host import OWN_NETNS, enrol, let_go, withdraw
from redirect.netns import netns_cookie, open_netns
from redirect.probe import Preference, choose
from redirect.unsteered import Unsteered, unsteered

from .addr import SpiffeId
from .config.balanced import BalancedPort
from .config.snapshot import LocalWorkload, Traffic
from .errors import IdentityError, NetproxyError
from .hosts import HostPorts, absence, find
from .journal import Entry, Journal
from .log import WARNING, log
from .settings import NodeSettings
from .steering import Balancing, Looks, Mechanisms, Vigil, scope_of

RECONCILE_S = 0.2
"""A deleted namespace is noticed within this; its veth stays until we let go."""
_RETRY_S = 0.5
_CHECK_S = 1.0
"""Between two questions whether what is steered is unchanged, so that what is changed without an event is put back
within 2 s. Only one that is not unchanged is looked at."""
_DIALLED_S = 0.1
"""For what was accepted before steering is taken off, until its upstream connection is there."""
_TOGETHER_S = 1.0
"""What several workloads that come at the same time wait for each other, between inbound and outbound."""
_BRING_UPS = 32
"""Workloads that wait for their listeners at the same time: each may wait for a worker that does not answer."""
_THREADS = 8
"""Calls into namespaces at the same time. libnftables itself does one command at a time."""
_UNIT_S = 2.0
"""Between two questions to systemd about a unit that does not run."""

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
    dns: bool = False
    """They capture names."""
    vip_cidrs: tuple[str, ...] = ()
    retry_at: float = 0.0
    since: float = 0.0
    generation: int = 0
    mechanism: Mechanism | None = None
    """Of the rules that are in force."""
    traffic: Traffic = Traffic()
    undropped: str = ""
    """Why rules of before are still there."""
    cookie: int = 0
    """By which eBPF knows the namespace, or the cgroup of a service of the host."""
    cgroup: Path | None = None
    """Of a service of the host, once it was found."""
    ports: Ports | None = None
    """Where its proxy listens, in a namespace where others may too; else those of the settings."""
    vigil: Vigil = field(default_factory=Vigil)
    check_at: float = 0.0
    repairs: int = 0
    failure: str = ""
    """Of the last attempt, until one succeeds: `state` goes through the others while it is tried again."""
    task: asyncio.Task[None] | None = None
    is_new: bool = True
    """Nothing of it is steered, by nobody before us either."""
    takes: bool = False
    """What comes in is steered."""
    epoch: int = 0
    """Counts decisions that make void what was begun before."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def cgroup_id(self) -> int:
        """Of a service of the host; 0: it is none."""
        return 0 if self.cgroup is None else self.cookie

    def set(self, state: str, detail: str = "") -> None:
        if state != self.state:
            self.since = time.time()
        self.state, self.detail = state, detail


class Link(Protocol):
    """What the brain lends: its channel to the supervisor, its loop, and its word on certificates."""

    wake: asyncio.Event
    """Set: compare again, now."""
    ended: asyncio.Future[int]

    def send(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> None: ...

    async def ask(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...

    def uncertified(self, identity: SpiffeId) -> str:
        """Why workers have no certificate of `identity`; "" when they have one."""


class Pods:
    """By workload. Nothing is begun before `want` was called; `vip_cidrs` are those of the snapshot in force."""

    def __init__(self, settings: NodeSettings, link: Link) -> None:
        self.settings = settings
        self.pods: dict[str, Pod] = {}
        self.vip_cidrs: tuple[str, ...] = ()
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._journal = Journal(settings.journal, settings.node)
        self._rng = random.Random()
        self._executor = ThreadPoolExecutor(_THREADS, "steering")
        self._calls = asyncio.Semaphore(_THREADS)
        self._bring_ups = asyncio.Semaphore(_BRING_UPS)
        self.mechanisms = Mechanisms(partial(choose, node=settings.node))
        self.balancing = Balancing(settings.node)
        self._looks = Looks()
        self._host_ports = HostPorts(settings)

    # -- what is wanted -----------------------------------------------------------------------------

    async def want(
        self,
        workloads: Iterable[LocalWorkload],
        vip_cidrs: tuple[str, ...],
        steering: Preference = "auto",
        balanced: tuple[BalancedPort, ...] = (),
    ) -> None:
        """These and no others. What is new or changed is brought up by `reconcile`."""
        self.vip_cidrs = vip_cidrs
        await self.balancing.want(balanced)
        wanted = {f"{item.namespace}/{item.name}": item for item in workloads}
        self.mechanisms.want(steering, {item.steering for item in wanted.values()})
        for key, pod in list(self.pods.items()):
            if key not in wanted or _place(wanted[key]) != _place(pod.want):
                await self._release(pod)
                del self.pods[key]
        for key, item in wanted.items():
            if key in self.pods:
                if item.steering != self.pods[key].want.steering:
                    self.pods[key].retry_at = 0.0
                self.pods[key].want = item
            else:
                self.pods[key] = Pod(item)

    async def take_over(self, attached: Mapping[str, Any]) -> None:
        """Let go what predecessors left that is not wanted any more, or whose namespace went while no brain looked.

        `attached` is what the supervisor holds. Only for when there is a configuration: without one, what is steered
        stays so.
        """
        left: dict[str, Any] = {**self._journal.entries, **attached}
        for key, place in left.items():
            pod = self.pods.get(key)
            if pod is None or _ns_of(_netns(pod.want)) != (place["dev"], place["ino"]):
                await self._forget(key)
                continue
            pod.is_new = key not in attached
            if not pod.want.netns and len(place.get("ports", ())) == 3:
                outbound, inbound, dns = place["ports"]
                pod.ports = Ports(outbound, inbound, dns or inbound + 1)

    def resteer(self, workloads: Iterable[str], *, released: bool) -> None:
        """The supervisor let go of their rules since no worker ran (`released`), or now a worker runs again."""
        for pod in [self.pods[key] for key in workloads if key in self.pods]:
            pod.retry_at = 0.0
            pod.is_new = pod.is_new or released
            if released:
                # A table that we handed over while this was under way would steer to nobody.
                self._link.send("own", workload=_key(pod))
            if pod.state == "steered":
                why = "steering was released while no worker ran" if released else "its listeners are others now"
                pod.set("attaching", why)
        self._link.wake.set()

    # -- what is ------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Namespaces that went: what we hold keeps their veth alive. Waits for nobody, also during a drain."""
        while not self._link.ended.done():
            for pod in list(self.pods.values()):
                if pod.netns_fd >= 0 and _ns_of(str(pod.cgroup or pod.want.netns)) != pod.ns_id:
                    self._lost(pod)
                    self._link.wake.set()
            await asyncio.sleep(RECONCILE_S)

    def reconcile(self) -> None:
        """Begin what is to be done. Each workload has a task of its own, at most one at a time."""
        now = time.monotonic()
        for pod in self.pods.values():
            if pod.state == "steered" and not self._is_as_wanted(pod):
                pod.set("attaching", "its configuration changed")
        idle = [pod for pod in self.pods.values() if pod.task is None]
        for pod in idle:
            if pod.state != "steered" and now >= pod.retry_at:
                self._begin(pod, self._bring_up(pod, pod.epoch))
        due = [pod for pod in idle if pod.state == "steered" and now >= pod.check_at]
        for pod in sorted(due, key=lambda pod: pod.check_at):
            if pod.mechanism is not None and pod.vigil.is_unchanged(pod.mechanism, now):
                pod.vigil.good_at = now
            elif self._looks.take(now):
                self._begin(pod, self._check(pod, pod.epoch))
            else:
                continue  # its turn comes
            pod.check_at = now + _CHECK_S

    def _is_as_wanted(self, pod: Pod) -> bool:
        """Of what was put there; what is there now, `_check` sees."""
        choice = self.mechanisms.choice(pod.want.steering)
        return (
            (pod.policy, pod.dns, pod.vip_cidrs) == (pod.want.failure_policy, self._captures(pod), self.vip_cidrs)
            and pod.traffic == pod.want.traffic
            # None: nobody has asked yet what can be used.
            and choice is not None
            and choice.mechanism == pod.mechanism
        )

    def _begin(self, pod: Pod, work: Coroutine[Any, Any, None]) -> None:
        def ended(_task: asyncio.Task[None]) -> None:
            pod.task = None

        pod.task = self._link.spawn(work)
        pod.task.add_done_callback(ended)

    async def begun(self) -> None:
        """All that was begun until now has ended."""
        tasks = [pod.task for pod in self.pods.values() if pod.task is not None]
        if tasks:
            await asyncio.wait(tasks)

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
                await self.mechanisms.get(pod.want.steering)
                pod.families, pod.dial_families = await self._families(pod, epoch)
                if why := self._link.uncertified(pod.want.identity):
                    raise IdentityError(f"no certificate yet: {why}")
                captured, captures = pod.dns, self._captures(pod)
                await self._attach(pod, epoch, dns=captured or captures)
                # Who speaks mesh TLS already shall find who takes it off. Under `closed` nothing may pass first.
                halfway = pod.is_new and pod.want.failure_policy == "open"
                await self._steer(pod, epoch, enabled=True, outbound=not halfway)
                pod.takes = True
            if halfway:
                await self._inbound_of_others(pod)
                await self._steer(pod, epoch, enabled=True)
            if captured and not captures:
                # Only now does nobody ask there any more.
                await self._attach(pod, epoch, dns=False)
            pod.is_new = pod.takes = False
            pod.set("steered")
            pod.failure = ""
            # Spread over time, so that those which came together are not looked at together.
            pod.check_at = time.monotonic() + _CHECK_S * self._rng.random()
            log(
                f"{key}: steered by {pod.mechanism}, families {sorted(pod.dial_families)}, failure policy {pod.policy}"
                f"{self.policy_note(pod)}"
            )
            await self._begin_vigil(pod, epoch)
        except _Superseded:
            return
        except (RedirectError, NetproxyError, OSError) as exc:
            if pod.epoch == epoch:
                await self._failed(pod, epoch, exc)

    async def _inbound_of_others(self, pod: Pod) -> None:
        """Until those that are brought up at the same time are as far as this one; not for long."""
        deadline = time.monotonic() + _TOGETHER_S
        while time.monotonic() < deadline and any(
            other.task is not None and other.is_new and not other.takes
            for other in self.pods.values()
            if other is not pod
        ):
            await asyncio.sleep(0.01)

    async def _open(self, pod: Pod, epoch: int) -> bool:
        """False: it does not exist yet."""
        if not pod.want.netns:
            return await self._open_host(pod, epoch)
        if not os.path.exists(pod.want.netns):
            pod.set("absent", f"{pod.want.netns} does not exist yet")
            return False
        fd, cookie = await self._loop.run_in_executor(self._executor, _open, pod.want.netns)
        if pod.epoch != epoch:
            os.close(fd)
            raise _Superseded
        stat = os.fstat(fd)
        pod.netns_fd, pod.ns_id, pod.cookie = fd, (stat.st_dev, stat.st_ino), cookie
        return True

    async def _open_host(self, pod: Pod, epoch: int) -> bool:
        entry = self._journal.entries.get(_key(pod))
        before = entry.get("cgroup", 0) if entry is not None else 0
        found = await self._loop.run_in_executor(self._executor, find, pod.want, self.settings.node, before)
        if found is not None and pod.epoch != epoch:
            os.close(found.netns_fd)
            raise _Superseded
        if found is None:
            pod.set("absent", absence(pod.want))
            pod.retry_at = time.monotonic() + (_UNIT_S if pod.want.unit else 0.0)
            return False
        twin = next((other for other in self.pods.values() if other.cgroup == found.cgroup), None)
        if twin is not None:
            os.close(found.netns_fd)
            raise RedirectError(f"{found.cgroup} is {_key(twin)} already", step="attach")
        pod.cgroup, pod.netns_fd, pod.ns_id, pod.cookie = found
        return True

    def _ports(self, pod: Pod) -> Ports:
        """Where its proxy listens."""
        settings = self.settings
        if pod.want.netns:
            return Ports(settings.outbound_port, settings.inbound_port, settings.dns_port)
        if pod.ports is None:
            pod.ports = self._host_ports.take(other.ports for other in self.pods.values())
        return pod.ports

    async def _failed(self, pod: Pod, epoch: int, exc: Exception) -> None:
        """Tried again soon. Until then nothing may pass that the policy does not let pass."""
        detail = str(exc) or type(exc).__name__
        try:
            if pod.netns_fd >= 0 and pod.want.failure_policy == "closed":
                await self._close(pod, epoch)
            elif pod.netns_fd >= 0 and self.policy_in_force(pod) == "closed":
                # Its policy is open now, and only what we put there for the old one stands in its way; or what can't
                # be open.
                await self._remove(pod, epoch)
                pod.policy, pod.generation, pod.mechanism = "", 0, None
        except _Superseded:
            return
        except (RedirectError, OSError) as second:
            detail = f"{detail}; failure policy {pod.want.failure_policy}: {second}"
        if pod.epoch != epoch:
            return
        if pod.failure != detail:
            log(f"{_key(pod)}: {detail}")
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

    async def _begin_vigil(self, pod: Pod, epoch: int) -> None:
        """Watch what has been steered. It is looked at once more: what came between the rules and the watch was heard
        by nobody."""
        if pod.epoch != epoch:
            raise _Superseded
        if pod.vigil.watch is None and pod.cgroup is None:  # of the host too much would be heard
            pod.vigil.open(pod.netns_fd, self.settings.node, lambda: self._heard(pod))
        pod.vigil.good_at = time.monotonic()
        await self._check(pod, epoch)

    def _heard(self, pod: Pod) -> None:
        """The kernel says that something changed there."""
        pod.check_at = min(pod.check_at, time.monotonic())
        self._link.wake.set()

    async def _check(self, pod: Pod, epoch: int) -> None:
        """Of a steered one: somebody may have flushed rules or routes, or added an address."""
        try:
            began, mechanism = time.monotonic(), pod.mechanism
            mark = pod.vigil.begin_look(mechanism) if mechanism is not None else b""
            families, dial_families = await self._families(pod, epoch)
            if pod.state != "steered" or not self._is_as_wanted(pod):
                return  # a change of the configuration is no repair
            if not (families <= pod.families and dial_families <= pod.dial_families):
                pod.set("attaching", "it has an address of a new family")
                return
            applied = await self._steer(pod, epoch, enabled=True, mechanism=mechanism)
            pod.vigil.unsteered = await self._unsteered(pod, epoch)
            if applied.changed and applied.settled:
                pod.check_at = 0.0
            elif applied.changed:
                if pod.mechanism == "ebpf":
                    await self._steer(pod, epoch, enabled=True, mechanism=mechanism, hand=True)
                pod.repairs += 1
                gap = pod.vigil.repaired(mechanism, time.monotonic())
                log(f"{_key(pod)}: rules or routes were not as they should be, repaired {gap}", WARNING)
                pod.check_at = 0.0  # our own change: the next look takes its fingerprint
                pod.vigil.good_at = time.monotonic()
                pod.vigil.event_at = 0.0
            else:
                pod.vigil.found_good(mark, began)
        except _Superseded:
            return
        except (RedirectError, OSError) as exc:
            if pod.epoch == epoch:
                await self._failed(pod, epoch, exc)
        finally:
            pod.vigil.hear_again(lambda: self._heard(pod))

    async def _unsteered(self, pod: Pod, epoch: int) -> Unsteered:
        if pod.cgroup is not None:
            return Unsteered(0, ())  # connections of the host don't tell whose they are
        desired = self._steering(pod, pod.policy, enabled=True)
        return await self._inside(pod, epoch, unsteered, desired)

    def policy_in_force(self, pod: Pod) -> str:
        """What becomes of its traffic when nobody is there to serve it; "" when it is not steered."""
        if pod.mechanism is None:
            return ""
        return self._steering(pod, pod.policy, enabled=True).policy_in_force

    def why_so(self, pod: Pod) -> str:
        """Why it is steered by what it is steered by, or not at all."""
        choice = self.mechanisms.choice(pod.want.steering)
        return choice.reason if choice else "not tried yet"

    def policy_note(self, pod: Pod) -> str:
        in_force = self.policy_in_force(pod)
        if in_force in ("", pod.policy):
            return ""
        return f", in force {in_force}: rules of {pod.mechanism} stay until removed"

    def _journal_add(self, pod: Pod) -> None:
        entry: Entry = {"netns": _netns(pod.want), "dev": pod.ns_id[0], "ino": pod.ns_id[1]}
        if pod.cgroup is not None:
            stat = os.fstat(pod.netns_fd)
            entry = {"netns": OWN_NETNS, "dev": stat.st_dev, "ino": stat.st_ino, "cgroup": pod.cookie}
        self._journal.add(_key(pod), entry)

    def _captures(self, pod: Pod) -> bool:
        return pod.want.dns_capture and self.settings.dns_port != 0

    async def _attach(self, pod: Pod, epoch: int, *, dns: bool) -> None:
        """Listeners, before any rule. Those for names only if `dns` is true."""
        pod.set("attaching", "waiting for listeners")
        self._journal_add(pod)
        ports = self._ports(pod)
        reply = await self._link.ask(
            "attach",
            (pod.netns_fd,),
            workload=_key(pod),
            families=sorted(pod.families),
            dial_families=sorted(pod.dial_families),
            outbound_port=ports.outbound,
            inbound_port=ports.inbound,
            dns_port=ports.dns if dns else 0,
            policy=pod.want.failure_policy,
        )
        if pod.epoch != epoch:
            raise _Superseded
        if reply["error"]:
            if pod.ports is not None and os.strerror(errno.EADDRINUSE) in reply["error"]:
                self._host_ports.refuse(pod.ports)  # somebody else's: others are tried next
                pod.ports = None
            raise RedirectError(reply["error"])
        pod.set("steering", "putting the rules there")

    async def _steer(
        self,
        pod: Pod,
        epoch: int,
        *,
        enabled: bool,
        mechanism: Mechanism | None = None,
        hand: bool = False,
        outbound: bool = True,
    ) -> Applied:
        """Put the rules there (`enabled`), or only the hooks that established connections need. `mechanism`: None is
        the one that was chosen for it; where it hands connections to sockets, they are given to it then, or if `hand`
        says so. `outbound` False: what the workload opens is left alone."""
        key = _key(pod)
        policy, vips, dns = pod.want.failure_policy, self.vip_cidrs, self._captures(pod)
        traffic = pod.want.traffic
        if mechanism is None:
            # What is in force is drained as it is, whatever is wanted by now.
            in_force = pod.mechanism
            hand = enabled
            mechanism = await self.mechanisms.get(pod.want.steering) if enabled or in_force is None else in_force
        desired = replace(self._steering(pod, policy, enabled=enabled), mechanism=mechanism, outbound=outbound)
        state = pod.state
        is_alone = pod.mechanism == mechanism and not pod.undropped
        look_for = self.mechanisms.look_for(mechanism if is_alone else None)
        listeners = await self._listeners(pod) if hand and mechanism == "ebpf" else []
        try:
            if pod.cgroup is not None:
                changed = await self._inside(pod, epoch, enrol, pod.cgroup, desired, listeners)
                applied = Applied(None, 1, changed)
            else:
                applied = await self._inside(pod, epoch, steer, desired, None, look_for, listeners)
        finally:
            # As long as we have one, its queue would take connections that nobody serves.
            for listener in listeners:
                os.close(listener.fd)
        if applied.owner_fd is not None:
            try:
                # What another has decided meanwhile stands: a table that nobody owns goes at once.
                if pod.epoch != epoch or (state == "steered" and pod.state != state):
                    raise _Superseded
                self._link.send("own", (applied.owner_fd,), workload=key)
            finally:
                os.close(applied.owner_fd)
        elif pod.epoch != epoch:
            raise _Superseded
        elif applied.changed and not desired.owned:
            # Plain rules are in force; an owned table of before, if any, goes with its owner.
            self._link.send("own", workload=key)
        pod.generation, pod.policy, pod.vip_cidrs, pod.dns = applied.generation, policy, vips, dns
        pod.mechanism, pod.traffic = mechanism, traffic
        if applied.undropped and applied.undropped != pod.undropped:
            log(f"{key}: {applied.undropped}", WARNING)
        pod.undropped = applied.undropped
        return applied

    async def _listeners(self, pod: Pod) -> list[Listener]:
        """Inbound ones of all workers, which are the caller's to close. None are there under policy ``closed`` before
        anybody serves."""
        found: list[Listener] = []
        for family in (4, 6):
            reply = await self._link.ask("listeners", workload=_key(pod), family=family)
            found += [Listener(family, slot, fd) for slot, fd in zip(reply["slots"], reply["fds"], strict=True)]
        return found

    def counters(self, pod: Pod) -> dict[str, int]:
        """What became of its connections, where the mechanism counts them. Since it was steered by it."""
        try:
            key = Key("pod" if pod.cgroup is None else "cgroup", pod.cookie)
            return counters(self.settings.node, key) if pod.mechanism == "ebpf" else {}
        except RedirectError:
            return {}

    def _steering(self, pod: Pod, policy: str, *, enabled: bool) -> Steering:
        settings, ports = self.settings, self._ports(pod)
        return Steering(
            node=settings.node,
            families=frozenset(4 if f == 4 else 6 for f in pod.families),
            failure_policy="closed" if policy == "closed" else "open",
            ports=replace(ports, dns=ports.dns if self._captures(pod) else None),
            mark=settings.mark,
            mask=settings.mark_mask,
            # Without an address to dial from, a VIP shall stay unreachable: clients then take the other family's.
            vip_cidrs=tuple(cidr for cidr in self.vip_cidrs if (6 if ":" in cidr else 4) in pod.dial_families),
            enabled=enabled,
            scope=scope_of(pod.want.traffic),
            mechanism=pod.mechanism or "nftables",
            workers=settings.workers,
        )

    def _lost(self, pod: Pod) -> None:
        """The namespace was deleted or replaced. Everything of ours in it must be closed, at once."""
        key = _key(pod)
        pod.epoch += 1
        pod.vigil.close()
        if pod.mechanism == "ebpf" and pod.netns_fd >= 0:
            # What is not in the namespace does not go with it.
            self._link.spawn(self._withdraw(os.dup(pod.netns_fd), pod.cgroup_id))
        pod.mechanism = None
        self._link.send("detach", workload=key)
        if pod.netns_fd >= 0:
            os.close(pod.netns_fd)
        pod.netns_fd, pod.ns_id, pod.generation, pod.retry_at, pod.policy, pod.dns = -1, (0, 0), 0, 0.0, "", False
        gone = f"cgroup {pod.cgroup}" if pod.cgroup is not None else pod.want.netns
        if pod.state != "absent":
            log(f"{key}: its {'namespace' if pod.want.netns else 'cgroup'} is gone")
        pod.cgroup, pod.is_new, pod.takes = None, True, False
        pod.set("absent", f"{gone} was deleted")
        pod.failure = ""
        self._journal.remove(key)

    async def _remove(self, pod: Pod, epoch: int) -> None:
        """Rules off, by no policy."""
        await self._inside(pod, epoch, let_go, self.settings.node, pod.cgroup_id)

    async def _withdraw(self, netns_fd: int, cgroup: int) -> None:
        try:
            await self._loop.run_in_executor(self._executor, let_go, netns_fd, self.settings.node, cgroup)
        except RedirectError as exc:
            log(f"what steered a namespace that is gone can't be removed: {exc}", WARNING)
        finally:
            os.close(netns_fd)

    async def _release(self, pod: Pod) -> None:
        """No longer wanted: rules off, then listeners, then the rest."""
        key = _key(pod)
        pod.epoch += 1
        pod.vigil.close()
        if pod.netns_fd < 0:
            return
        with contextlib.suppress(RedirectError, OSError, _Superseded):
            await self._remove(pod, pod.epoch)
        if pod.netns_fd < 0:
            return  # deleted meanwhile
        self._link.send("own", workload=key)
        self._link.send("detach", workload=key)
        os.close(pod.netns_fd)
        pod.netns_fd = -1
        self._journal.remove(key)
        log(f"{key}: released")

    async def _forget(self, key: str) -> None:
        entry = self._journal.entries.get(key)
        if entry is not None and (cgroup := entry.get("cgroup", 0)):
            with contextlib.suppress(RedirectError):
                await self._loop.run_in_executor(self._executor, withdraw, self.settings.node, cgroup)
        elif entry is not None and _ns_of(entry["netns"]) == (entry["dev"], entry["ino"]):
            with contextlib.suppress(RedirectError, OSError):
                fd = await self._loop.run_in_executor(self._executor, open_netns, entry["netns"])
                try:
                    await self._loop.run_in_executor(self._executor, remove, fd, self.settings.node)
                finally:
                    os.close(fd)
        self._link.send("detach", workload=key)
        self._journal.remove(key)

    # -- stop ---------------------------------------------------------------------------------------

    async def unsteer(self) -> list[str]:
        """Rules off where the policy is open; the hooks stay so that established connections live on.

        First for what workloads open: a proxy that still sends mesh TLS shall find the one that takes it off.

        Returns the workloads whose rules are off.
        """
        done: list[str] = []

        async def unsteer(pod: Pod, *, enabled: bool) -> None:
            if pod.netns_fd >= 0 and pod.generation and pod.policy == "open":
                try:
                    pod.set("draining")
                    await self._steer(pod, pod.epoch, enabled=enabled, mechanism=pod.mechanism, outbound=False)
                    if not enabled:
                        done.append(_key(pod))
                except _Superseded:
                    pass
                except (RedirectError, OSError) as exc:
                    log(f"{_key(pod)}: {exc}")

        pods = list(self.pods.values())
        for pod in pods:
            pod.epoch += 1  # who waits for listeners steers no more
        await asyncio.gather(*(unsteer(pod, enabled=True) for pod in pods))
        await asyncio.sleep(_DIALLED_S)
        await asyncio.gather(*(unsteer(pod, enabled=False) for pod in pods))
        return done

    async def clean(self) -> None:
        """Workers are gone and owner sockets closed: remove routes. Where the policy is closed all stays."""

        async def clean(pod: Pod) -> None:
            if pod.netns_fd >= 0 and pod.policy != "closed":
                try:
                    await self._remove(pod, pod.epoch)
                    self._journal.remove(_key(pod))
                except _Superseded:
                    pass
                except (RedirectError, OSError) as exc:
                    log(f"{_key(pod)}: {exc}")

        await asyncio.gather(*map(clean, self.pods.values()))
        try:
            await self._loop.run_in_executor(self._executor, release, self.settings.node)
        except RedirectError as exc:
            log(f"eBPF hooks can't be taken off: {exc}", WARNING)


def _open(path: str) -> tuple[int, int]:
    """The namespace and its cookie."""
    fd = open_netns(path)
    try:
        return fd, netns_cookie(fd)
    except BaseException:
        os.close(fd)
        raise


def _netns(want: LocalWorkload) -> str:
    """The path of the namespace that it is in."""
    return want.netns or OWN_NETNS


def _place(want: LocalWorkload) -> tuple[str, str, str]:
    """Where it is attached."""
    return want.netns, want.cgroup, want.unit


def _key(pod: Pod) -> str:
    return f"{pod.want.namespace}/{pod.want.name}"


def _ns_of(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (0, 0)
    return (stat.st_dev, stat.st_ino)
