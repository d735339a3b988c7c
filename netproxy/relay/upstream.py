# cython: annotation_typing=False
"""One HTTP/1 connection to an endpoint: busy with an exchange, or idle in the pool.

What came in HTTP/2 is said in HTTP/1.1 here: a request of unknown length is chunked, an extended CONNECT is an Upgrade,
whose 101 is a 200 to who asked.

It is in the list of live connections only while it flushes what is left of a tunnel: nobody else looks after it then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..codec import h2
from ..codec.events import ConnectionClosed, End, Event, RequestHead, ResponseHead
from ..codec.h1 import H1Client, H1Limits, client_engine
from ..errors import Reason, RemoteProtocolError, UpstreamError
from ..stream import Stream
from ..upstream.pool import PoolKey
from .exchange import chunked, frames_content, has
from .services import Services

if TYPE_CHECKING:
    from .upstream_h2 import Http2Request

_MOSTLY_WITHOUT_CONTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE", b"CONNECT"))
"""A chunked body, even an empty one, is nothing that servers expect in them."""


class Requester:
    """What an upstream connection tells whom it works for. Classes and no protocols, as `downstream.Downstream`."""

    def upstream_writable(self, ok: bool) -> None:
        raise NotImplementedError

    def response_begins(self) -> None:
        raise NotImplementedError

    def response(self, event: Event) -> None:
        raise NotImplementedError

    def upstream_gone(self, reason: Reason, detail: str, *, untouched: bool = False, code: int = -1) -> None:
        """It is over before its time. `untouched`: the endpoint says that it has not begun with the request. `code`: of
        HTTP/2, with which the endpoint reset it; -1: it did not."""
        raise NotImplementedError

    # While it waits in `shared`, exactly one of these comes, unless it `forgets`.

    def upstream_ready(self, upstream: Http2Request) -> None:
        raise NotImplementedError

    def upstream_failed(self, exc: UpstreamError) -> None:
        raise NotImplementedError

    def upstream_speaks_http1(self) -> None:
        raise NotImplementedError


class Upstream:
    """The door from a request to what carries it to an endpoint: a connection of its own, or a stream of a shared one.

    Begins with `begin`, ends with exactly one of `idle`, `tunnel_done` and `abort`, or with `upstream_gone`. After
    `begin_tunnel` and `end_sending` only `tunnel_done` or `abort` follow.
    """

    def __init__(self, is_shared: bool) -> None:
        self.is_shared = is_shared
        """Others use the connection too: the endpoint may refuse this request alone, without having begun with it."""
        self.reused = False
        """The connection carried something before: the endpoint may be closing it just now."""

    def begin(self, exchange: Requester) -> None:
        raise NotImplementedError

    def send(self, event: Event) -> None:
        """Of stream 1, whatever its number is to the endpoint. Raises LocalProtocolError; Refused for a head that the
        protocol can't say."""
        raise NotImplementedError

    def hold(self, on: bool) -> None:
        """Bring nothing more of the response for now. What is under way may still come, bounded by a window."""
        raise NotImplementedError

    def begin_tunnel(self) -> None:
        """The endpoint granted it: from now on an end of stream is half a close."""
        raise NotImplementedError

    def end_sending(self) -> None:
        """The tunnel's way to the endpoint is over."""
        raise NotImplementedError

    def tunnel_done(self) -> None:
        """Both ways of the tunnel are over. What is queued goes out first, if the endpoint reads it."""
        raise NotImplementedError

    def idle(self, now: float) -> None:
        """Request and response are complete (or nothing was sent)."""
        raise NotImplementedError

    def abort(self) -> None:
        """Give the request up. Nothing more is told of it."""
        raise NotImplementedError


