"""Whatever the order of events, nothing is lost and every request ends exactly once."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netproxy.errors import Reason
from netproxy.relay.upstream import UpstreamHttp

from .streams import HIGH_WATER, CountedConnection, FakeStream, World, turns, web_shard

CHUNKED = b"POST /web HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUESTS = (
    b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET /slow HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET /other HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET /missing HTTP/1.1\r\nHost: web\r\n\r\n",
    b"HEAD /web HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n",
    b"GET /web HTTP/1.0\r\nHost: web\r\n\r\n",
    b"GET /web HTTP/1.1\r\nHos",
    b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\nab",
    b"POST /missing HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\nab",
    CHUNKED + b"2\r\nab\r\n",
    CHUNKED + b"2\r\nab\r\n0\r\n\r\n",
    b"CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n",
    b"GET /web HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    b"GET /slow HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nearly",
    b"PUT /web HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
    b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n" * 3 + b"GET /missing HTTP/1.1\r\nHost: web\r\n\r\n" * 3,
    b"GET /missing HTTP/1.1\r\nHost: web\r\n\r\n" * 30,
)
MORE = (b"cd", b"2\r\nab\r\n", b"0\r\n\r\n", b"t: web\r\n\r\n", b"nonsense\r\n\r\n", b"\r\n", bytes(3 * HIGH_WATER))
ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    b"HTTP/1.1 103 Early Hints\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nmore",
    b"0\r\n\r\n",
    b"ngth: 0\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + bytes(3000),
    bytes(2000),
)


class Events(RuleBasedStateMachine):
    @initialize(max_open=st.sampled_from((1, 2, 1024)), max_idle=st.sampled_from((0, 1, 64)))
    def begin(self, max_open: int, max_idle: int) -> None:
        self.errors: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.clients: list[tuple[FakeStream, CountedConnection]] = []
        self.upstreams: list[FakeStream] = []
        self.run(self.make(max_open, max_idle))

    async def make(self, max_open: int, max_idle: int) -> None:
        self.world = World()
        self.world.pool.max_open = max_open
        self.world.pool.max_idle = max_idle
        self.clients.append(self.world.connect())

    def run(self, steps: Any) -> None:
        self.loop.run_until_complete(steps)

    def act(self, action: Any, n: int) -> None:
        async def step() -> None:
            action()
            await turns(n)

        self.run(step())

    def client(self, which: int) -> FakeStream:
        return self.clients[which % len(self.clients)][0]

    def upstream(self, which: int) -> FakeStream:
        return self.upstreams[which % len(self.upstreams)]

    # Actions that are not followed by a turn of the loop (n = 0) happen at once with the next one.
    numbers = st.integers(0, 3)
    after = st.sampled_from((0, 0, 1, 6))

    @rule(n=after)
    def connect(self, n: int) -> None:
        if len(self.clients) < 4:
            self.act(lambda: self.clients.append(self.world.connect()), n)

    @rule(which=numbers, data=st.sampled_from(REQUESTS), n=after)
    def client_asks(self, which: int, data: bytes, n: int) -> None:
        self.act(lambda: self.client(which).peer_sends(data), n)

    @rule(which=numbers, data=st.sampled_from(MORE), n=after)
    def client_sends_more(self, which: int, data: bytes, n: int) -> None:
        self.act(lambda: self.client(which).peer_sends(data), n)

    @rule(which=numbers, how=st.sampled_from(("peer_stalls", "peer_reads")), n=after)
    def client_reads_or_not(self, which: int, how: str, n: int) -> None:
        self.act(getattr(self.client(which), how), n)

    @rule(which=numbers, how=st.sampled_from(("peer_ends", "peer_resets")), n=after)
    def client_goes(self, which: int, how: str, n: int) -> None:
        stream = self.clients.pop(which % len(self.clients))[0]
        self.act(getattr(stream, how), n)
        self.gone = [*getattr(self, "gone", []), stream]
        if not self.clients:
            self.act(lambda: self.clients.append(self.world.connect()), 0)

    @precondition(lambda self: self.world.dialer.open)
    @rule(fails=st.booleans(), n=after)
    def dial_ends(self, fails: bool, n: int) -> None:
        dial = self.world.dialer.open[0]

        def end() -> None:
            if fails:
                dial.fail(Reason.CONNECT_TIMEOUT)
            else:
                self.upstreams.append(dial.accept())

        self.act(end, n)

    @precondition(lambda self: self.upstreams)
    @rule(which=numbers, data=st.sampled_from(ANSWERS), n=after)
    def upstream_says(self, which: int, data: bytes, n: int) -> None:
        self.act(lambda: self.upstream(which).peer_sends(data), n)

    @precondition(lambda self: self.upstreams)
    @rule(which=numbers, how=st.sampled_from(("peer_ends", "peer_resets", "peer_stalls", "peer_reads")), n=after)
    def upstream_does(self, which: int, how: str, n: int) -> None:
        self.act(getattr(self.upstream(which), how), n)

    @rule(seconds=st.sampled_from((1.0, 3.0, 20.0, 400.0)), n=after)
    def time_passes(self, seconds: float, n: int) -> None:
        self.act(lambda: self.world.check(seconds), n)

    @rule(n=after)
    def pool_expires(self, n: int) -> None:
        self.act(lambda: [c.close() for c in self.world.pool.expire(self.world.time - 30.0)], n)

    @rule(n=after, empty=st.booleans())
    def configuration_changes(self, n: int, empty: bool) -> None:
        self.act(lambda: self.world.tables.put(web_shard(()) if empty else web_shard()), n)

    @rule(which=numbers, n=after)
    def drain_one(self, which: int, n: int) -> None:
        self.act(self.clients[which % len(self.clients)][1].drain, n)

    @rule(which=numbers, n=after)
    def abort_one(self, which: int, n: int) -> None:
        self.act(self.clients[which % len(self.clients)][1].abort, n)

    @invariant()
    def nothing_piles_up(self) -> None:
        if hasattr(self, "world"):
            for stream in (*(stream for stream, _ in self.clients), *self.upstreams):
                assert stream.buffered() <= HIGH_WATER + 4000
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
        world.check(1000.0)
        await turns()
        assert not world.dialer.open
        for upstream in world.pool.expire(float("inf")):
            assert isinstance(upstream, UpstreamHttp)
            upstream.close()
        for stream in self.upstreams:
            stream.peer_reads()
        await turns()
        world.assert_gone()
        assert all(stream.closing for stream in self.upstreams)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
