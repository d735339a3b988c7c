"""From an accepted connection to the thing that serves it: the one place where protocols are decided.

Outbound, by destination:

=====================  ==============================================================================
the listener itself    refused (LOOP)
a VIP and its port     ``tcp``: relayed. ``http``: HTTP, anything else refused. ``auto``: HTTP if it looks so,
                       else relayed. Where a TCPRoute holds and no HTTPRoute, all is relayed
VIP of a host of an    to that host. ``tcp``: relayed. ``tls``: relayed if SNI is the host or absent. ``http``: HTTP,
ExternalService        each request whose Host is the host or absent. Another host that an ExternalService has on
                       this port: to that one. Anything else refused
a VIP, another port    refused (NO_ROUTE)
a workload's address   not routed; HTTP if it looks so and the port is not declared otherwise, else relayed;
                       mesh TLS if the workload is meshed
endpoint of a service  relayed
within `networks` of   to that address. ``tcp``: relayed. ``tls``, ``http``: what is that; of hosts, if it has any.
an ExternalService     Else as any other address
any other address      TLS whose SNI, or HTTP whose Host, is a host of an ExternalService on this port: to what that
                       name stands for, not to the address that was dialled. Else by ``outboundPolicy``: ``allow``
                       relays to the address; ``deny`` refuses, HTTP with an answer that says why
=====================  ==============================================================================

Nobody waits for the first octets of a connection that may be relayed whatever they are: an address within `networks`
of a ``tcp`` port, and under ``allow`` a port on which no ExternalService is known by name. Elsewhere they decide, so a
protocol in which the server speaks first has to be declared as ``tcp``.

Inbound, by the first octets: mesh TLS is terminated and its ALPN says what is inside. Without it: under
STRICT refused (HTTP gets an answer that says why), else HTTP or relayed. Silence is waited for longer under
STRICT, since there the server never speaks first.

HTTP is HTTP/1.1, or HTTP/2 by its preface ("prior knowledge"); of mesh TLS the ALPN protocol says which, and whether
what comes in HTTP/2 was so before the agents. HTTP/2 in TLS of the applications is relayed, as all TLS of theirs.

What began as HTTP may and then stopped is HTTP/1.1 where the port is not ``tcp``. What is relayed inbound on an
``auto`` port (the client was silent, or its agent found no HTTP) is guarded: a request that comes later ends it, since
its ``x-forwarded-client-cert`` would reach the application as the client wrote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

from ..accept.listener import Accepted, detect, server_name
from ..accept.sniff import Protocol
from ..addr import OriginalDst, ServiceKey, is_loopback
from ..config.shard import AppProtocol, WorkloadShard
from ..decide.egress import UNKNOWN, host_name
from ..decide.route import Choice
from ..errors import IdentityError, Reason, Refused, UpstreamError
from ..identity.spiffe import SpiffeVerifier
from ..identity.tls import ALPN_H2, ALPN_H2_HTTP1, ALPN_HTTP1, ContextCache, TlsStream
from ..stream import Stream
from ..tcp import accepted as tcp_accepted
from .connection import HttpConnection
from .downstream_h2 import Http2Downstream
from .egress import count, dial_out
from .facts import dial, mesh_identity, must_be_mesh_tls, parties, security
from .logged import log_connection
from .services import Facts, Services
from .tcp import TcpRelay

ALPN_TCP = "netproxy/tcp"
_TLS = (Protocol.TLS, Protocol.MESH_TLS)
_HTTP = (Protocol.HTTP1, Protocol.HTTP2, Protocol.STALLED_HTTP)
_ALPN_HTTP2 = (ALPN_H2, ALPN_H2_HTTP1)
_GAVE_UP = (None, Protocol.STALLED_HTTP, Protocol.STALLED)


class Server:
    """Serves accepted connections of all workloads of a worker."""

    def __init__(self, services: Services, contexts: ContextCache) -> None:
        self._services = services
        self._contexts = contexts

    async def serve(self, accepted: Accepted, families: frozenset[int]) -> None:
        """Until the connection is handed to its relay. Every way out closes or hands over the socket."""
        services = self._services
        shard = services.tables.workloads.get(accepted.workload)
        if shard is None or len(services.live) >= services.tables.mesh.max_connections:
            services.recorder.arena.count("refused_connections", detail="UO" if shard else "NC")
            if shard is not None and services.access.on:
                dst = accepted.dst or OriginalDst("", 0)
                facts = Facts(accepted.workload, shard, families, accepted.inbound, accepted.client, dst)
                who = (parties(facts, services, None), security(facts, None))
                log_connection(services, facts, None, who=who, reason=Reason.OVERLOADED)
            reset(accepted.sock)
            return
        if accepted.dst is None or (accepted.inbound and is_loopback(accepted.dst.host)):
            # What comes in by lo is never steered: loopback is the inbound listener's own address, to dial it a loop.
            dst, reason = OriginalDst("", 0), Reason.LOOP
        else:
            dst, reason = accepted.dst, Reason.OK
        facts = Facts(accepted.workload, shard, families, accepted.inbound, accepted.client, dst)
        facts.began = services.now()
        if reason is not Reason.OK:
            self._refuse(accepted.sock, facts, reason)
            return
        try:
            if accepted.inbound:
                await self._inbound(accepted.sock, facts)
            else:
                await self._outbound(accepted.sock, facts)
        except (OSError, asyncio.CancelledError) as exc:
            reset(accepted.sock)
            if isinstance(exc, asyncio.CancelledError):
                raise

    # -- outbound -----------------------------------------------------------------------------------

    async def _outbound(self, sock: socket.socket, facts: Facts) -> None:
        tables, dst = self._services.tables, facts.dst
        facts.port = tables.service_at(dst.host, dst.port)
        if facts.port is not None:
            spec = facts.port.spec
            declared: AppProtocol = "tcp" if spec.tcp_rule is not None and spec.rules is None else spec.protocol
        elif tables.egress.at_vip(dst.host, dst.port) is not None:
            await self._leave(sock, facts)
            return
        elif tables.is_vip(dst.host):
            self._refuse(sock, facts, Reason.NO_ROUTE)
            return
        else:
            workload = tables.workload_at(dst.host)
            if workload is not None:
                declared = declared_protocol(workload, dst.port, tables.mesh.opaque_ports)
            elif tables.is_endpoint(dst.host, dst.port):
                declared = "tcp"
            else:
                await self._leave(sock, facts)
                return
        verdict = await detect(sock, tables.mesh.detect_timeout_s) if declared != "tcp" else Protocol.OPAQUE
        if declared == "auto":
            self._count_timeout(facts, verdict)
        if declared == "http" and verdict not in (None, *_HTTP):
            self._refuse(sock, facts, Reason.PROTOCOL_MISMATCH)
            return
        stream = await self._accepted(sock)
        if declared == "http" or (declared == "auto" and verdict in _HTTP):
            self._http(stream, facts, is_http2=verdict is Protocol.HTTP2)
        else:
            await self._relay(stream, facts)

    async def _leave(self, sock: socket.socket, facts: Facts) -> None:
        """To the host of an ExternalService, or to an address that is nobody's."""
        services, dst, tables = self._services, facts.dst, self._services.tables
        egress = tables.egress
        at_vip = egress.at_vip(*dst)
        facts.egress = at_vip or UNKNOWN
        permission = egress.opaque(dst)
        protocol, claimed, is_http2 = "tcp", "", False
        if permission is None and (at_vip is not None or tables.mesh.outbound_policy == "deny" or egress.asks(dst)):
            verdict = await detect(sock, tables.mesh.detect_timeout_s)
            if verdict in _GAVE_UP:
                services.recorder.arena.count("protocol_detection_timeouts", detail="egress")
            if verdict in _TLS:
                protocol, claimed = "tls", server_name(sock)
                permission = egress.tls(dst, host_name(claimed))
            elif verdict in _HTTP or (verdict is None and egress.expects_http(dst)):
                protocol, is_http2 = "http", verdict is Protocol.HTTP2
        # The configuration may be another one by now.
        denied = at_vip is not None or tables.mesh.outbound_policy == "deny"
        if protocol == "http" and (denied or egress.expects_http(dst) or egress.knows(dst.port, "http")):
            # Each request is decided by its Host, and a refusal can be told.
            self._http(await self._accepted(sock), facts, is_http2=is_http2)
            return
        if permission is None:
            count(services, "denied" if denied else "allowed", protocol)
            if denied:
                self._refuse(sock, facts, Reason.EGRESS_DENIED, f"SNI {claimed!r}" if protocol == "tls" else "")
                return
        facts.egress = permission or UNKNOWN
        await self._relay(await self._accepted(sock), facts)

    async def _accepted(self, sock: socket.socket) -> Stream:
        return await tcp_accepted(self._services.loop, sock, None, high_water=self._services.tables.mesh.buffer_bytes)

    # -- inbound ------------------------------------------------------------------------------------

    async def _inbound(self, sock: socket.socket, facts: Facts) -> None:
        mesh, dst = self._services.tables.mesh, facts.dst
        strict = must_be_mesh_tls(facts, facts.shard)
        declared = declared_protocol(facts.shard, dst.port, mesh.opaque_ports)
        verdict = await detect(sock, mesh.header_timeout_s if strict else mesh.detect_timeout_s)
        if declared == "auto":
            self._count_timeout(facts, verdict)
        if strict and verdict not in (Protocol.MESH_TLS, Protocol.HTTP1, Protocol.HTTP2):
            self._refuse(sock, facts, Reason.MTLS_REQUIRED)
            return
        if declared == "http" and verdict not in (None, Protocol.MESH_TLS, *_HTTP):
            self._refuse(sock, facts, Reason.PROTOCOL_MISMATCH)
            return
        stream = await self._accepted(sock)
        if verdict is Protocol.MESH_TLS:
            secured = await self._terminate(stream, facts)
            if secured is None:
                return
            stream = secured
            is_http2 = secured.alpn in _ALPN_HTTP2
            facts.as_http1 = secured.alpn == ALPN_H2_HTTP1
            http = is_http2 or secured.alpn == ALPN_HTTP1
            if declared == "http" and not http:
                self._refuse_stream(stream, facts, Reason.PROTOCOL_MISMATCH)
                return
        else:
            is_http2 = verdict is Protocol.HTTP2
            http = declared != "tcp" and (verdict in _HTTP or declared == "http")
        if http:
            # Without mesh TLS under STRICT each request is refused with the reason.
            self._http(stream, facts, is_http2=is_http2)
        elif strict and not facts.peer:
            self._refuse_stream(stream, facts, Reason.MTLS_REQUIRED)
        else:
            await self._relay(stream, facts, guarded=declared == "auto")

    async def _terminate(self, stream: Stream, facts: Facts) -> TlsStream | None:
        """Mesh TLS as this workload; fills in the peer's identity. None: it failed and is closed."""
        stream.pause_reading()
        try:
            svid = self._services.tables.svids.get(facts.shard.identity)
            if svid is None:
                raise IdentityError(f"no certificate for {facts.shard.identity} yet")
            mesh = self._services.tables.mesh
            verifier = SpiffeVerifier(mesh.trust_domain)
            secured, facts.peer = await self._contexts.accept(stream, svid, verifier, mesh.handshake_timeout_s)
            facts.peer_sha256 = secured.peer_sha256() or ""
        except (IdentityError, TimeoutError, OSError) as exc:
            self._services.recorder.arena.count("tls_handshake_failures", detail=type(exc).__name__)
            detail = str(exc) or "the TLS handshake did not end in time"
            self._refuse_stream(stream, facts, Reason.IDENTITY_MISMATCH, detail=detail)
            return None
        secured.pause_reading()
        return secured

    # -- both ---------------------------------------------------------------------------------------

    def _http(self, stream: Stream, facts: Facts, *, is_http2: bool) -> None:
        if is_http2:
            Http2Downstream(stream, facts, self._services)
        else:
            HttpConnection(stream, facts, self._services)

    async def _relay(self, stream: Stream, facts: Facts, *, guarded: bool = False) -> None:
        services = self._services
        stream.pause_reading()
        choice: Choice | None = None
        try:
            if facts.egress is not None:
                upstream, choice = await dial_out(services, facts, facts.egress, (ALPN_TCP,))
            else:
                if facts.port is not None:
                    choice = services.tables.tcp(facts.port, facts.families)
                else:
                    choice = Choice(ServiceKey(""), services.tables.direct(facts.dst.host, facts.dst.port), "", 0.0)
                state = choice.endpoint
                state.outstanding += 1
                try:
                    upstream = await dial(services, facts, choice, state.addr, (ALPN_TCP,))
                except BaseException:
                    state.outstanding -= 1
                    raise
        except (Refused, UpstreamError) as exc:
            self._refuse_stream(stream, facts, exc.reason, choice, detail=str(exc))
            return
        except BaseException:
            stream.abort()
            raise
        # A stream that was closed meanwhile tells its new sink, so the relay ends by itself.
        TcpRelay(
            stream,
            upstream,
            services,
            facts=facts,
            choice=choice,
            parties=parties(facts, services, choice),
            security=security(facts, choice),
            guarded=guarded,
        )

    def _count_timeout(self, facts: Facts, verdict: Protocol | None) -> None:
        if verdict in _GAVE_UP:
            self._services.recorder.arena.count("protocol_detection_timeouts", detail=str(facts.dst))

    def _count(self, facts: Facts, reason: Reason, choice: Choice | None = None, detail: str = "") -> None:
        who = parties(facts, self._services, choice)
        secure = "mutual_tls" if facts.peer or (choice and mesh_identity(facts, choice)) else "none"
        self._services.recorder.connection_opened(who, secure)
        self._services.recorder.connection_closed(who, secure, reason, (0, 0))
        if self._services.access.on:
            log_connection(self._services, facts, choice, who=(who, secure), reason=reason, detail=detail)

    def _refuse(self, sock: socket.socket, facts: Facts, reason: Reason, detail: str = "") -> None:
        self._count(facts, reason, detail=detail)
        reset(sock)

    def _refuse_stream(
        self, stream: Stream, facts: Facts, reason: Reason, choice: Choice | None = None, *, detail: str = ""
    ) -> None:
        self._count(facts, reason, choice, detail)
        stream.abort()


def declared_protocol(workload: WorkloadShard, port: int, opaque_ports: tuple[int, ...]) -> AppProtocol:
    """What the workload says of its port; the opaque ports are TCP unless it says otherwise."""
    declared = workload.protocols.get(port)
    if declared is not None:
        return declared
    return "tcp" if port in opaque_ports else "auto"


def reset(sock: socket.socket) -> None:
    """Close with RST: a refusal must not look like a service that had nothing to say."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        sock.close()
