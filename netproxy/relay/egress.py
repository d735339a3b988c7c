"""What leaves the mesh: is it allowed, and what is dialled for it.

`decide.egress` gives permissions by what SNI or Host says; here they become addresses. What a name stands for is found
out by the workload's own resolver, never by the client: the address that it dialled with that name is not used.

An answer of the resolver is somebody else's word as well. It may not lead to loopback, link-local (where clouds have
their metadata), multicast or unspecified addresses, nor to a VIP, also not as IPv4 within IPv6; what it leads to inside
of the mesh is reached as everything there, by mesh TLS.

Of several addresses the next one is tried when one can't be connected to, at most `MAX_TRIES` of them, all within the
one connect timeout of the mesh: each gets an equal part of what is left.
"""

from __future__ import annotations

import ipaddress

from ..addr import ServiceKey
from ..codec.events import RequestHead
from ..decide.egress import UNKNOWN, Permission, host_of
from ..decide.route import Choice, EndpointState
from ..errors import Reason, Refused, UpstreamError
from ..stream import Stream
from .exchange import origin_form
from .facts import dial
from .services import Facts, Services

MAX_TRIES = 3
NEXT_AFTER = frozenset((Reason.CONNECT_FAILED, Reason.CONNECT_TIMEOUT))
"""How an attempt ends that another address may follow."""


class Standing:
    """Is what was permitted still permitted? Asked of every live connection twice a second."""

    __slots__ = ("_facts", "_services", "_version", "permission")

    def __init__(self, services: Services, facts: Facts, permission: Permission) -> None:
        self.permission = permission
        self._services = services
        self._facts = facts
        self._version = -1
        """Of the tables, when it was. Not yet that of the permission: much may have changed while we dialled."""

    @property
    def is_good(self) -> bool:
        tables = self._services.tables
        if self._version == tables.egress_version:
            return True
        if self.permission.external is not None:
            good = tables.egress.still(self.permission, self._facts.dst)
        else:
            good = tables.mesh.outbound_policy != "deny" or self._is_known()
        if good:
            self._version = tables.egress_version
        return good

    def _is_known(self) -> bool:
        """Would the address be dialled for a new connection too?"""
        tables, dst = self._services.tables, self._facts.dst
        if tables.workload_at(dst.host) is not None or tables.is_endpoint(*dst):
            return True
        return tables.egress.opaque(dst) is not None


def count(services: Services, result: str, protocol: str) -> None:
    """`result`: ``allowed`` (what nobody declared, let through) or ``denied``. Not by destination: clients choose."""
    services.recorder.arena.count(f"egress_{result}", detail=protocol)


def http_permission(services: Services, facts: Facts, head: RequestHead) -> Permission:
    """Of one request, by its Host. Raises Refused with EGRESS_DENIED."""
    tables, dst = services.tables, facts.dst
    authority = _authority(head)
    permission = tables.egress.http(dst, host_of(authority))
    if permission is not None:
        return permission
    # A VIP means its host or nothing, also when it is gone meanwhile.
    vip = tables.is_vip(dst.host) or (facts.egress is not None and facts.egress.how == "vip")
    if not vip and tables.mesh.outbound_policy != "deny":
        count(services, "allowed", "http")
        return UNKNOWN
    count(services, "denied", "http")
    raise _refused(services, facts, authority, vip=vip)


def _authority(head: RequestHead) -> str:
    if head.method == b"CONNECT" and not head.protocol:
        return head.target.decode("latin-1")
    authority = origin_form(head.target)[1] or b",".join(value for name, value in head.headers if name == b"host")
    return authority.decode("latin-1")


def _refused(services: Services, facts: Facts, authority: str, *, vip: bool) -> Refused:
    at_vip = services.tables.egress.at_vip(*facts.dst)
    if at_vip is not None and at_vip.external is not None:
        title, spec = at_vip.external.title, at_vip.external.spec
        if spec.protocol != "http":
            return Refused(Reason.EGRESS_DENIED, f"port {spec.port} of {title} is declared as {spec.protocol}", title)
        detail = f"{facts.dst} is the address of {at_vip.name}, and Host says {authority[:200]!r}"
        return Refused(Reason.EGRESS_DENIED, detail, title)
    if vip:
        return Refused(Reason.EGRESS_DENIED, f"nothing is at {facts.dst} any more", "")
    host = host_of(authority) or facts.dst.host
    kind = "hosts" if host_of(authority) else "addresses"
    port = facts.dst.port
    detail = (
        f"no ExternalService allows {host} on port {port}. One with {kind}: [{host}] and "
        f"ports: [{{port: {port}, protocol: HTTP}}] would, and so would outboundPolicy: allow in MeshConfig"
    )
    return Refused(Reason.EGRESS_DENIED, detail, "MeshConfig outboundPolicy")


