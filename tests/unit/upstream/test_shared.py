from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netproxy.addr import EndpointAddr, WorkloadKey
from netproxy.upstream.pool import PoolKey
from netproxy.upstream.shared import SharedPool

KEYS = [
    PoolKey(WorkloadKey(workload), EndpointAddr("10.0.0.1", port), "") for workload, port in (("a/a", 80), ("b/b", 80))
]


class Connection:
    def __init__(self, key: PoolKey, streams: int) -> None:
        self.key = key
        self.streams = streams
        self.used = 0
        self.idle_since = 1.0
        self.draining = False

    @property
    def free_streams(self) -> int:
        return 0 if self.draining else max(0, self.streams - self.used)

    def __eq__(self, other: object) -> bool:
        return True  # only identity may count

    __hash__ = object.__hash__


Pool = SharedPool[Connection, object]


def test_those_who_come_while_it_is_dialled_share_the_first_connection() -> None:
    pool: Pool = SharedPool(streams=3)
    assert pool.take(KEYS[0]) is None
    assert [pool.wait(KEYS[0], name) for name in "abcd"] == [1, 0, 0, 1]
    assert pool.statistics() == (2, 0, 2, 4)
    connection = Connection(KEYS[0], 3)
    assert pool.up(KEYS[0], connection) == 0
    served = []
    while (found := pool.next(KEYS[0])) is not None:
        served.append(found[0])
        found[1].used += 1
    assert served == ["a", "b", "c"]
    assert pool.take(KEYS[0]) is None
    assert pool.take(KEYS[1]) is None


def test_an_endpoint_that_takes_less_than_was_thought_is_dialled_more_often() -> None:
    pool: Pool = SharedPool(streams=100, max_open=5)
    assert sum(pool.wait(KEYS[0], n) for n in range(10)) == 1
    assert pool.up(KEYS[0], Connection(KEYS[0], 2)) == 4
    assert repr(pool) == "<SharedPool open=5 idle=1 dialling=4 waiting=10>"


def test_a_dial_that_fails_fails_those_that_no_other_one_is_for() -> None:
    pool: Pool = SharedPool(streams=2)
    assert [pool.wait(KEYS[0], name) for name in "abc"] == [1, 0, 1]
    assert pool.first(KEYS[0]) == "a"
    assert pool.failed(KEYS[0]) == ["c"]
    assert pool.failed(KEYS[0]) == ["a", "b"]
    assert pool.statistics() == (0, 0, 0, 0)
    assert pool.first(KEYS[0]) is None


def test_there_are_bounds() -> None:
    pool: Pool = SharedPool(max_open=1, max_waiting=3, streams=1)
    assert [pool.wait(KEYS[0], name) for name in "abcd"] == [1, 0, 0, -1]
    full = Connection(KEYS[0], 1)
    assert pool.up(KEYS[0], full) == 0
    assert pool.next(KEYS[0]) == ("a", full)
    full.used = 1
    assert pool.forget(KEYS[0], "b")
    assert not pool.forget(KEYS[0], "b")
    assert pool.forget(KEYS[0], "c")
    # Nothing is dialled, so nobody may wait.
    assert pool.wait(KEYS[0], "e") == -1
    assert pool.statistics() == (1, 1, 0, 0)


def test_what_drains_is_replaced_for_those_that_wait() -> None:
    pool: Pool = SharedPool(max_open=2, streams=1)
    assert [pool.wait(KEYS[0], name) for name in "abc"] == [1, 1, 0]
    one, two = Connection(KEYS[0], 1), Connection(KEYS[0], 1)
    for connection in (one, two):
        assert pool.up(KEYS[0], connection) == 0
        assert pool.next(KEYS[0]) is not None
        connection.used = 1
    assert pool.drained(KEYS[0], one) == 0
    assert pool.drained(KEYS[0], one) == 0
    assert pool.closed(KEYS[0], one) == 1
    assert pool.statistics()[2:] == (1, 1)


keys = st.sampled_from(KEYS)


