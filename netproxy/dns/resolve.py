"""Names outside of the mesh for our own use, as the workload's resolvers know them.

Cached are addresses for their TTL, within `MIN_TTL_S` and `MAX_TTL_S`, and failures for `NEGATIVE_S`. While the
resolvers fail, addresses that were good before go on being used for `STALE_S` more (RFC 8767): a connection to an
address that is probably right is worth more than none. A name that the resolvers say does not exist is forgotten at
once.

Threat: who answers decides where a call that ``outboundPolicy: deny`` allows by name goes. Then only resolvers are
asked that are not the workload's own choice (`WorkloadShard.trusted_nameservers`), and no answer of others is used.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from ..addr import WorkloadKey, canonical_ip
from ..errors import Reason, UpstreamError
from .answer import MAX_PAYLOAD
from .forward import Count, Forwarder
from .names import Names

MIN_TTL_S = 1.0
MAX_TTL_S = 60.0
NEGATIVE_S = 2.0
STALE_S = 3600.0
MAX_NAMES = 4096
_MAX_ADDRESSES = 64

_Key = tuple[WorkloadKey, str, int, tuple[str, ...]]
"""Workload, name, IP family, resolvers."""


@dataclass(slots=True)
class _Known:
    """`addresses` are empty for a failure, whose error is `why`. Asked again after `until`; good until `stale_until`
    if that fails.
    """

    addresses: tuple[str, ...]
    until: float
    stale_until: float
    why: str = ""


class HostResolver:
    """A `relay.services.Resolver`. `now` is a clock that only goes forward, in seconds."""

    def __init__(self, forwarder: Forwarder, names: Names, now: Callable[[], float], count: Count) -> None:
        self._forwarder = forwarder
        self._names = names
        self._now = now
        self._count = count
        self._known: OrderedDict[_Key, _Known] = OrderedDict()
        self._asking: dict[_Key, asyncio.Task[_Known]] = {}

    async def resolve(self, workload: WorkloadKey, name: str, family: int) -> Sequence[str]:
        """Canonical addresses of `name` in IP family 4 or 6, at least one; no search list is applied.

        May be stale when the resolvers fail. Raises UpstreamError with DNS_FAILED.
        """
        key = (workload, name.lower().rstrip("."), family, self._resolvers(workload))
        known = self._known.get(key)
        if known is None or known.until <= self._now():
            # Who asks for the same waits for the same answer; one that gives up takes it from nobody.
            task = self._asking.get(key)
            if task is None:
                task = self._asking[key] = asyncio.get_running_loop().create_task(self._ask(key))
                task.add_done_callback(lambda _: self._asking.pop(key, None))
            known = await self._wait(task)
        else:
            self._known.move_to_end(key)
        if not known.addresses:
            raise UpstreamError(Reason.DNS_FAILED, known.why)
        return known.addresses

    def _resolvers(self, workload: WorkloadKey) -> tuple[str, ...]:
        shard = self._names.workload(workload)
        if shard is None or not shard.nameservers:
            raise UpstreamError(Reason.DNS_FAILED, "the workload has no resolver")
        if self._names.outbound_policy != "deny":
            return shard.nameservers
        if not shard.trusted_nameservers:
            detail = "outboundPolicy deny trusts no resolver that the workload chose: name them in Workload spec.dns"
            raise UpstreamError(Reason.DNS_FAILED, detail)
        return shard.trusted_nameservers

    @staticmethod
    async def _wait(task: asyncio.Task[_Known]) -> _Known:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and not (current is not None and current.cancelling()):
                raise UpstreamError(Reason.DNS_FAILED, "the workload is gone") from None
            raise

    def drop(self, workload: WorkloadKey) -> None:
        """The workload is gone."""
        for key in [key for key in self._known if key[0] == workload]:
            del self._known[key]
        for key, task in self._asking.items():
            if key[0] == workload:
                task.cancel()

    async def _ask(self, key: _Key) -> _Known:
        workload, name, family, resolvers = key
        old = self._known.get(key)
        try:
            found = await self._answer(workload, name, family, resolvers)
        except UpstreamError as exc:
            now = self._now()
            if old is not None and old.addresses and now < old.stale_until:
                self._count("dns_stale")
                found = _Known(old.addresses, now + NEGATIVE_S, old.stale_until)
            else:
                found = _Known((), now + NEGATIVE_S, 0.0, f"{name}: {exc.detail}")
        self._known[key] = found
        self._known.move_to_end(key)
        while len(self._known) > MAX_NAMES:
            self._known.popitem(last=False)
        return found

    async def _answer(self, workload: WorkloadKey, name: str, family: int, resolvers: tuple[str, ...]) -> _Known:
        """Raises UpstreamError when nobody can say; a name that does not exist is an answer."""
        kind = dns.rdatatype.AAAA if family == 6 else dns.rdatatype.A
        try:
            query = dns.message.make_query(dns.name.from_text(name), kind, use_edns=0, payload=MAX_PAYLOAD).to_wire()
            answer = dns.message.from_wire(await self._forwarder.ask(workload, resolvers, query, stream=False))
            if answer.flags & dns.flags.TC:
                answer = dns.message.from_wire(await self._forwarder.ask(workload, resolvers, query, stream=True))
            if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                raise UpstreamError(Reason.DNS_FAILED, f"the resolver answered {dns.rcode.to_text(answer.rcode())}")
            chain = dns.message.QueryMessage.resolve_chaining(answer)  # type: ignore[arg-type]  # it was a query
        except (dns.exception.DNSException, UnicodeError, ValueError) as exc:
            raise UpstreamError(Reason.DNS_FAILED, f"no usable answer: {exc!r}") from exc
        now = self._now()
        if chain.answer is None:
            return _Known((), now + NEGATIVE_S, 0.0, f"{name} has no address of family IPv{family}")
        ttl_s = min(max(float(chain.minimum_ttl), MIN_TTL_S), MAX_TTL_S)
        addresses = tuple(dict.fromkeys(canonical_ip(rdata.to_text()) for rdata in chain.answer))
        return _Known(addresses[:_MAX_ADDRESSES], now + ttl_s, now + ttl_s + STALE_S)
