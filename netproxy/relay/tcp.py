"""Opaque bytes between two streams, each way by itself, with backpressure and half-close.

A direction ends with its reader's end of stream, which is passed on as such. When both have ended, both
streams are closed; when one breaks, the other is reset, so that nobody takes a torn connection for a
complete one.

A guarded relay looks at the client's first octets until they are decided: an HTTP request ends it with
PROTOCOL_MISMATCH before a single field has passed. Nothing is held back meanwhile, so no protocol waits for it.
"""

from __future__ import annotations

from ..accept.sniff import TLS_HANDSHAKE, Protocol, sniff
from ..decide.route import Choice
from ..errors import Reason
from ..observe.record import Parties
from ..stream import Stream
from .egress import Standing
from .facts import must_be_mesh_tls
from .logged import log_connection
from .services import Facts, Services


class _Side:
    """Sink of one stream; what it receives goes to `peer`'s stream."""

    __slots__ = ("ended", "guarded", "moved", "peer", "relay", "stream")

    peer: _Side

    def __init__(self, relay: TcpRelay, stream: Stream) -> None:
        self.relay = relay
        self.stream = stream
        self.moved = 0
        self.ended = False
        self.guarded: bytes | None = None
        """What came while its verdict is open, at most one read more than is ever sniffed; None: no guard."""

    def data_received(self, data: bytes) -> None:
        if self.guarded is not None and not self._admits(data):
            self.relay.finish(Reason.PROTOCOL_MISMATCH)
            return
        self.moved += len(data)
        self.relay.active = True
        self.peer.stream.write(data)

    def _admits(self, data: bytes) -> bool:
        assert self.guarded is not None
        self.guarded += data
        if self.guarded[:1] == TLS_HANDSHAKE:
            # It can't become a request, and to look through it with every octet that comes would be costly.
            self.guarded = None
            return True
        verdict = sniff(self.guarded)
        if verdict is not None:
            self.guarded = None
        return verdict not in (Protocol.HTTP1, Protocol.HTTP2)

    def eof_received(self) -> None:
        self.ended = True
        if self.peer.ended:
            self.relay.finish(Reason.OK)
        else:
            self.peer.stream.write_eof()

    def writable(self, ok: bool) -> None:
        if ok:
            self.peer.stream.resume_reading()
        else:
            self.peer.stream.pause_reading()

    def closed(self, exc: Exception | None) -> None:
        self.relay.side_closed(self, exc)


class TcpRelay:
    """Takes over both streams. The endpoint of `choice` counts one outstanding until the end.

    `guarded`: no HTTP may come.
    """

    def __init__(
        self,
        downstream: Stream,
        upstream: Stream,
        services: Services,
        *,
        facts: Facts,
        choice: Choice,
        parties: Parties,
        security: str,
        guarded: bool = False,
    ) -> None:
        self.workload = facts.workload
        self._facts = facts
        self._standing = Standing(services, facts, facts.egress) if facts.egress is not None else None
        self.active = True
        self._services = services
        self._parties = parties
        self._security = security
        self._choice = choice
        self._done = False
        self._open_sides = 2
        self._last = services.now()
        self._down = _Side(self, downstream)
        self._up = _Side(self, upstream)
        self._down.peer, self._up.peer = self._up, self._down
        if guarded:
            self._down.guarded = b""
        services.live.add(self)
        services.recorder.opened()
        services.recorder.connection_opened(parties, security)
        downstream.sink, upstream.sink = self._down, self._up
        for stream in (downstream, upstream):
            stream.resume_reading()

    def __repr__(self) -> str:
        return f"<TcpRelay {self._parties.source_workload} -> {self._parties.destination_workload}>"

    def side_closed(self, side: _Side, exc: Exception | None) -> None:
        self._open_sides -= 1
        if not self._open_sides:
            self._services.live.discard(self)
        if side.ended and side.peer.ended and exc is None:
            self.finish(Reason.OK)
        else:
            self.finish(Reason.DOWNSTREAM_CLOSED if side is self._down else Reason.UPSTREAM_CLOSED)

    def finish(self, reason: Reason) -> None:
        if self._done:
            return
        self._done = True
        self._last = self._services.now()
        self._choice.endpoint.outstanding -= 1
        self._services.recorder.gone()
        moved = (self._down.moved, self._up.moved)
        self._services.recorder.connection_closed(self._parties, self._security, reason, moved)
        if self._services.access.on:
            who = (self._parties, self._security)
            log_connection(self._services, self._facts, self._choice, who=who, reason=reason, moved=moved)
        for side in (self._down, self._up):
            if reason is Reason.OK:
                # Each peer has said its last; what is still queued (the final octets, our FIN) goes out first.
                if not side.stream.closing:
                    side.stream.write_eof()
                side.stream.close()
            else:
                side.stream.abort()

    def check(self, now: float) -> None:
        if self._done:
            # All was said, but somebody does not read it: the queue must not live for ever.
            if now - self._last >= self._services.tables.mesh.idle_timeout_s:
                self._down.stream.abort()
                self._up.stream.abort()
            return
        shard = self._services.tables.workloads.get(self.workload)
        if shard is not None and must_be_mesh_tls(self._facts, shard):
            # The policy changed under us: of the connections that exist it ends just those that it denies.
            self.finish(Reason.MTLS_REQUIRED)
            return
        if self._standing is not None and not self._standing.is_good:
            self.finish(Reason.EGRESS_DENIED)
            return
        if self.active:
            self.active = False
            self._last = now
        elif now - self._last >= self._services.tables.mesh.tcp_idle_timeout_s:
            self.finish(Reason.IDLE_TIMEOUT)

    def drain(self) -> None:
        """Opaque bytes have no good place to stop: they go on until they end or the drain does."""

    def abort(self) -> None:
        self.finish(Reason.DRAINING)
        self._down.stream.abort()
        self._up.stream.abort()
