# cython: annotation_typing=False
"""One request and its response, between the connection of a client and one to an endpoint.

Its two halves move independently::

    request:   reading --End--> sent
    upstream:  none --take/dial/wait--> open --(response End)--> given back or closed
    response:  none --head--> started --End--> done

A head that begins a tunnel (101, 2xx to CONNECT) makes both halves octets: whatever comes from either side goes to the
other, each way ends by itself with its sender's end of stream, and when both have, both connections are closed. From
then on it is checked, drained and aborted as `tcp.TcpRelay` is, and it is one request still, counted at its end.

It ends exactly once, in `_finish`, with exactly one Reason. Before the response has started a failure is
answered (problem+json, or as gRPC does); after that the downstream connection is reset, since a clean close could pass
for a complete body (of gRPC, see there).

The deadline of a gRPC request is its grpc-timeout or the route's request timeout, what ends earlier, from the end of
its head; what the endpoint is told is what is left of it.

An exchange in which no octet moves for `idle_timeout_s` ends, so a slow body or a slow reader that moves at all goes
on: it costs a connection on both sides, and no memory.

The upstream is a connection of HTTP/1.1 that it has for itself, or a stream of HTTP/2 on one that it shares: see
`_connect` for which.

1xx answers go on to HTTP/1.1 clients, to HTTP/1.0 never. What else is sent again, see `replay`; who says 100, `expect`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..addr import ServiceKey
from ..codec import fields
from ..codec.events import (
    Data,
    End,
    Event,
    Informational,
    RequestHead,
    Reset,
    ResponseHead,
    Trailers,
)
from ..codec.fields import seen_in
from ..decide.route import Choice
from ..errors import Grpc, LocalProtocolError, Reason, Refused, RemoteProtocolError, UpstreamError
from ..identity.tls import ALPN_H2, ALPN_H2_HTTP1, ALPN_HTTP1
from ..observe.access import Outcome
from ..observe.record import Parties, Who
from ..observe.spans import Span
from ..upstream.pool import PoolKey
from .downstream import Downstream, answer
from .egress import NEXT_AFTER, Targets, http_permission
from .exchange import (
    RequestEdits,
    asks_for_tunnel,
    authority_of,
    edit_request,
    edit_response,
    expectations,
    fits_http2,
    origin_form,
    request_for_match,
    switches_as_asked,
    without_ours,
    xfcc_value,
)
from .expect import CONTINUE, Expectation
from .facts import Path, dial, must_be_mesh_tls, parties, path_to, security
from .grpc import (
    NO_STATUS,
    error_fields,
    is_grpc,
    may_end_early,
    sentence,
    status_of,
    status_of_reset,
    timeout_s,
    with_timeout,
)
from .logged import Ended, log_request
from .replay import Replay, replay_of
from .shared import Wanted
from .trace import Trace, begin, traced
from .upstream import Requester, Upstream, UpstreamHttp

if TYPE_CHECKING:
    from .shared import Waiter
    from .upstream_h2 import Http2Request

_OK, _DOWNSTREAM_CLOSED = Reason.OK, Reason.DOWNSTREAM_CLOSED
# As C knows them.
_EXPECT, _UPGRADE, _REQUEST_ID = fields.EXPECT, fields.UPGRADE, fields.REQUEST_ID
_NAMING, _TRACE = fields.NAMING, fields.TRACE

# Why the client's connection is not read, of its `hold`.
_CONNECTING, _UPSTREAM_FULL = 1, 2


def begin_exchange(connection: Downstream, head: RequestHead) -> None:
    """Decide about a request of the client and go on with it: from now on its connection has an `Exchange`."""
    exchange = Exchange.__new__(Exchange)  # a constructor with arguments costs three times as much
    exchange._begin(connection, head)
    connection.attach(exchange)
    exchange._start()


class Exchange(Requester):
    """One request and its response."""

    def _begin(self, connection: Downstream, head: RequestHead) -> None:
        self._connection = connection
        self._services = connection.services
        self._facts = connection.facts
        self._head = head
        self._path: Path | None = None
        """To `_choice`."""
        self._started = connection.activity
        self._choice: Choice | None = None
        self._targets: Targets | None = None
        """Where the request may go, when it leaves the mesh."""
        self._failed: UpstreamError | None = None
        """Why the last of them could not be had."""
        self._key: PoolKey | None = None
        self._is_queuing = True
        """While there is no upstream."""
        self._queue: list[Event] | None = None
        """Events that wait for it, from the head on; None while that is all."""
        self._sent_head = head
        """As it goes on, once that is decided."""
        self._replay: Replay | None = None
        self._expectation: Expectation | None = None
        self._tunnel = False
        self._ended_in = self._ended_out = False
        """Which ways of the tunnel are over: the client's, the upstream's."""
        self._request_sent = self._response_started = self._response_done = self._done = False
        self._upstream: Upstream | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiter: Waiter | None = None
        """While it waits for a shared connection, under `_key`."""
        self._timer: asyncio.TimerHandle | None = None
        self._trace: Trace | None = None
        self._status = 0
        self._is_grpc = head.method == b"POST" and is_grpc(head)
        self._grpc_status = NO_STATUS
        self._deadline = 0.0
        """Of a request that has a grpc-timeout; 0.0: none."""
        self._ends_early = False
        """Trailers of ours can end the response that has begun."""
        self._moved_in = self._moved_out = 0
        # For the access log; the times only if it was on at first.
        self._attempts = 0
        self._reused = False
        self._is_logged = connection.services.access.on
        self._connected_at = self._head_at = 0.0

    def __repr__(self) -> str:
        where = self._key.endpoint if self._key else "-"
        return f"{self._head.method!r} {self._head.target[:80]!r} -> {where}"

    # -- decide and connect -------------------------------------------------------------------------

    def _start(self) -> None:
        facts = self._facts
        if self._head.seen < 0:
            self._head.seen = seen_in(self._head.headers)
        if self._head.seen & _EXPECT and not self._expects():
            return
        if self._is_grpc and not self._set_deadline():
            return
        choice: Choice | None = None
        try:
            if facts.egress is not None:
                self._targets = Targets(self._services, facts, http_permission(self._services, facts, self._head))
            else:
                choice = self._decide()
        except Refused as exc:
            self._refuse(exc.reason, exc.detail, exc.decided_by)
            return
        self._sent_head = self._request_head()
        if choice is not None:
            self._choice = choice  # now, since it counts as outstanding from here to the end
            self._go(choice)
        else:
            self._aim()

    def _set_deadline(self) -> bool:
        """False: it can't be read, or has passed."""
        try:
            seconds = timeout_s(self._head.headers)
        except ValueError as exc:
            self._refuse(Reason.DOWNSTREAM_PROTOCOL, str(exc))
            return False
        if seconds > 0:
            self._deadline = self._started + seconds
            self._timer = self._services.loop.call_later(seconds, self._deadline_passed, seconds)
        elif not seconds:
            self._refuse(Reason.UPSTREAM_TIMEOUT, "the grpc-timeout is 0")
        return bool(seconds)

    def _expects(self) -> bool:
        """False: something that we do not know, and it is refused."""
        expected = expectations(self._head)
        if any(expectation != CONTINUE for expectation in expected):
            self._refuse(Reason.NOT_IMPLEMENTED, "an expectation other than 100-continue", status=417)
            return False
        if expected:
            self._expectation = Expectation(self._say_continue)
        return True

    def _aim(self) -> None:
        """Outside of the mesh an endpoint may have to be found first."""
        self._connection.hold(_CONNECTING, True)
        self._task = self._services.loop.create_task(self._aimed())

    async def _aimed(self) -> None:
        assert self._targets is not None
        try:
            state = await self._targets.next()
        except UpstreamError as exc:
            self._failed = exc
            state = None
        except Exception:
            self._task = None
            self._fail(Reason.INTERNAL, "the endpoint could not be found")
            raise
        self._task = None
        if state is not None:
            self._connection.hold(_CONNECTING, False)
            self._choice = self._targets.choice(state)
            self._go(self._choice)
        elif self._failed is not None:
            self._fail(self._failed.reason, self._failed.detail)

    def _go(self, choice: Choice) -> None:
        choice.endpoint.outstanding += 1
        most_s = choice.request_timeout_s
        if most_s and self._deadline:
            ends = self._services.now() + most_s
            if ends < self._deadline and self._timer is not None:
                self._deadline = ends
                self._timer.cancel()
                self._timer = None
        if most_s and self._timer is None:
            self._timer = self._services.loop.call_later(most_s, self._request_timeout, most_s)
        self._connect(choice)

    def _connect(self, choice: Choice) -> None:
        """The endpoint is spoken to in the version that its port declares, else in that of the request.

        Between agents the ALPN protocol says it: `netproxy/h2` carries what is HTTP/2 at the endpoint, in HTTP/2;
        `netproxy/http/1.1` and `netproxy/h2/http/1.1` (`meshHttp`) what is HTTP/1.1. An agent that does not know HTTP/2
        takes HTTP/1.1 for all. An Upgrade becomes an extended CONNECT where the endpoint is spoken to in HTTP/2 and
        knows that, and is HTTP/1.1 otherwise.
        """
        facts, head = self._facts, self._sent_head
        self._path = path = path_to(facts, self._services, choice)
        tls = path.identity
        is_http2 = self._head.http_version == b"2" and not facts.as_http1
        if choice.http_version:
            is_http2 = choice.http_version == "2"
        if is_http2:
            # An Upgrade that HTTP/2 has no words for, say with content.
            alpn = ALPN_H2 if not self._may_upgrade or asks_for_tunnel(head) is not None else ""
        elif tls is not None and self._services.tables.http1_in_http2 and fits_http2(head):
            alpn = ALPN_H2_HTTP1
        else:
            alpn = ""
        if alpn:
            key = path.shared_keys.get(alpn)
            if key is None:
                name = f"{alpn} {tls}" if tls is not None else ""
                key = path.shared_keys[alpn] = PoolKey(facts.workload, choice.endpoint.addr, name)
            if not self._services.shared.speaks_http1(key):
                self._share(choice, key, (alpn, ALPN_HTTP1))
                return
        self._own(choice)

    def _own(self, choice: Choice) -> None:
        """On a connection of HTTP/1.1 that it has for itself."""
        assert self._path is not None
        self._key = key = self._path.key
        kept = self._services.pool.take(key)
        while kept is not None and kept.stream.is_closing():
            kept = self._services.pool.take(key)
        if kept is not None:
            self._open(kept)
        else:
            self._dial()

    @property
    def _may_upgrade(self) -> bool:
        """False: it does not ask for a tunnel, and nobody needs to look."""
        return bool(self._head.seen & _UPGRADE or self._head.protocol)

    def _share(self, choice: Choice, key: PoolKey, alpn: tuple[str, ...]) -> None:
        """On a connection of HTTP/2 that others use, too."""
        self._key = key
        shared = self._services.shared
        request = shared.take(key)
        if request is not None:
            self.upstream_ready(request)
            return
        connect_s = self._targets.connect_s() if self._targets is not None else 0.0
        assert self._path is not None
        wanted = Wanted(self._facts, choice, alpn, self._path.key, connect_s)
        try:
            self._waiter = shared.wait(key, self, wanted)
        except Refused as exc:
            self._fail(exc.reason, exc.detail)
            return
        self._connection.hold(_CONNECTING, True)

    def upstream_ready(self, upstream: Http2Request) -> None:
        """A stream of a shared connection is ours."""
        if self._waiter is not None:
            self._waiter = None
            self._connection.hold(_CONNECTING, False)
        if self._may_upgrade and asks_for_tunnel(self._sent_head) and not upstream.connect_protocol:
            assert self._choice is not None
            self._own(self._choice)
        else:
            self._open(upstream)

    def upstream_failed(self, exc: UpstreamError) -> None:
        """There is no shared connection."""
        if self._waiter is not None:
            self._waiter = None
            self._dial_failed(exc)

    def upstream_speaks_http1(self) -> None:
        """The endpoint's agent chose it."""
        if self._waiter is None:
            return
        self._waiter = None
        self._connection.hold(_CONNECTING, False)
        assert self._choice is not None
        self._own(self._choice)

    def _decide(self) -> Choice:
        facts, tables = self._facts, self._services.tables
        if facts.inbound and must_be_mesh_tls(facts, tables.workloads.get(facts.workload, facts.shard)):
            detail = f"{facts.workload} accepts mesh TLS only on port {facts.dst.port} (STRICT)"
            raise Refused(Reason.MTLS_REQUIRED, detail, facts.workload)
        if facts.port is None:
            return Choice(ServiceKey(""), tables.direct(facts.dst.host, facts.dst.port), "", 0.0)
        port = facts.table
        if port is None or facts.table_version != tables.version:
            port = tables.ports.get((facts.port.service, facts.port.port))
            if port is None:
                raise Refused(Reason.NO_ROUTE, f"service {facts.port.service} is gone", facts.port.service)
            facts.table, facts.table_version = port, tables.version
        return tables.route(port, request_for_match(self._head), facts.families)

    def _request_head(self) -> RequestHead:
        facts, tables = self._facts, self._services.tables
        edits = facts.edits
        if edits is None or facts.edits_for is not tables.mesh:
            mesh = facts.edits_for = tables.mesh
            edits = facts.edits = RequestEdits(
                xfcc=xfcc_value(facts.shard.identity, facts.peer, facts.peer_sha256) if facts.peer else b"",
                dialled=authority_of(facts.dst.host, facts.dst.port),
                client=facts.client.host.encode() if facts.inbound else b"",
                forwarded=mesh.forwarded,
                via=tables.via,
            )
        if self._targets is not None and self._targets.permission.name:
            edits = edits.dialled_as(authority_of(self._targets.permission.name, facts.dst.port))
        request_id = b""
        seen = self._head.seen
        if tables.gives_ids and (not seen & _REQUEST_ID or seen & _NAMING):
            request_id = self._services.stamps.request_id()
        head = edit_request(self._head, edits, request_id)
        percent = tables.trace_percent
        if percent >= 0.0:
            if not seen & _TRACE:
                self._trace = begin(head.headers, self._services.trace_ids, percent)
            else:
                headers, self._trace = traced(head.headers, self._services.trace_ids, percent)
                head = head.replace(headers=headers)
        return head

    def _dial(self) -> None:
        assert self._key is not None
        if not self._services.pool.reserve(self._key):
            self._fail(Reason.OVERLOADED, f"{self._key.endpoint}: as many connections as allowed are open")
            return
        self._connection.hold(_CONNECTING, True)
        self._task = self._services.loop.create_task(self._dialled())
        self._task.add_done_callback(self._dial_ended)

    def _dial_ended(self, task: asyncio.Task[None]) -> None:
        # Not in the task: one that is cancelled before its first step runs nothing of its own.
        if task.cancelled() and self._key is not None:
            self._services.pool.closed(self._key)

    async def _dialled(self) -> None:
        key, choice = self._key, self._choice
        assert key is not None and choice is not None
        facts = self._facts
        connect_s = self._targets.connect_s() if self._targets is not None else 0.0
        try:
            stream = await dial(self._services, facts, choice, key.endpoint, (ALPN_HTTP1,), connect_s=connect_s)
        except UpstreamError as exc:
            self._services.pool.closed(key)
            self._task = None
            self._dial_failed(exc)
            return
        except Exception:
            # Our bug, for the loop to report. Its client is answered all the same.
            self._services.pool.closed(key)
            self._task = None
            self._fail(Reason.INTERNAL, "the endpoint could not be dialled")
            raise
        self._task = None
        upstream = UpstreamHttp(key, stream, self._services)
        if self._done:
            upstream.idle(self._services.now())
        else:
            self._connection.hold(_CONNECTING, False)
            self._open(upstream)

    def _dial_failed(self, exc: UpstreamError) -> None:
        """Outside of the mesh another address may follow."""
        choice = self._choice
        if self._targets is not None and choice is not None and exc.reason in NEXT_AFTER:
            self._failed = exc
            self._choice = None
            choice.endpoint.outstanding -= 1
            self._aim()
        else:
            self._fail(exc.reason, exc.detail)

    def _open(self, upstream: Upstream) -> None:
        self._upstream = upstream
        if not self._connection.takes_more():
            upstream.hold(True)
        upstream.begin(self)
        # On a fresh one of its own it is no race that is lost, and after a replay there is no other.
        self._reused = reused = upstream.reused
        self._replay = None
        if not self._attempts and (reused or upstream.is_shared):
            self._replay = replay_of(self._sent_head, reused, upstream.is_shared)
        self._attempts += 1
        if self._is_logged:
            self._connected_at = self._services.now()
        self._is_queuing = False
        queue, self._queue = self._queue, None
        if queue is None:
            self._forward(self._sent_head)
        else:
            for event in queue:
                if self._upstream is not upstream:
                    return
                self._forward(event)
        if self._expectation is not None:
            self._expectation.head_sent(self._services.loop, self._services.tables.mesh.expect_continue_timeout_s)

    # -- request side -------------------------------------------------------------------------------

    def _forward(self, event: Event) -> None:
        if self._is_queuing:
            if self._queue is None:
                self._queue = [self._sent_head]
            self._queue.append(event)
        elif self._upstream is not None:
            if self._replay is not None:
                self._replay.keep(event)
            if self._deadline and type(event) is RequestHead:
                event = with_timeout(event, self._deadline - self._services.now())
            try:
                self._upstream.send(event)
            except LocalProtocolError as exc:
                self._fail(Reason.INTERNAL, str(exc))
            except Refused as exc:
                self._fail(exc.reason, exc.detail)

    def request_data(self, event: Data) -> None:
        if self._expectation is not None:
            self._expectation.over()
        self._moved_in += len(event.data)
        self._forward(event)

    def request_trailers(self, event: Trailers) -> None:
        if headers := without_ours(event.headers):
            self._forward(Trailers(1, headers))

    def request_end(self, event: End) -> None:
        if self._tunnel:
            if self._upstream is not None:
                self._upstream.end_sending()
            self._end_way(0)
            return
        if self._expectation is not None:
            self._expectation.over()
        self._request_sent = True
        self._forward(event)

    def _say_continue(self) -> None:
        self._services.recorder.arena.count("expect_continue_timeouts")
        self._connection.send(Informational(1, 100, []))

    def bad_request(self, reason: Reason, exc: RemoteProtocolError) -> None:
        """The body turned out malformed."""
        self._drop_upstream()
        if self._response_started:
            self._finish(reason, reset=True, detail=exc.detail)
        else:
            self._connection.announce_close()
            self._status = self._answer(reason, exc.detail, "", (), exc.status)
            self._finish(reason, must_close=True, detail=exc.detail)

    def downstream_gone(self, reason: Reason = Reason.DOWNSTREAM_CLOSED, detail: str = "") -> None:
        """Nothing more comes from the client, and nothing can be told to it."""
        self._drop_upstream()
        self._finish(reason, detail=detail)

    def downstream_writable(self, ok: bool) -> None:
        if self._upstream is not None:
            self._upstream.hold(not ok)

    # -- response side ------------------------------------------------------------------------------

    def upstream_writable(self, ok: bool) -> None:
        self._connection.hold(_UPSTREAM_FULL, not ok)

    def response_begins(self) -> None:
        """The upstream said something, were it half a head: it may have done what was asked."""
        self._connection.touch()
        self._replay = None

    def response(self, event: Event) -> None:
        """An event from the upstream."""
        try:
            if type(event) is ResponseHead:
                self._response_head(event)
            elif type(event) is Data:
                self._response_data(event)
            elif type(event) is End:
                if self._tunnel:
                    self._connection.end_sending()
                    self._end_way(1)
                else:
                    self._response_done = True
                    self._connection.send(event)
                    self._response_end()
            else:
                self._rare_response(event)
        except LocalProtocolError as exc:
            self._drop_upstream()
            self._fail(Reason.UPSTREAM_PROTOCOL, f"the response can't be passed on: {exc}")

    def _response_data(self, event: Data) -> None:
        self._moved_out += len(event.data)
        self._connection.send(event)

    def _rare_response(self, event: Event) -> None:
        match event:
            case Informational():
                if self._expectation is None or self._expectation.passes(event.status):
                    self._connection.send(event.replace(headers=without_ours(event.headers)))
            case Trailers():
                if self._is_grpc:
                    self._grpc_status = status_of(event.headers)
                    self._ends_early = False
                if headers := without_ours(event.headers):
                    self._connection.send(Trailers(1, headers))
            case Reset():
                self._fail(Reason.UPSTREAM_CLOSED, event.detail)

    def _response_head(self, event: ResponseHead) -> None:
        if event.status == 101 and not switches_as_asked(event, self._sent_head.headers):
            self._fail(Reason.UPSTREAM_PROTOCOL, "101 to a protocol that was not asked for")
            return
        if self._expectation is not None:
            self._expectation.over()
        self._response_started = True
        if not self._request_sent:
            # An early answer ends the connection, since the rest of the body is not wanted: say so.
            self._connection.announce_close()
        self._status = event.status
        if self._is_grpc:
            self._grpc_status = status_of(event.headers)
            self._ends_early = self._connection.protocol == "http/2" and may_end_early(event)
        if self._is_logged:
            self._head_at = self._connection.activity
        from_agent = self._key is not None and self._key.tls != ""
        date = self._services.stamps.date(self._connection.activity)
        self._connection.send(edit_response(event, from_agent, date, self._services.tables.via))
        if event.status == 101 or (self._head.method == b"CONNECT" and event.status < 300):
            self._begin_tunnel()

    def _begin_tunnel(self) -> None:
        assert self._upstream is not None
        self._tunnel = True
        if self._timer is not None:
            self._timer.cancel()
        self._upstream.begin_tunnel()
        self._connection.begin_tunnel()

    def _end_way(self, way: int) -> None:
        if way:
            self._ended_out = True
        else:
            self._ended_in = True
        if self._ended_in and self._ended_out and self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            upstream.tunnel_done()
            self._finish(Reason.OK)

    def _response_end(self) -> None:
        upstream, self._upstream = self._upstream, None
        assert upstream is not None
        if self._request_sent:
            upstream.idle(self._connection.activity)
            self._over(_OK, False, False, "", "")
        else:
            # An early answer: the endpoint does not want the rest of the body. It may never read what is queued for it.
            upstream.abort()
            self._finish(Reason.OK, must_close=True)

    def upstream_gone(self, reason: Reason, detail: str, *, untouched: bool = False, code: int = -1) -> None:
        """The upstream ended or broke before the response was complete."""
        was, self._upstream = self._upstream, None
        again = self._replay.take(untouched=untouched) if self._replay is not None else None
        if again is not None:
            self._replay = None
            self._queue, self._is_queuing = again, True
            self._services.recorder.arena.count("upstream_replays")
            self._connection.hold(_UPSTREAM_FULL, False)
            if was is not None and was.is_shared and self._choice is not None:
                self._connect(self._choice)
            else:
                self._dial()
            return
        self._fail(reason, detail, status_of_reset(code) if code >= 0 else None)

    # -- ends ---------------------------------------------------------------------------------------

    def check(self, idle_s: float) -> None:
        """`idle_s`: so long nothing has moved."""
        mesh, facts = self._services.tables.mesh, self._facts
        if self._targets is not None and not self._targets.standing.is_good:
            self._fail(Reason.EGRESS_DENIED, "the configuration that allowed it has changed")
        elif not self._tunnel:
            if idle_s >= mesh.idle_timeout_s:
                self._idle_timeout()
        elif must_be_mesh_tls(facts, self._services.tables.workloads.get(facts.workload, facts.shard)):
            # The policy changed under us, see `tcp`.
            self._fail(Reason.MTLS_REQUIRED, "the workload now accepts mesh TLS only")
        elif idle_s >= mesh.tcp_idle_timeout_s:
            self._fail(Reason.IDLE_TIMEOUT, "nothing moved in the tunnel for its idle timeout")

    def abort(self) -> None:
        if self._tunnel:
            self._fail(Reason.DRAINING, "the tunnel did not end in time")

    def _idle_timeout(self) -> None:
        if self._response_started and not self._connection.takes_more():
            self._fail(Reason.IDLE_TIMEOUT, "the client read nothing for the idle timeout")
        elif self._request_sent:
            self._fail(Reason.UPSTREAM_TIMEOUT, "nothing moved for the idle timeout")
        else:
            self._fail(Reason.HEAD_TIMEOUT, "the request body stopped for the idle timeout")

    def _request_timeout(self, timeout_s: float) -> None:
        self._timer = None
        self._fail(Reason.UPSTREAM_TIMEOUT, f"not answered within {timeout_s:g} s")

    def _deadline_passed(self, seconds: float) -> None:
        self._timer = None
        self._fail(Reason.UPSTREAM_TIMEOUT, f"not answered within its grpc-timeout of {seconds:g} s")

    def _answer(
        self,
        reason: Reason,
        detail: str,
        decided_by: str,
        tried: Sequence[str],
        status: int = 0,
        *,
        as_grpc: Grpc | None = None,
    ) -> int:
        """Our own, in the place of a response. `as_grpc`: instead of the reason's status."""
        if not self._is_grpc:
            as_grpc = None
        elif as_grpc is None:
            as_grpc = reason.info.grpc
        if as_grpc is not None:
            self._grpc_status = int(as_grpc)
        return answer(self._connection, reason, detail, decided_by, tried, status, as_grpc=as_grpc)

    def _break_off(self, reason: Reason, detail: str, as_grpc: Grpc) -> None:
        """The response has begun and can't go on. Who reads nothing gets a reset: trailers would wait, too."""
        reset = not self._ends_early or reason is Reason.IDLE_TIMEOUT
        if not reset:
            try:
                self._connection.send(Trailers(1, error_fields(as_grpc, sentence(reason, detail, ""))))
                self._connection.send(End(1))
                self._grpc_status = int(as_grpc)
            except LocalProtocolError:
                reset = True
        self._finish(reason, reset=reset, detail=detail)

    def _refuse(self, reason: Reason, detail: str, decided_by: str = "", status: int = 0) -> None:
        # Nobody knows whether a client that waits for 100 sends its content after this.
        must_close = self._expectation is not None or status == 417
        if must_close:
            self._connection.announce_close()
        self._status = self._answer(reason, detail, decided_by, (), status)
        self._finish(reason, must_close=must_close, detail=detail, decided_by=decided_by)

    def _fail(self, reason: Reason, detail: str, as_grpc: Grpc | None = None) -> None:
        """`as_grpc`: what a gRPC client is told instead of the reason's status."""
        if self._done:
            return
        self._drop_upstream()
        if self._response_started:
            self._break_off(reason, detail, reason.info.grpc if as_grpc is None else as_grpc)
            return
        tried = [str(self._key.endpoint)] if self._key is not None else []
        decided_by = self._choice.rule if self._choice is not None else self._targets.title if self._targets else ""
        if not self._request_sent:
            self._connection.announce_close()
        self._status = self._answer(reason, detail, decided_by, tried, as_grpc=as_grpc)
        self._finish(reason, must_close=not self._request_sent, detail=detail)

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._waiter is not None and self._key is not None:
            self._services.shared.forget(self._key, self._waiter)
            self._waiter = None

    def _finish(
        self, reason: Reason, *, must_close: bool = False, reset: bool = False, detail: str = "", decided_by: str = ""
    ) -> None:
        """`detail` and `decided_by` are for the access log."""
        self._over(reason, must_close, reset, detail, decided_by)

    def _over(self, reason: Reason, must_close: bool, reset: bool, detail: str, decided_by: str) -> None:
        if self._done:
            return
        self._done = True
        if self._is_grpc and self._grpc_status == NO_STATUS and reason is not Reason.OK:
            self._grpc_status = int(reason.info.grpc)
        if self._timer is not None:
            self._timer.cancel()
        if self._expectation is not None:
            self._expectation.over()
        if self._choice is not None:
            self._choice.endpoint.outstanding -= 1
        facts = self._facts
        if reason is not _OK or not self._response_done:
            self._connection.touch()
        duration_s = self._connection.activity - self._started
        if self._choice is None:
            who = Who(parties(facts, self._services, None), security(facts, None))
        else:
            path = self._path
            if path is None or facts.paths_version != self._services.tables.version:
                path = path_to(facts, self._services, self._choice)
            who = path.who
        self._services.recorder.count(
            who,
            self._status,
            reason,
            self._connection.protocol,
            self._grpc_status,
            duration_s,
            self._moved_in,
            self._moved_out,
        )
        if self._trace is not None and self._trace.sampled:
            self._record_span(self._trace, who, reason, duration_s)
        if self._is_logged:
            self._log((who.parties, who.security), reason, duration_s, (detail, decided_by))
        if reset:
            self._connection.reset()
        elif self._tunnel:
            if reason is _OK:
                self._connection.tunnel_done()
        elif reason is not _DOWNSTREAM_CLOSED:
            self._connection.exchange_done(must_close)

    def _record_span(self, trace: Trace, who: Who, reason: Reason, duration_s: float) -> None:
        head, facts = self._head, self._facts
        attributes: dict[str, str | int] = {
            "http.request.method": head.method.decode("latin-1"),
            "url.path": origin_form(head.target)[0].partition(b"?")[0].decode("latin-1"),
            "network.protocol.version": head.http_version.decode("latin-1"),
            "client.address": facts.client.host,
            "netproxy.source": who.parties.source_workload,
            "netproxy.destination": who.parties.destination_workload,
            "netproxy.reason": reason.name,
        }
        if self._status:
            attributes["http.response.status_code"] = self._status
        if self._choice is not None:
            if self._choice.rule:
                attributes["http.route"] = self._choice.rule
            attributes["server.address"] = self._choice.endpoint.endpoint.host
            attributes["server.port"] = self._choice.endpoint.endpoint.port
        if self._grpc_status >= 0:
            attributes["rpc.grpc.status_code"] = self._grpc_status
        name = who.parties.destination_service or who.parties.destination_workload
        ids = (trace.trace_id.decode(), trace.span_id.decode(), trace.parent_id.decode())
        kind = "server" if facts.inbound else "client"
        began = self._services.wall() - duration_s
        self._services.spans.record(Span(*ids, f"{name}", kind, began, duration_s, attributes))

    def _log(self, who: tuple[Parties, str], reason: Reason, duration_s: float, why: tuple[str, str]) -> None:
        outcome = Outcome(
            self._status,
            self._response_started,
            self._attempts,
            self._reused,
            self._connected_at - self._started if self._connected_at else -1.0,
            self._head_at - self._started if self._head_at else -1.0,
            self._grpc_status,
        )
        ended = Ended(reason, why[0], duration_s, (self._moved_in, self._moved_out), outcome, why[1])
        request_id = next((value for name, value in self._sent_head.headers if name == b"x-request-id"), b"")
        log_request(
            self._services,
            self._facts,
            self._choice,
            who=who,
            head=self._head,
            request_id=request_id,
            ended=ended,
        )
