"""Counters that several processes share: one memfd, mapped by the supervisor's children.

Every region has one writer, the brain sums them. A worker has two: while one drains, the one that replaces it
(upgrade) uses the other. The supervisor zeroes the gauges of a process that ended. Little-endian u64 cells, 8-aligned::

    0      header: magic, version, regions, rows per region
    4096   region 0: u64 row count, 511 gauges               (4096 octets)
           rows, 1024 octets each: u16 kind, u16 label length, label (UTF-8, at most 764),
                                   32 cells at offset 768
           region 1 ...

A row's label is complete before the row count covers it, so a reader never sees half a label. A
worker that replaces a dead one finds its rows again by their labels: counters never go back.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .settings import ARENA_REGION_HEADER, ARENA_ROW, ARENA_ROWS, arena_region, arena_size

MAGIC = 0x6E65_7470_726F_7879
LAYOUT = 1
_CELLS_AT = 768
CELLS = 32
MAX_LABEL = _CELLS_AT - 4

# Kinds of rows.
REQUESTS = 1
CONNECTIONS = 2
EVENTS = 3

# Cells of a REQUESTS row.
REQ_COUNT, REQ_SUM_US, REQ_BYTES_IN, REQ_BYTES_OUT, REQ_BUCKETS = 0, 1, 2, 3, 4
BUCKETS_US = (
    500,
    1000,
    2500,
    5000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
)
"""Upper bounds; one more cell holds the rest."""
# Cells of a CONNECTIONS row.
CONN_OPENED, CONN_CLOSED, CONN_BYTES_IN, CONN_BYTES_OUT = 0, 1, 2, 3
# The one cell of an EVENTS row.
EVENT_COUNT = 0

# Gauges of a region (index into the 511 after the row count).
GAUGE_DOWNSTREAM, GAUGE_UPSTREAM, GAUGE_POOLED = 1, 2, 3

SEPARATOR = "\x1f"


class Row(NamedTuple):
    kind: int
    labels: tuple[str, ...]
    cells: tuple[int, ...]


class ArenaWriter:
    """One region, which nobody else writes. Row 0 to 2 are the overflow rows, one a kind."""

    def __init__(self, fd: int, region: int, regions: int) -> None:
        self._map = mmap.mmap(fd, arena_size(regions))
        self.cells = memoryview(self._map).cast("Q")
        """The whole arena as u64; `row()` gives the index of a row's first cell."""
        self.cells[0], self.cells[1], self.cells[2], self.cells[3] = MAGIC, LAYOUT, regions, ARENA_ROWS
        self._base = arena_region(region)
        self.gauges = self.cells[self._base // 8 : (self._base + ARENA_REGION_HEADER) // 8]
        for index in range(1, len(self.gauges)):
            self.gauges[index] = 0
        self._rows: dict[tuple[int, str], int] = {}
        self._overflow: dict[int, int] = {}
        for number in range(self.gauges[0]):
            kind, labels, _ = _read(self._map, self._base, number)
            self._rows[kind, SEPARATOR.join(labels)] = self._cell(number)
        for kind in (REQUESTS, CONNECTIONS, EVENTS):
            self._overflow[kind] = self.row(kind, ("overflow",))

    def _cell(self, number: int) -> int:
        return (self._base + ARENA_REGION_HEADER + number * ARENA_ROW + _CELLS_AT) // 8

    def row(self, kind: int, labels: tuple[str, ...]) -> int:
        """Index in `cells` of the first cell of this series; made when it is new, overflow when full."""
        text = SEPARATOR.join(labels)
        found = self._rows.get((kind, text))
        if found is not None:
            return found
        raw = text.encode()
        number = self.gauges[0]
        if number >= ARENA_ROWS or len(raw) > MAX_LABEL:
            return self._overflow[kind]
        at = self._base + ARENA_REGION_HEADER + number * ARENA_ROW
        struct.pack_into("<HH", self._map, at, kind, len(raw))
        self._map[at + 4 : at + 4 + len(raw)] = raw
        self.gauges[0] = number + 1
        index = self._rows[kind, text] = self._cell(number)
        return index

    def count(self, name: str, n: int = 1, detail: str = "") -> None:
        """Count a rare event. Not for the hot path."""
        self.cells[self.row(EVENTS, (name, detail)) + EVENT_COUNT] += n


class ArenaReader:
    """All regions, for the brain."""

    def __init__(self, fd: int, regions: int) -> None:
        self._map = mmap.mmap(fd, arena_size(regions), prot=mmap.PROT_READ)
        self._regions = regions

    def gauge(self, index: int) -> int:
        """Sum over the regions."""
        return sum(
            int(struct.unpack_from("<Q", self._map, arena_region(region) + 8 * index)[0])
            for region in range(self._regions)
        )

    def rows(self) -> Iterator[Row]:
        """Every series once, summed over the regions."""
        summed: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for region in range(self._regions):
            base = arena_region(region)
            (count,) = struct.unpack_from("<Q", self._map, base)
            for number in range(count):
                kind, labels, cells = _read(self._map, base, number)
                total = summed.get((kind, labels))
                if total is None:
                    summed[kind, labels] = list(cells)
                else:
                    for index, value in enumerate(cells):
                        total[index] += value
        for (kind, labels), values in summed.items():
            yield Row(kind, labels, tuple(values))


def _read(memory: mmap.mmap, base: int, number: int) -> Row:
    at = base + ARENA_REGION_HEADER + number * ARENA_ROW
    kind, length = struct.unpack_from("<HH", memory, at)
    text = bytes(memory[at + 4 : at + 4 + length]).decode()
    return Row(kind, tuple(text.split(SEPARATOR)), struct.unpack_from(f"<{CELLS}Q", memory, at + _CELLS_AT))
