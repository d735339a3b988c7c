from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from netproxy.arena import (
    CONNECTIONS,
    EVENTS,
    GAUGE_DOWNSTREAM,
    GAUGE_UPSTREAM,
    MAX_LABEL,
    REQUESTS,
    ArenaReader,
    ArenaWriter,
)
from netproxy.settings import ARENA_ROWS, arena_size

WORKERS = 3


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("arena")
    os.ftruncate(made, arena_size(WORKERS))
    yield made
    os.close(made)


def counted(reader: ArenaReader, kind: int) -> dict[tuple[str, ...], int]:
    return {row.labels: row.cells[0] for row in reader.rows() if row.kind == kind and row.cells[0]}


def test_rows_are_summed_over_the_workers(fd: int) -> None:
    writers = [ArenaWriter(fd, slot, WORKERS) for slot in range(WORKERS)]
    reader = ArenaReader(fd, WORKERS)
    for number, writer in enumerate(writers):
        writer.cells[writer.row(REQUESTS, ("a", "b"))] += 10**number
        writer.cells[writer.row(CONNECTIONS, ("a", "b"))] += 5
        writer.gauges[GAUGE_DOWNSTREAM] += 7
    writers[1].count("refused", detail="UO")
    writers[1].count("refused", 2, detail="UO")
    writers[2].count("plain")
    assert counted(reader, REQUESTS) == {("a", "b"): 111}
    assert counted(reader, CONNECTIONS) == {("a", "b"): 15}
    assert counted(reader, EVENTS) == {("refused", "UO"): 3, ("plain", ""): 1}
    assert reader.gauge(GAUGE_DOWNSTREAM) == 21
    assert reader.gauge(GAUGE_UPSTREAM) == 0


def test_all_cells_of_a_row_and_none_of_its_neighbours(fd: int) -> None:
    writer = ArenaWriter(fd, 2, WORKERS)
    first, second = writer.row(REQUESTS, ("1",)), writer.row(REQUESTS, ("2",))
    for index in range(32):
        writer.cells[first + index] = index + 1
    rows = {row.labels: row.cells for row in ArenaReader(fd, WORKERS).rows()}
    assert rows["1",] == tuple(range(1, 33))
    assert rows["2",] == (0,) * 32
    assert second != first


def test_a_row_is_found_again_and_kinds_are_apart(fd: int) -> None:
    writer = ArenaWriter(fd, 0, WORKERS)
    row = writer.row(REQUESTS, ("é", ""))
    assert writer.row(REQUESTS, ("é", "")) == row
    assert writer.row(CONNECTIONS, ("é", "")) != row
    assert ("é", "") in {row.labels for row in ArenaReader(fd, WORKERS).rows()}


def test_a_worker_that_replaces_another_keeps_its_rows_and_not_its_gauges(fd: int) -> None:
    other = ArenaWriter(fd, 1, WORKERS)
    other.gauges[GAUGE_DOWNSTREAM] = 2
    old = ArenaWriter(fd, 0, WORKERS)
    row = old.row(REQUESTS, ("a",))
    old.cells[row] = 41
    old.gauges[GAUGE_DOWNSTREAM] = 9
    new = ArenaWriter(fd, 0, WORKERS)
    assert new.row(REQUESTS, ("a",)) == row
    new.cells[row] += 1
    new.cells[new.row(REQUESTS, ("b",))] += 1
    reader = ArenaReader(fd, WORKERS)
    assert counted(reader, REQUESTS) == {("a",): 42, ("b",): 1}
    assert reader.gauge(GAUGE_DOWNSTREAM) == 2


def test_what_does_not_fit_is_counted_as_overflow_of_its_kind(fd: int) -> None:
    writer = ArenaWriter(fd, 0, WORKERS)
    longest, too_long = ("x" * MAX_LABEL,), ("x" * MAX_LABEL, "")
    writer.cells[writer.row(REQUESTS, longest)] += 1
    writer.cells[writer.row(REQUESTS, too_long)] += 1
    for number in range(ARENA_ROWS):
        writer.cells[writer.row(CONNECTIONS, (str(number),))] += 1
    writer.count("late")
    reader = ArenaReader(fd, WORKERS)
    connections = counted(reader, CONNECTIONS)
    assert sum(connections.values()) == ARENA_ROWS
    # The three overflow rows and the long one were there before.
    assert connections["overflow",] == 4
    assert counted(reader, REQUESTS) == {longest: 1, ("overflow",): 1}
    assert counted(reader, EVENTS) == {("overflow",): 1}
    # Full is full for the next one too, and the other workers have room.
    again = ArenaWriter(fd, 0, WORKERS)
    again.count("late")
    ArenaWriter(fd, 1, WORKERS).count("late")
    assert counted(reader, EVENTS) == {("overflow",): 2, ("late", ""): 1}


def test_an_arena_that_nobody_has_written_to(fd: int) -> None:
    reader = ArenaReader(fd, WORKERS)
    assert list(reader.rows()) == []
    assert reader.gauge(GAUGE_DOWNSTREAM) == 0
