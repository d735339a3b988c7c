"""How a node steers: the mechanism it chose, and what becomes of rules that others changed. A part of `pods`.

A look compares what a namespace has with what it should have. It costs some milliseconds, so it is done when there is a
reason: an event of the kernel, a fingerprint that changed, or that the last one was long ago. `Looks` bounds how many
there are, whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from redirect import Mechanism, RedirectError, Scope
from redirect.bpf import Balanced, Target
from redirect.ebpf import balance
from redirect.probe import Choice, Preference, choose
from redirect.unsteered import Unsteered
from redirect.wanted import MECHANISMS
from redirect.watch import Watch

from .config.balanced import BalancedPort
from .config.snapshot import Traffic
from .log import WARNING, log

LOOKS_PER_S = 20.0
_LOOKS_AT_ONCE = 4.0
_QUIET_S = 0.1
"""Between two looks at one workload because of events: a flood of them is one event."""
FULL_S = 20.0
"""What no event and no fingerprint tells is found within this."""
_BYPASSED_S = 2.0
"""Likewise while there are connections that bypass the proxy, so that status tells when they have ended."""
_PROBE_AGAIN_S = 10.0
_BALANCE_AGAIN_S = 1.0


@dataclass(eq=False)
class _Answer:
    """To what is preferred. `choice` None: not there yet."""

    choice: Choice | None = None
    asking: asyncio.Task[Choice] | None = None
    asked_at: float = 0.0

    def is_stale(self) -> bool:
        return (
            self.choice is not None
            and self.choice.mechanism is None
            and time.monotonic() - self.asked_at > _PROBE_AGAIN_S
        )


class Mechanisms:
    """Which one is in use, and why: `wanted` by the node, and by workloads that say something else. The answer of the
    probes is kept for as long as somebody wants the same, or until nothing worked for a while."""

    def __init__(self, probe: Callable[[Preference], Choice] = choose) -> None:
        self.wanted: Preference = "auto"
        self._probe = probe
        self._answers: dict[Preference, _Answer] = {}

    def want(self, wanted: Preference, by_workloads: Iterable[Preference] = ()) -> None:
        self.wanted = wanted
        for other in self._answers.keys() - {wanted, *by_workloads}:
            del self._answers[other]

    def choice(self, wanted: Preference | None = None) -> Choice | None:
        """None: nobody has asked yet. Left out, `wanted` is the node's."""
        answer = self._answers.get(wanted or self.wanted)
        return answer.choice if answer else None

    async def get(self, wanted: Preference | None = None) -> Mechanism:
        """Raises RedirectError when no mechanism that is wanted works. Probing blocks a thread, not the loop."""
        preference = wanted or self.wanted
        answer = self._answers.setdefault(preference, _Answer())
        if answer.choice is None or answer.is_stale():
            if answer.asking is None:
                answer.asking = asyncio.create_task(asyncio.to_thread(self._probe, preference))
            asking = answer.asking
            try:
                found = await asyncio.shield(asking)
            finally:
                if asking.done() and answer.asking is asking:
                    answer.asking, answer.asked_at = None, time.monotonic()
            if answer.choice != found:
                if found.mechanism:
                    log(f"steering by {found.mechanism}: {found.reason}")
                else:
                    log(found.reason, WARNING)
            answer.choice = found
        if answer.choice.mechanism is None:
            raise RedirectError(answer.choice.reason, step="choose how to steer")
        return answer.choice.mechanism

    def look_for(self, known: Mechanism | None) -> tuple[Mechanism, ...]:
        """Whose rules of ours there may be: all of them, unless we know that only `known` has."""
        return (known,) if known is not None else MECHANISMS


class Balancing:
    """The service ports whose connections eBPF balances where they are made, and which of them it can't have."""

    def __init__(self, node: str, put: Callable[[str, list[Balanced]], dict[tuple[str, int], str]] = balance) -> None:
        self._node, self._put = node, put
        self._wanted: tuple[BalancedPort, ...] | None = None
        """None: nobody has said yet, and what a predecessor wanted is in force."""
        self._in_force: tuple[BalancedPort, ...] | None = None
        self._one = asyncio.Lock()
        self.failed: dict[tuple[str, int], str] = {}
        """By address and port. Their connections come to the proxy."""

    async def want(self, wanted: tuple[BalancedPort, ...]) -> None:
        """These and no others. What fails as a whole is tried again by `keep`."""
        self._wanted = wanted
        await self._settle()

    async def keep(self, pause_s: float = _BALANCE_AGAIN_S) -> None:
        while True:
            await asyncio.sleep(pause_s)
            await self._settle()

    async def _settle(self) -> None:
        async with self._one:
            wanted = self._wanted
            if wanted is None or wanted == self._in_force:
                return
            try:
                await asyncio.to_thread(self._put_all, wanted)
            except RedirectError as exc:
                log(f"balancing by eBPF: {exc}", WARNING)

    def _put_all(self, wanted: tuple[BalancedPort, ...]) -> None:
        services, failed = [], {}
        for port in wanted:
            targets = tuple(Target(host, number) for host, number in port.endpoints)
            try:
                services.append(Balanced(port.address, port.port, targets, port.affinity))
            except RedirectError as exc:
                failed[port.address, port.port] = str(exc)
        failed |= self._put(self._node, services)
        for place, why in failed.items():
            if self.failed.get(place) != why:
                log(f"{place[0]} port {place[1]} is not balanced where connections are made: {why}", WARNING)
        self._in_force, self.failed = wanted, failed