class Targets:
    """The addresses that a permission leads to, best first. A name is only resolved when `next` needs it."""

    def __init__(self, services: Services, facts: Facts, permission: Permission) -> None:
        self.permission = permission
        self.standing = Standing(services, facts, permission)
        self._services = services
        self._facts = facts
        self._until = 0.0
        self._tries = 0
        self._ready: list[EndpointState] = []
        self._failed: UpstreamError | None = None
        self._families: list[int] = []
        tables, dst = services.tables, facts.dst
        if permission.external is None or not permission.name:
            self._ready = [tables.direct(dst.host, dst.port)]
        elif permission.external.shard.endpoints:
            self._ready = tables.declared(permission.external, facts.families)
        else:
            # The family that the client chose goes first.
            first = 6 if ":" in dst.host else 4
            self._families = sorted(facts.families, key=lambda family: (family != first, family))

    @property
    def title(self) -> str:
        external = self.permission.external
        return external.title if external is not None else ""

    def choice(self, state: EndpointState) -> Choice:
        external = self.permission.external
        return Choice(external.service if external is not None else ServiceKey(""), state, self.title, 0.0)

    async def next(self) -> EndpointState | None:
        """None: there is no other one, or enough have been tried. Raises UpstreamError when there is none at all."""
        if self._tries >= MAX_TRIES:
            return None
        while not self._ready and self._families:
            try:
                self._ready = await self._resolve(self._families.pop(0))
            except UpstreamError as exc:
                # What the family that the client chose came to says most.
                self._failed = self._failed or exc
                if not self._families and not self._tries:
                    raise self._failed from None
        if not self._ready:
            if not self._tries:
                raise UpstreamError(Reason.CONNECT_FAILED, "the workload has no address to dial from")
            return None
        self._tries += 1
        return self._ready.pop(0)

    def connect_s(self) -> float:
        """How long the present attempt may take."""
        now = self._services.now()
        if not self._until:
            self._until = now + self._services.tables.mesh.connect_timeout_s
        left = min(MAX_TRIES - self._tries, len(self._ready) + len(self._families))
        return max(0.01, (self._until - now) / (1 + left))

    async def _resolve(self, family: int) -> list[EndpointState]:
        name, external = self.permission.name, self.permission.external
        assert external is not None
        if self._services.resolver is None:
            raise UpstreamError(Reason.DNS_FAILED, f"{name}: there is no resolver, and no endpoints are declared")
        tables = self._services.tables
        found = await self._services.resolver.resolve(self._facts.workload, name, family)
        usable = [host for host in dict.fromkeys(found) if not tables.is_vip(host) and _is_elsewhere(host)]
        if not usable:
            raise UpstreamError(Reason.DNS_FAILED, f"{name} stands for {found[0]}, which can't be outside of the mesh")
        port = external.spec.target_port or external.spec.port
        return [tables.direct(host, port) for host in usable[:MAX_TRIES]]


# IPv4-compatible (RFC 4291 section 2.5.5.1), and what a NAT64 makes IPv4 of (RFC 6052 section 2.1).
_WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96")))


def _is_elsewhere(host: str) -> bool:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and int(address) > 1 and any(address in net for net in _WITH_IPV4):
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


async def dial_out(
    services: Services, facts: Facts, permission: Permission, alpn: tuple[str, ...]
) -> tuple[Stream, Choice]:
    """A stream to what is permitted, and where it goes; its endpoint counts it as outstanding.

    Raises UpstreamError, or Refused with NO_HEALTHY_ENDPOINT.
    """
    targets = Targets(services, facts, permission)
    failed: UpstreamError | None = None
    while (state := await targets.next()) is not None:
        choice = targets.choice(state)
        state.outstanding += 1
        try:
            return await dial(services, facts, choice, state.addr, alpn, connect_s=targets.connect_s()), choice
        except BaseException as exc:
            state.outstanding -= 1
            if not isinstance(exc, UpstreamError) or exc.reason not in NEXT_AFTER:
                raise
            failed = exc
    assert failed is not None
    raise failed