class Machine(RuleBasedStateMachine):
    """Whatever the order: the limits hold, no waiter is lost, and who waits waits for something."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: Pool = SharedPool(max_open=3, max_waiting=6, streams=2)
        self.dials = {key: 0 for key in KEYS}
        self.waiting: dict[PoolKey, list[object]] = {key: [] for key in KEYS}
        self.alive: list[Connection] = []
        self.now = 1.0

    def of(self, key: PoolKey) -> list[Connection]:
        return [connection for connection in self.alive if connection.key == key]

    def serve(self, key: PoolKey) -> None:
        while (found := self.pool.next(key)) is not None:
            waiter, connection = found
            assert waiter is self.waiting[key].pop(0)
            assert connection.free_streams > 0 and any(connection is other for other in self.alive)
            connection.used += 1
            connection.idle_since = 0.0

    @rule(key=keys)
    def ask(self, key: PoolKey) -> None:
        connection = self.pool.take(key)
        if connection is not None:
            assert connection.key == key and connection.free_streams > 0 and not self.waiting[key]
            connection.used += 1
            connection.idle_since = 0.0
            return
        waiter = object()
        dials = self.pool.wait(key, waiter)
        if dials >= 0:
            self.waiting[key].append(waiter)
            self.dials[key] += dials

    @precondition(lambda self: any(self.waiting.values()))
    @rule(key=keys, which=st.integers(0, 6))
    def forget(self, key: PoolKey, which: int) -> None:
        if self.waiting[key]:
            waiter = self.waiting[key].pop(which % len(self.waiting[key]))
            assert self.pool.forget(key, waiter)
            assert not self.pool.forget(key, waiter)

    @rule(key=keys, streams=st.integers(1, 3))
    def dial_done(self, key: PoolKey, streams: int) -> None:
        if self.dials[key]:
            self.dials[key] -= 1
            connection = Connection(key, streams)
            connection.idle_since = self.now
            self.alive.append(connection)
            more = self.pool.up(key, connection)
            self.serve(key)
            self.dials[key] += more

    @rule(key=keys)
    def dial_failed(self, key: PoolKey) -> None:
        if self.dials[key]:
            self.dials[key] -= 1
            for waiter in self.pool.failed(key):
                self.waiting[key].remove(waiter)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20), step=st.sampled_from((0.0, 1.0)))
    def stream_over(self, which: int, step: float) -> None:
        self.now += step
        connection = self.alive[which % len(self.alive)]
        if connection.used:
            connection.used -= 1
            if not connection.used:
                connection.idle_since = self.now
            self.serve(connection.key)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20), streams=st.integers(1, 3))
    def settings_change(self, which: int, streams: int) -> None:
        connection = self.alive[which % len(self.alive)]
        connection.streams = streams
        self.serve(connection.key)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20))
    def drain(self, which: int) -> None:
        connection = self.alive[which % len(self.alive)]
        connection.draining = True
        self.dials[connection.key] += self.pool.drained(connection.key, connection)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20))
    def close(self, which: int) -> None:
        connection = self.alive.pop(which % len(self.alive))
        connection.draining = True
        self.dials[connection.key] += self.pool.closed(connection.key, connection)

    @rule(age=st.sampled_from((-1.0, 0.0, 1.0)))
    def expire(self, age: float) -> None:
        before = self.now - age
        for connection in self.pool.expire(before):
            assert not connection.used and connection.idle_since < before
            connection.draining = True
            self.alive = [other for other in self.alive if other is not connection]
            self.dials[connection.key] += self.pool.closed(connection.key, connection)

    @rule(workload=st.sampled_from(("a/a", "b/b")))
    def drop(self, workload: str) -> None:
        connections, waiting = self.pool.drop(WorkloadKey(workload))
        key = next(key for key in KEYS if key.workload == workload)
        assert waiting == self.waiting[key]
        self.waiting[key] = []
        for connection in connections:
            connection.draining = True
            self.alive = [other for other in self.alive if other is not connection]
            self.dials[key] += self.pool.closed(key, connection)

    @invariant()
    def nothing_is_lost(self) -> None:
        for key in KEYS:
            assert len(self.of(key)) + self.dials[key] <= 3
            assert len(self.waiting[key]) <= 6
            assert not self.waiting[key] or self.dials[key] or self.of(key)
            if self.waiting[key]:
                assert self.pool.take(key) is None
        now = self.pool.statistics()
        assert now.open == len(self.alive) + sum(self.dials.values())
        assert now.dialling == sum(self.dials.values())
        assert now.waiting == sum(map(len, self.waiting.values()))

    def teardown(self) -> None:
        for key in KEYS:
            while self.dials[key]:
                self.dial_failed(key)
        for connection in self.alive[:]:
            connection.draining = True
            self.dials[connection.key] += self.pool.closed(connection.key, connection)
            self.alive.remove(connection)
        for key in KEYS:
            while self.dials[key]:
                self.dial_failed(key)
        assert not any(self.waiting.values())
        assert repr(self.pool) == "<SharedPool open=0 idle=0 dialling=0 waiting=0>"
        assert not self.pool._groups


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
