"""Whatever the order of events on shared connections, nothing is lost and every request ends exactly once."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from netproxy.codec.events import Data, End, Event, Informational, RequestHead, ResponseHead
from netproxy.codec.h2 import Code, H2Limits
from netproxy.config.shard import MeshShard
from netproxy.errors import LocalProtocolError, RemoteProtocolError

from .h2_endpoint import H2Endpoint
from .streams import HIGH_WATER, CountedConnection, FakeStream, World, turns, web_shard

REQUESTS = (
    b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET /slow HTTP/1.1\r\nHost: web\r\n\r\n",
    b"HEAD /web HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n",
    b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\nab",
    b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 3000\r\n\r\n" + bytes(3000),
    b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 200000\r\n\r\n" + bytes(200_000),
    b"POST /web HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
    b"PUT /web HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
    b"CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n",
    b"GET /web HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nearly",
    b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n" * 4,
)
MORE = (b"cd", b"0\r\n\r\n")
GOAWAY = b"\x00\x00\x08\x07\x00" + bytes(4)


class Endpoint(H2Endpoint):
    """Without turns of its own: what is said arrives at once, or when the test lets it."""

    def look(self) -> None:
        came = self.stream.take_sent()
        if b" HTTP/1.1\r\n" in came.partition(b"\n")[0] + b"\n":
            # An Upgrade that HTTP/2 has no words for.
            self.stream.peer_resets()
            return
        if came and not self.engine.must_close:
            try:
                self.seen += self.engine.receive(came)
            except RemoteProtocolError as exc:
                raise AssertionError(f"the endpoint was sent nonsense: {exc}") from exc
        self.out()

    def out(self) -> None:
        data = b"".join(self.engine.take_output())
        if data:
            self.stream.peer_sends(data)

    @property
    def streams(self) -> list[int]:
        return [event.stream_id for event in self.seen if isinstance(event, RequestHead)]

    def answers(self, which: int, events: tuple[Event, ...]) -> None:
        streams = self.streams
        if streams:
            stream_id = streams[which % len(streams)]
            try:
                for event in events:
                    self.engine.send(stream_id, event)
            except LocalProtocolError:
                self.engine.reset(stream_id, "confused")
            self.out()

    def resets(self, which: int, code: int) -> None:
        streams = self.streams
        if streams:
            self.engine.reset(streams[which % len(streams)], "no", code)
            self.out()

    def takes(self) -> None:
        for event in self.seen:
            if isinstance(event, Data):
                self.engine.credit(event.stream_id, len(event.data))
        self.seen = [event for event in self.seen if isinstance(event, RequestHead)]
        self.out()


ANSWERS: tuple[tuple[Event, ...], ...] = (
    (ResponseHead(1, 200, []), Data(1, b"ok"), End(1)),
    (ResponseHead(1, 204, []), End(1)),
    (ResponseHead(1, 200, []),),
    (Data(1, bytes(3000)),),
    (Data(1, bytes(100_000)),),
    (End(1),),
    (Informational(1, 103, []),),
    (Informational(1, 100, []),),
)


class Events(RuleBasedStateMachine):
    @initialize(
        max_open=st.sampled_from((1, 2, 1024)), streams=st.sampled_from((1, 2, 100)), known=st.sampled_from((1, 3, 100))
    )
    def begin(self, max_open: int, streams: int, known: int) -> None:
        self.errors: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.clients: list[tuple[FakeStream, CountedConnection]] = []
        self.endpoints: list[Endpoint] = []
        self.known = known
        self.run(self.make(max_open, streams))

    async def make(self, max_open: int, streams: int) -> None:
        self.world = World(MeshShard(http2_max_upstream_streams=streams, buffer_bytes=65535))
        self.world.tables.put(web_shard(http_version="2"))
        self.world.services.shared._pool.max_open = max_open
        self.clients.append(self.world.connect())

    def run(self, steps: Any) -> None:
        self.loop.run_until_complete(steps)

    def act(self, action: Any, n: int) -> None:
        async def step() -> None:
            action()
            await turns(n)
            if n == 6:
                # What was said is heard, most of the time.
                for _ in range(2):
                    for endpoint in self.endpoints:
                        endpoint.look()
                    await turns()

        self.run(step())

    def on(self, which: int, action: Any, n: int) -> None:
        if self.endpoints:
            endpoint = self.endpoints[which % len(self.endpoints)]
            self.act(lambda: action(endpoint), n)

    numbers = st.integers(0, 3)
    after = st.sampled_from((0, 1, 6, 6))

    @rule(n=after)
    def connect(self, n: int) -> None:
        if len(self.clients) < 5:
            self.act(lambda: self.clients.append(self.world.connect()), n)

    @rule(which=numbers, data=st.sampled_from(REQUESTS), n=after)
    def client_asks(self, which: int, data: bytes, n: int) -> None:
        stream, connection = self.clients[which % len(self.clients)]
        if stream.closing or "idle" not in repr(connection):
            self.act(lambda: self.clients.append(self.world.connect()), 0)
            stream, _ = self.clients[-1]
        self.act(lambda: stream.peer_sends(data), n)

    @rule(which=numbers, data=st.sampled_from(MORE), n=after)
    def client_sends_more(self, which: int, data: bytes, n: int) -> None:
        stream, connection = self.clients[which % len(self.clients)]
        if "idle" not in repr(connection):
            self.act(lambda: stream.peer_sends(data), n)

    @rule(which=numbers, how=st.sampled_from(("peer_stalls", "peer_reads", "peer_ends")), n=after)
    def client_does(self, which: int, how: str, n: int) -> None:
        self.act(getattr(self.clients[which % len(self.clients)][0], how), n)

    @rule(which=numbers, n=after)
    def client_goes(self, which: int, n: int) -> None:
        stream, _ = self.clients.pop(which % len(self.clients))
        self.act(stream.peer_resets, n)
        self.gone = [*getattr(self, "gone", []), stream]
        self.act(lambda: self.clients.append(self.world.connect()), 0)

    @rule(n=after, succeeds=st.sampled_from((True, True, True, False)))
    def dial_ends(self, n: int, succeeds: bool) -> None:
        def accept() -> None:
            endpoint = Endpoint(self.world.dialer.open[0].accept(), H2Limits(max_streams=self.known))
            self.endpoints.append(endpoint)

        if self.world.dialer.open:
            self.act(accept if succeeds else self.world.dialer.open[0].fail, n)

    @rule(which=numbers, n=after)
    def endpoint_takes(self, which: int, n: int) -> None:
        self.on(which, Endpoint.takes, n)

    @rule(which=numbers, stream=st.integers(0, 5), events=st.sampled_from(ANSWERS), n=after)
    def endpoint_answers(self, which: int, stream: int, events: tuple[Event, ...], n: int) -> None:
        self.on(which, lambda endpoint: endpoint.answers(stream, events), n)

    @rule(which=numbers, stream=st.integers(0, 5), code=st.sampled_from((Code.REFUSED_STREAM, Code.CANCEL)), n=after)
    def endpoint_resets(self, which: int, stream: int, code: int, n: int) -> None:
        self.on(which, lambda endpoint: endpoint.resets(stream, code), n)

    @rule(which=numbers, last=st.sampled_from((0, 1, 5)), n=after)
    def endpoint_goes_away(self, which: int, last: int, n: int) -> None:
        data = GOAWAY + last.to_bytes(4, "big") + bytes(4)
        self.on(which, lambda endpoint: endpoint.stream.peer_sends(data), n)

    @rule(which=numbers, how=st.sampled_from(("peer_ends", "peer_resets", "peer_stalls", "peer_reads")), n=after)
    def endpoint_does(self, which: int, how: str, n: int) -> None:
        self.on(which, lambda endpoint: getattr(endpoint.stream, how)(), n)

    @rule(which=numbers, n=after)
    def endpoint_says_nonsense(self, which: int, n: int) -> None:
        self.on(which, lambda endpoint: endpoint.stream.peer_sends(b"\x00\x00\x00\x04\x01\x00\x00\x00\x05"), n)

    @rule(seconds=st.sampled_from((1.0, 6.0, 20.0, 400.0)), n=after)
    def time_passes(self, seconds: float, n: int) -> None:
        self.act(lambda: self.world.check(seconds), n)

    @rule(n=after)
    def pool_expires(self, n: int) -> None:
        self.act(lambda: self.world.services.shared.expire(self.world.time - 3.0), n)

    @rule(which=numbers, n=after)
    def drain_one(self, which: int, n: int) -> None:
        self.act(self.clients[which % len(self.clients)][1].drain, n)

    @invariant()
    def nothing_piles_up(self) -> None:
        if hasattr(self, "world"):
            for stream, _ in self.clients:
                assert stream.buffered() <= 65535 + HIGH_WATER + 4000
            now = self.world.services.shared.statistics()
            assert now.waiting == 0 or now.open > 0
            assert self.world.outstanding >= 0

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.run(self.end())
        finally:
            self.loop.close()
        assert [error.get("exception") or error for error in self.errors] == []

    async def end(self) -> None:
        world = self.world
        await turns()
        for stream in (*(stream for stream, _ in self.clients), *getattr(self, "gone", [])):
            stream.peer_reads()
            stream.peer_resets()
        await turns()
        for dial in world.dialer.open:
            dial.fail()
        await turns()
        assert world.services.shared.statistics().waiting == 0
        world.check(1000.0)
        await turns()
        for upstream in world.pool.expire(float("inf")):
            upstream.close()
        world.services.shared.expire(float("inf"))
        for endpoint in self.endpoints:
            endpoint.stream.peer_reads()
        await turns()
        world.check(1000.0)
        await turns()
        world.assert_gone()
        assert all(endpoint.stream.closing for endpoint in self.endpoints)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
