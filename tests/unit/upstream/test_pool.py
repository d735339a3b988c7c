from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netproxy.addr import EndpointAddr, WorkloadKey
from netproxy.upstream.pool import Pool, PoolKey

KEYS = [
    PoolKey(WorkloadKey(workload), EndpointAddr("10.0.0.1", port), tls)
    for workload, port, tls in (("a/a", 80, ""), ("a/a", 80, "x"), ("a/a", 81, ""), ("b/b", 80, ""))
]


class Connection:
    def __init__(self, key: PoolKey) -> None:
        self.key = key
        self.since = 0.0

    def __eq__(self, other: object) -> bool:
        return True  # only identity may count

    __hash__ = object.__hash__


def test_the_last_one_given_is_taken_first() -> None:
    pool: Pool = Pool()
    for name in "abc":
        assert pool.reserve(KEYS[0])
        assert pool.give(KEYS[0], name, 1.0) is None
    assert pool.take(KEYS[1]) is None
    assert [pool.take(KEYS[0]) for _ in range(4)] == ["c", "b", "a", None]


def test_the_oldest_makes_room() -> None:
    pool: Pool = Pool(max_idle=2)
    for name in "ab":
        assert pool.give(KEYS[0], name, 1.0) is None
    assert pool.give(KEYS[0], "c", 2.0) == "a"
    assert [pool.take(KEYS[0]), pool.take(KEYS[0])] == ["c", "b"]


def test_without_room_nothing_waits() -> None:
    pool: Pool = Pool(max_idle=0)
    assert pool.give(KEYS[0], "a", 1.0) == "a"
    assert pool.idle_count == 0
    assert pool.take(KEYS[0]) is None


def test_limit_of_open_ones_is_per_key() -> None:
    pool: Pool = Pool(max_open=2)
    assert [pool.reserve(KEYS[0]) for _ in range(3)] == [True, True, False]
    assert pool.reserve(KEYS[1])
    pool.closed(KEYS[0])
    assert pool.reserve(KEYS[0])
    assert pool.open_count == 3
    assert repr(pool) == "<Pool idle=0 open=3 keys=2>"


def test_expire_takes_what_is_older() -> None:
    pool: Pool = Pool()
    for now, name in enumerate("abc"):
        pool.give(KEYS[0], name, float(now))
    pool.give(KEYS[1], "d", 0.5)
    assert pool.expire(0.0) == []
    assert sorted(pool.expire(1.0)) == ["a", "d"]
    assert pool.idle_count == 2
    assert pool.expire(float("inf")) == ["b", "c"]
    assert pool.expire(float("inf")) == []


def test_drop_takes_all_of_one_workload() -> None:
    pool: Pool = Pool()
    for key in KEYS:
        pool.give(key, key, 1.0)
    assert sorted(pool.drop(KEYS[0].workload), key=KEYS.index) == KEYS[:3]
    assert pool.idle_count == 1
    assert pool.drop(KEYS[0].workload) == []
    assert pool.take(KEYS[3]) == KEYS[3]


keys = st.sampled_from(KEYS)


class Machine(RuleBasedStateMachine):
    """Against a model that is two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: Pool = Pool(max_idle=2, max_open=4)
        self.busy: list[Connection] = []
        self.idle: list[Connection] = []
        self.now = 0.0

    def gone(self, connection: Connection) -> None:
        self.pool.closed(connection.key)

    def idle_of(self, key: PoolKey) -> list[Connection]:
        return [connection for connection in self.idle if connection.key == key]

    @staticmethod
    def without(items: list[Connection], item: Connection) -> list[Connection]:
        assert any(other is item for other in items)
        return [other for other in items if other is not item]

    @rule(key=keys)
    def open(self, key: PoolKey) -> None:
        count = sum(connection.key == key for connection in self.busy + self.idle)
        assert self.pool.reserve(key) is (count < 4)
        if count < 4:
            self.busy.append(Connection(key))

    @rule(key=keys)
    def take(self, key: PoolKey) -> None:
        got = self.pool.take(key)
        waiting = self.idle_of(key)
        assert got is (waiting[-1] if waiting else None)
        if got is not None:
            self.idle = self.without(self.idle, got)
            self.busy.append(got)

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, 20), step=st.sampled_from((0.0, 1.0)))
    def give(self, which: int, step: float) -> None:
        self.now += step
        connection = self.busy.pop(which % len(self.busy))
        connection.since = self.now
        self.idle.append(connection)
        surplus = self.pool.give(connection.key, connection, self.now)
        waiting = self.idle_of(connection.key)
        assert surplus is (waiting[0] if len(waiting) > 2 else None)
        if surplus is not None:
            self.idle = self.without(self.idle, surplus)
            self.gone(surplus)

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, 20))
    def close_busy(self, which: int) -> None:
        connection = self.busy.pop(which % len(self.busy))
        assert not self.pool.remove(connection.key, connection)
        self.gone(connection)

    @precondition(lambda self: self.idle)
    @rule(which=st.integers(0, 20))
    def close_idle(self, which: int) -> None:
        connection = self.idle.pop(which % len(self.idle))
        assert self.pool.remove(connection.key, connection)
        assert not self.pool.remove(connection.key, connection)
        self.gone(connection)

    @rule(age=st.sampled_from((-1.0, 0.0, 1.0, 3.0)))
    def expire(self, age: float) -> None:
        before = self.now - age
        got = self.pool.expire(before)
        assert {id(c) for c in got} == {id(c) for c in self.idle if c.since < before}
        self.idle = [c for c in self.idle if c.since >= before]
        for connection in got:
            self.gone(connection)

    @rule(workload=st.sampled_from(("a/a", "b/b")))
    def drop(self, workload: str) -> None:
        got = self.pool.drop(WorkloadKey(workload))
        assert {id(c) for c in got} == {id(c) for c in self.idle if c.key.workload == workload}
        self.idle = [c for c in self.idle if c.key.workload != workload]
        for connection in got:
            self.gone(connection)

    @invariant()
    def counts(self) -> None:
        assert self.pool.idle_count == len(self.idle)
        assert self.pool.open_count == len(self.idle) + len(self.busy)
        assert set(self.pool._idle) <= set(self.pool._open)

    def teardown(self) -> None:
        for connection in self.pool.expire(float("inf")):
            self.gone(connection)
        for connection in self.busy:
            self.gone(connection)
        assert self.pool.open_count == 0
        assert repr(self.pool) == "<Pool idle=0 open=0 keys=0>"


TestMachine = Machine.TestCase