class UpstreamHttp(Upstream):
    """One upstream connection: busy with an exchange, or idle in the pool. The sink of its stream."""

    def __init__(self, key: PoolKey, stream: Stream, services: Services) -> None:
        """The connection was reserved in the pool; `closed` there is called when it is gone."""
        Upstream.__init__(self, False)
        mesh = services.tables.mesh
        self.key = key
        self.workload = key.workload
        self.stream = stream
        self._services = services
        self._engine: H1Client = client_engine(H1Limits(mesh.max_head_bytes, mesh.max_headers))
        self._exchange: Requester | None = None
        self._uses = 0
        self._writable = True
        self._closed = False
        self._tunnel = False
        self._done_at = 0.0
        self._head: RequestHead | None = None
        """It waits for what follows it: content or nothing."""
        self._asked: RequestHead | None = None
        """The Upgrade that an extended CONNECT became."""
        stream.sink = self
        stream.resume_reading()

    def __repr__(self) -> str:
        return f"<UpstreamHttp {self.key.endpoint} uses={self._uses} {'busy' if self._exchange else 'idle'}>"

    def begin(self, exchange: Requester) -> None:
        self._uses += 1
        self.reused = self._uses > 1
        self._exchange = exchange
        self._head = self._asked = None
        self._engine.keep_spelling(self._services.tables.keeps_spelling)
        if not self._writable:
            # An endpoint that answered the request before without reading all of it.
            exchange.upstream_writable(False)

    def send(self, event: Event) -> None:
        if type(event) is RequestHead:
            head = event
            if head.scheme:
                self._send_head_of_http2(head)
            else:
                self._send(head)
        else:
            if self._head is not None:
                head, self._head = self._head, None
                self._send(head if type(event) is End else chunked(head))
            self._send(event)

    def _send_head_of_http2(self, head: RequestHead) -> None:
        if head.protocol:
            self._asked = head = h2.websocket_from_connect(head, os.urandom(16))
            self._send(head)
        elif frames_content(head.headers):
            self._send(head)
        else:
            self._head = head
            if head.method not in _MOSTLY_WITHOUT_CONTENT or has(head.headers, b"expect"):
                # Its end comes in the same turn, if it has no content; else the endpoint may have to speak first.
                self._services.loop.call_soon(self._content_follows, head)

    def _content_follows(self, head: RequestHead) -> None:
        if self._head is head and self._exchange is not None:
            self._head = None
            self._send(chunked(head))

    def _send(self, event: Event) -> None:
        octets = self._engine.encode(event)
        if octets:
            self.stream.write(octets)

    def hold(self, on: bool) -> None:
        if on:
            self.stream.pause_reading()
        else:
            self.stream.resume_reading()

    def idle(self, now: float) -> None:
        """The exchange is over; wait for another, if the protocol allows."""
        self._exchange = None
        if self.stream.is_closing():
            return
        if not self._engine.is_reusable() or self._services.draining:
            self.stream.close()
            return
        self.stream.resume_reading()
        surplus = self._services.pool.give(self.key, self, now)
        if surplus is not None:
            surplus.close()

    def begin_tunnel(self) -> None:
        """The endpoint granted it: from now on an end of stream is half a close."""
        self._tunnel = True

    def end_sending(self) -> None:
        """The tunnel's way to the endpoint is over."""
        self.send(End(1))
        self.stream.write_eof()

    def tunnel_done(self) -> None:
        """Both ways are over. What is queued goes out first, if the endpoint reads it: see `check`."""
        self._exchange = None
        self.stream.close()
        if not self._closed:
            self._done_at = self._services.now()
            self._services.live.add(self)

    def check(self, now: float) -> None:
        if now - self._done_at >= self._services.tables.mesh.idle_timeout_s:
            self.stream.abort()

    def drain(self) -> None:
        """It is closing."""

    def close(self) -> None:
        self._exchange = None
        self.stream.close()

    def abort(self) -> None:
        self._exchange = None
        self.stream.abort()

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            # Octets that nobody asked for: whatever they are, they must not answer the next request.
            self.stream.abort()
            return
        self._exchange.response_begins()
        try:
            events = self._engine.receive(data)
        except RemoteProtocolError as exc:
            self._gone(Reason.UPSTREAM_PROTOCOL, f"{self.key.endpoint}: {exc.detail}")
            self.stream.abort()
            return
        self._dispatch(events)

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            exchange = self._exchange
            if exchange is None:
                break
            if type(event) is ConnectionClosed:
                self._gone(Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: closed without an answer")
            elif self._asked is not None and type(event) is ResponseHead:
                self._answered(exchange, event, self._asked)
            else:
                exchange.response(event)

    def _answered(self, exchange: Requester, head: ResponseHead, asked: RequestHead) -> None:
        """To an extended CONNECT a 2xx would grant the tunnel, so only 101 may become one."""
        if head.status == 101 and h2.switches_to_websocket(head, asked):
            exchange.response(h2.connect_answer_from_websocket(head))
        elif head.status < 300:
            self._gone(Reason.UPSTREAM_PROTOCOL, f"{self.key.endpoint}: {head.status} does not grant the Upgrade")
            self.stream.abort()
        else:
            exchange.response(head)

    def eof_received(self) -> None:
        if self._exchange is not None:
            try:
                events = self._engine.receive(b"")
                if events and type(events[0]) is End:
                    self._exchange.response_begins()  # something moved
                self._dispatch(events)
            except RemoteProtocolError as exc:
                self._gone(Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: {exc.detail}")
        if not self._tunnel:
            self.stream.close()

    def writable(self, ok: bool) -> None:
        self._writable = ok
        if self._exchange is not None:
            self._exchange.upstream_writable(ok)

    def closed(self, exc: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._services.live.discard(self)
        self._services.pool.remove(self.key, self)
        self._services.pool.closed(self.key)
        self._gone(Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: {exc or 'closed before the answer was complete'}")

    def _gone(self, reason: Reason, detail: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.upstream_gone(reason, detail)