class Looks:
    """A bound on looks: `LOOKS_PER_S` on average, a few at once."""

    def __init__(self) -> None:
        self._left = _LOOKS_AT_ONCE
        self._at = 0.0

    def take(self, now: float) -> bool:
        self._left = min(_LOOKS_AT_ONCE, self._left + (now - self._at) * LOOKS_PER_S)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


@dataclass(eq=False)
class Vigil:
    """What is known of one steered namespace since the last look that found it as it should be."""

    watch: Watch | None = None
    fingerprint: bytes = b""
    good_at: float = 0.0
    full_at: float = 0.0
    event_at: float = 0.0
    """Of the first event since; 0: none."""
    gap_s: float = 0.0
    """Of all repairs together."""
    last_gap_s: float = 0.0
    unsteered: Unsteered = field(default_factory=lambda: Unsteered(0, ()))
    _muted: bool = False

    def open(self, netns_fd: int, node: str, heard: Callable[[], None]) -> None:
        """Begin to listen. Raises RedirectError."""
        self.close()
        self.watch = Watch(netns_fd, node)
        self._listen(heard)

    def _listen(self, heard: Callable[[], None]) -> None:
        """Tell of the first event, then no more until `hear_again`: what comes meanwhile waits in the kernel."""
        watch, loop = self.watch, asyncio.get_running_loop()
        if watch is None:
            return
        self._muted = False

        def on_event() -> None:
            self._mute()
            self.event_at = self.event_at or time.monotonic()
            heard()

        for fd in watch.filenos():
            loop.add_reader(fd, on_event)

    def _mute(self) -> None:
        if self.watch is not None and not self._muted:
            self._muted = True
            for fd in self.watch.filenos():
                asyncio.get_running_loop().remove_reader(fd)

    def hear_again(self, heard: Callable[[], None]) -> None:
        if self._muted and self.watch is not None:
            watch = self.watch
            asyncio.get_running_loop().call_later(
                _QUIET_S, lambda: self._listen(heard) if self.watch is watch and self._muted else None
            )

    def close(self) -> None:
        """The sockets would keep the namespace alive."""
        self._mute()
        if self.watch is not None:
            self.watch.close()
        self.watch, self.fingerprint, self.event_at, self._muted = None, b"", 0.0, False
        self.unsteered = Unsteered(0, ())

    def begin_look(self, mechanism: Mechanism) -> bytes:
        """To be kept by `found_good`: what changes after this is not covered by the look. Empty, and so never found
        unchanged, when somebody changes the rules this very moment."""
        if self.watch is None:
            return b""
        self.watch.drain()
        try:
            return self.watch.fingerprint(mechanism)
        except RedirectError:
            return b""

    def is_unchanged(self, mechanism: Mechanism, now: float) -> bool:
        """No look is needed."""
        if self.watch is None or self.event_at:
            return False
        if now - self.full_at > (_BYPASSED_S if self.unsteered.count else FULL_S):
            return False
        try:
            return self.watch.fingerprint(mechanism) == self.fingerprint
        except RedirectError:
            return False

    def found_good(self, fingerprint: bytes, now: float) -> None:
        self.fingerprint, self.good_at, self.full_at, self.event_at = fingerprint, now, now, 0.0

    def repaired(self, mechanism: Mechanism | None, now: float) -> str:
        """Count the gap. In words, and honest: nobody knows when it really began. Rules of legacy iptables and entries
        of eBPF are in no event, so what was heard before their repair was something else."""
        bound = now - self.good_at
        heard = self.event_at if mechanism not in ("iptables-legacy", "ebpf") else 0.0
        gap = now - heard if heard else bound
        self.gap_s += gap
        self.last_gap_s = gap
        seen = f"{gap:.3f} s after the event was seen, " if heard else ""
        return f"{seen}at most {bound:.3f} s after it was changed"


def scope_of(traffic: Traffic) -> Scope:
    """The same fields, of which `redirect` has a class of its own."""
    return Scope(**asdict(traffic))
