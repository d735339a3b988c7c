"""Whatever the order of events on the HTTP/2 connections of clients, nothing is lost and every request ends once."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netproxy.codec.events import Data, End, Event, Headers, Trailers
from netproxy.codec.h2 import Code, H2Limits
from netproxy.codec.h2_strict import Frame
from netproxy.config.shard import MeshShard
from netproxy.errors import LocalProtocolError, Reason, RemoteProtocolError

from .h2_client import H2TestClient
from .streams import HIGH_WATER, FakeStream, World, turns, web_shard
from .test_any_order import ANSWERS

Asked = tuple[bytes, bytes, Headers, bytes | None, bytes]
REQUESTS: tuple[Asked, ...] = (
    (b"GET", b"/web", [], b"", b""),
    (b"GET", b"/slow", [], b"", b""),
    (b"GET", b"/other", [], b"", b""),
    (b"GET", b"/missing", [], b"", b""),
    (b"HEAD", b"/web", [], b"", b""),
    (b"POST", b"/web", [(b"content-length", b"4")], None, b""),
    (b"POST", b"/missing", [], None, b""),
    (b"POST", b"/web", [], None, b""),
    (b"POST", b"/web", [], bytes(60_000), b""),
    (b"PUT", b"/web", [(b"expect", b"100-continue")], None, b""),
    (b"CONNECT", b"/web", [], None, b"x"),
    (b"GET", b"/web", [(b"x", b"y" * 3000)], b"", b""),
)
SAID: tuple[tuple[Event, ...], ...] = (
    (Data(1, b"ab"),),
    (Data(1, bytes(30_000)),),
    (Data(1, bytes(200_000)),),
    (Data(1, b"abcd"), End(1)),
    (Trailers(1, [(b"t", b"1")]), End(1)),
    (End(1),),
)
NONSENSE = (
    b"\x00\x00\x00\x04\x01\x00\x00\x00\x05",
    b"\x00\x00\x02\x01\x05\x00\x00\x27\x11\x82\x86",
    b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\x00\x00\x05\x01\x05\x00\x00\x27\x13\x82",
)
BOUND = 64 * 1024


class Client(H2TestClient):
    """What is said arrives at once, or when the test lets it."""

    confused = False
    """It said what its engine knows nothing of."""

    def look(self) -> None:
        came = self.stream.take_sent()
        if came and not self.engine.must_close and not self.confused:
            try:
                self._take(self.engine.receive(came))
            except RemoteProtocolError as exc:
                raise AssertionError(f"the client was sent nonsense: {exc}") from exc
        self.write()

    def asks(self, asked: Asked) -> None:
        method, target, headers, body, protocol = asked
        if self.engine.reusable and self.engine.free_streams:
            try:
                self.ask(target, method, headers, body, protocol=protocol)
            except LocalProtocolError:
                return  # it has not heard of extended CONNECT yet

    def says(self, which: int, events: tuple[Event, ...]) -> None:
        streams = list(self.answers)
        if streams:
            stream_id = streams[-1 - which % len(streams)]
            try:
                for event in events:
                    self.engine.send(stream_id, event)
            except LocalProtocolError:
                self.engine.reset(stream_id, "confused")
            self.write()

    def resets(self, which: int) -> None:
        streams = list(self.answers)
        if streams:
            self.reset(streams[which % len(streams)], Code.CANCEL)

    def takes(self) -> None:
        self.look()
        for stream_id, owed in self.owed.items():
            self.engine.credit(stream_id, owed)
        self.owed.clear()
        self.write()


class Events(RuleBasedStateMachine):
    @initialize(
        max_open=st.sampled_from((1, 2, 1024)),
        streams=st.sampled_from((1, 3, 100)),
        keepalive_s=st.sampled_from((0.0, 5.0)),
    )
    def begin(self, max_open: int, streams: int, keepalive_s: float) -> None:
        self.errors: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.upstreams: list[FakeStream] = []
        self.run(
            self.make(
                max_open, MeshShard(http2_max_streams=streams, http2_keepalive_s=keepalive_s, max_head_bytes=2048)
            )
        )

    async def make(self, max_open: int, mesh: MeshShard) -> None:
        self.world = World(mesh)
        self.world.tables.put(web_shard(http_version="1.1"))
        self.world.pool.max_open = max_open
        self.connects(1 << 20)

    def connects(self, window: int) -> None:
        limits = H2Limits(stream_window=window, connection_window=2 * window)
        client = Client(*self.world.connect_http2(), limits)
        client.credits = False
        client.write()
        self.clients.append(client)

    def run(self, steps: Any) -> None:
        self.loop.run_until_complete(steps)

    def act(self, action: Any, n: int) -> None:
        async def step() -> None:
            action()
            await turns(n)
            if n == 6:
                for client in self.clients:
                    client.look()
                await turns()

        self.run(step())

    def client(self, which: int) -> Client:
        return self.clients[which % len(self.clients)]

    numbers = st.integers(0, 3)
    after = st.sampled_from((0, 0, 1, 6, 6))

    @rule(n=after, window=st.sampled_from((65535, 1 << 20)))
    def connect(self, n: int, window: int) -> None:
        if len(self.clients) < 4:
            self.act(lambda: self.connects(window), n)

    @rule(which=numbers, asked=st.sampled_from(REQUESTS), n=after)
    def client_asks(self, which: int, asked: Asked, n: int) -> None:
        if self.client(which).confused or not self.client(which).engine.reusable:
            self.act(lambda: self.connects(65535), 6)
        self.act(lambda: self.client(which).asks(asked), n)

    @rule(which=numbers, stream=st.integers(0, 5), events=st.sampled_from(SAID), n=after)
    def client_says_more(self, which: int, stream: int, events: tuple[Event, ...], n: int) -> None:
        self.act(lambda: self.client(which).says(stream, events), n)

    @rule(which=numbers, stream=st.integers(0, 5), n=after)
    def client_resets(self, which: int, stream: int, n: int) -> None:
        self.act(lambda: self.client(which).resets(stream), n)

    @rule(which=numbers, n=after)
    def client_takes(self, which: int, n: int) -> None:
        self.act(self.client(which).takes, n)

    @rule(which=numbers, how=st.sampled_from(("peer_stalls", "peer_reads")), n=after)
    def client_reads_or_not(self, which: int, how: str, n: int) -> None:
        self.act(getattr(self.client(which).stream, how), n)

    @rule(which=numbers, data=st.sampled_from(NONSENSE), n=after)
    def client_says_nonsense(self, which: int, data: bytes, n: int) -> None:
        self.client(which).confused = True
        self.act(lambda: self.client(which).stream.peer_sends(data), n)

    @rule(which=numbers, n=after)
    def client_pings(self, which: int, n: int) -> None:
        ping = b"\x00\x00\x08" + bytes((Frame.PING, 0)) + bytes(12)
        self.act(lambda: self.client(which).stream.peer_sends(ping), n)

    @rule(which=numbers, how=st.sampled_from(("peer_ends", "peer_resets")), n=after)
    def client_goes(self, which: int, how: str, n: int) -> None:
        client = self.clients.pop(which % len(self.clients))
        self.act(getattr(client.stream, how), n)
        self.gone.append(client)
        if not self.clients:
            self.act(lambda: self.connects(65535), 0)

    @precondition(lambda self: self.world.dialer.open)
    @rule(fails=st.sampled_from((False, False, True)), n=after)
    def dial_ends(self, fails: bool, n: int) -> None:
        dial = self.world.dialer.open[0]

        def end() -> None:
            if fails:
                dial.fail(Reason.CONNECT_TIMEOUT)
            else:
                self.upstreams.append(dial.accept())

        self.act(end, n)

    @precondition(lambda self: self.upstreams)
    @rule(which=numbers, data=st.sampled_from((*ANSWERS, bytes(100_000))), n=after)
    def upstream_says(self, which: int, data: bytes, n: int) -> None:
        self.act(lambda: self.upstreams[-1 - which % len(self.upstreams)].peer_sends(data), n)

    @precondition(lambda self: self.upstreams)
    @rule(which=numbers, how=st.sampled_from(("peer_ends", "peer_resets", "peer_stalls", "peer_reads")), n=after)
    def upstream_does(self, which: int, how: str, n: int) -> None:
        self.act(getattr(self.upstreams[-1 - which % len(self.upstreams)], how), n)

    @rule(seconds=st.sampled_from((1.0, 6.0, 20.0, 400.0)), n=after)
    def time_passes(self, seconds: float, n: int) -> None:
        self.act(lambda: self.world.check(seconds), n)

    @rule(n=after, empty=st.booleans())
    def configuration_changes(self, n: int, empty: bool) -> None:
        shard = web_shard((), http_version="1.1") if empty else web_shard(http_version="1.1")
        self.act(lambda: self.world.tables.put(shard), n)

    @rule(which=numbers, how=st.sampled_from(("drain", "abort")), n=after)
    def worker_ends(self, which: int, how: str, n: int) -> None:
        self.act(getattr(self.client(which).connection, how), n)

    @invariant()
    def nothing_piles_up(self) -> None:
        if not hasattr(self, "world"):
            return
        for client in self.clients:
            connection = client.connection
            most = self.world.mesh.http2_max_streams
            # One piece of each upstream may be under way when the transport is full.
            assert client.stream.buffered() <= HIGH_WATER + min(most, 12) * 110_000
            assert len(connection._streams) <= most
            for stream in connection._streams.values():
                assert stream.held <= BOUND
        for upstream in self.upstreams:
            assert upstream.buffered() <= HIGH_WATER + 2 * BOUND
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
        # All that was taken is credited: nothing of a request that is over keeps the connection's window shut.
        for client in self.clients:
            connection = client.connection
            if not connection._linger_until and not connection.stream.closing:
                owed = sum(stream._owed for stream in connection._streams.values())
                assert connection.engine.statistics()["owed"] == owed
        for client in (*self.clients, *self.gone):
            client.stream.peer_reads()
            client.stream.peer_resets()
        await turns()
        for dial in world.dialer.open:
            dial.fail()
        await turns()
        world.check(1000.0)
        await turns()
        for upstream in world.pool.expire(float("inf")):
            upstream.close()
        for stream in self.upstreams:
            stream.peer_reads()
        await turns()
        world.check(1000.0)
        await turns()
        world.assert_gone()
        assert all(stream.closing for stream in self.upstreams)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
