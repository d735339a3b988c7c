"""The arithmetic: from the figures of single rounds to medians, spreads and ratios, and the document made of them.

A ratio is taken within a round, where both systems met the same machine; then come its median, minimum and maximum.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Round = Mapping[str, float]
"""What one system showed in one round, by measure."""


class Measure(NamedTuple):
    text: str
    digits: int = 1
    """After the point."""
    lower_is_better: bool = True


MEASURES = {
    "rps": Measure("requests/s", 0, False),
    "cpu_us_per_request": Measure("CPU us/request"),
    "connections_s": Measure("connections/s", 0, False),
    "cpu_us_per_connection": Measure("CPU us/connection"),
    "handshakes_s": Measure("handshakes/s", 0, False),
    "cpu_us_per_handshake": Measure("CPU us/handshake", 0),
    "round_trips_s": Measure("round trips/s", 0, False),
    "cpu_us_per_round_trip": Measure("CPU us/round trip"),
    "mib_s": Measure("MiB/s", 0, False),
    "cpu_us_per_mib": Measure("CPU us/MiB", 0),
    "rate": Measure("asked requests/s", 0, False),
    "connections": Measure("connections", 0, False),
    "plain_kib": Measure("KiB/plain connection", 2),
    "tls_kib": Measure("KiB/TLS connection", 2),
    "gain": Measure("2 workers : 1", 2, False),
    "rps_1": Measure("requests/s, 1 worker", 0, False),
    "rps_2": Measure("requests/s, 2 workers", 0, False),
    "cpu_us_per_request_1": Measure("CPU us/request, 1 worker"),
    "cpu_us_per_request_2": Measure("CPU us/request, 2 workers"),
    **{
        f"{step}_ms_{size}": Measure(f"{step} {size:,} ms", 1)
        for size in (100, 1000, 5000)
        for step in ("parse", "build", "apply")
    },
    "p50_us": Measure("p50 us", 0),
    "p99_us": Measure("p99 us", 0),
    "p999_us": Measure("p99.9 us", 0),
    "rss_mib": Measure("RSS MiB"),
    "failed": Measure("failed", 0),
}
"""Every measure of every question, in the order of tables."""

CPU = tuple(name for name in MEASURES if name.startswith("cpu_us"))


@dataclass
class Figures:
    """All rounds of one question. `subject`: whose ratios to the others are of interest."""

    name: str
    subject: str
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    """By system, as many for each as there were rounds."""
    absent: dict[str, str] = field(default_factory=dict)
    """Systems that were asked for and could not be measured, with the reason."""

    def add(self, system: str, found: Round) -> None:
        self.rounds.setdefault(system, []).append(found)

    def drop(self, system: str, reason: str) -> None:
        """What it has shown so far does not count: the others went on without it."""
        self.rounds.pop(system, None)
        self.absent[system] = reason


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def by_measure(rounds: Iterable[Round]) -> dict[str, list[float]]:
    """A measure counts only if every round has it."""
    rounds = list(rounds)
    return {
        name: [found[name] for found in rounds]
        for name in MEASURES
        if rounds and all(name in found for found in rounds)
    }


def ratios(mine: Sequence[Round], theirs: Sequence[Round]) -> dict[str, dict[str, float]]:
    """Of what both have, mine to theirs; not where theirs is 0 in some round."""
    ours, others = by_measure(mine), by_measure(theirs)
    return {
        name: _rounded(spread([a / b for a, b in zip(ours[name], others[name], strict=True)]), 3)
        for name in ours
        if name in others and name != "failed" and all(others[name])
    }


def document(figures: Figures, machine: Mapping[str, Any]) -> dict[str, Any]:
    """As ``--json`` writes it. `systems` has medians; `spread` has minima and maxima beside them."""
    spreads = {
        system: {name: _rounded(spread(values), 3) for name, values in by_measure(rounds).items()}
        for system, rounds in figures.rounds.items()
    }
    mine = figures.rounds.get(figures.subject)
    return {
        "name": figures.name,
        "machine": dict(machine),
        "rounds": max((len(rounds) for rounds in figures.rounds.values()), default=0),
        "systems": {
            system: {name: values["median"] for name, values in measures.items()}
            for system, measures in spreads.items()
        },
        "spread": spreads,
        "subject": figures.subject,
        "ratio_to": {
            system: ratios(mine, theirs)
            for system, theirs in figures.rounds.items()
            if mine is not None and system != figures.subject
        },
        "absent": dict(figures.absent),
    }


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
