"""A question: which systems it is put to, how, and the run that puts it to all of them side by side.

In a run all systems are up at once. They take turns, a round each, and every round begins with another one, so that
what the machine does meanwhile falls on all alike. A system that does not start, or fails in a round, is reported as
absent with the reason; the others go on. One run at a time on a machine.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from bench import _proc
from bench._figures import CPU, Figures, Round, document
from bench._load import Load
from bench._machine import machine
from bench._report import table
from bench._systems import NAMES, Absent, System, make_place, make_system
from examples.stage import Node, Stage, forget_stale

T = TypeVar("T")

PREFIX = "bench"
LOCK = Path("/run/netproxy-bench.lock")


@dataclass(frozen=True)
class Options:
    seconds: int = 4
    rounds: int = 3
    systems: tuple[str, ...] = ()
    """Those asked for with ``--peers``; () are all that the question has."""
    connections: int = 2000
    """That stay idle; of one question only."""


@dataclass
class Standing:
    """One system in a run. With several shapes or numbers of workers it is started once for each."""

    name: str
    systems: list[System] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    """What a question finds out before the rounds."""

    @property
    def system(self) -> System:
        return self.systems[0]


Maker = Callable[[Stage, Node, str], System]


@dataclass(frozen=True)
class Question:
    """`shapes`: what systems are configured for, see `configs/`. `round`: puts it to one system once."""

    name: str
    text: str
    """One line."""
    shapes: tuple[str, ...]
    systems: tuple[str, ...]
    round: Callable[[Standing, Options], Round]
    prepare: Callable[[Standing, Options], None] = lambda standing, options: None
    """Before the rounds; what it does counts nowhere."""
    subject: str = "netproxy"
    workers: tuple[int, ...] = (1,)
    make: Maker | None = None
    """For systems that are none of `_systems`."""
    share_of_seconds: float = 1.0
    """Of ``--seconds``, when a round has several measurements."""
    only_once: bool = False
    """One round, whatever was asked for: it measures no rate."""

    @property
    def variants(self) -> list[tuple[str, int]]:
        return [(shape, workers) for shape in self.shapes for workers in self.workers]

    def wanted(self, options: Options) -> tuple[str, ...]:
        """The subject is always there: without it there is nothing to compare."""
        if not options.systems:
            return self.systems
        return tuple(name for name in self.systems if name in options.systems or name == self.subject)

    def main(self, arguments: Sequence[str]) -> None:
        main(self, arguments)


def parse_options(question: Question, arguments: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    """Exits with code 2 and the reason when they are wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {question.name}", description=question.text)
    add_options(parser)
    if question.name == "idle_memory":
        parser.add_argument("--connections", type=_whole, default=2000, help="idle connections (default: 2000)")
    parser.add_argument("--peers", metavar="A,B", default="", help=f"only these of: {', '.join(question.systems)}")
    found = parser.parse_args(arguments)
    systems = tuple(name for name in found.peers.split(",") if name)
    unknown = [name for name in systems if name not in question.systems]
    if unknown:
        parser.error(f"--peers {','.join(unknown)}: not in this question, which has {', '.join(question.systems)}")
    check_writable(parser, found.json)
    return Options(found.seconds, found.rounds, systems, getattr(found, "connections", 2000)), found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=_whole, default=4, help="of one round (default: 4)")
    parser.add_argument("--rounds", type=_whole, default=3, help="per system (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--charts", metavar="FOLDER", help="also draw them there, one SVG per question")


def check_writable(parser: argparse.ArgumentParser, file: str | None) -> None:
    """Now, not after minutes of measuring."""
    if file is not None and not os.access(Path(file).resolve().parent, os.W_OK):
        parser.error(f"--json {file}: the folder is not there or can't be written")


def _whole(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 100,000")
    return value


def main(question: Question, arguments: Sequence[str]) -> None:
    options, found = parse_options(question, arguments)
    with alone():
        result = ask(question, options)
    print(table(result))
    if found.json:
        Path(found.json).write_text(json.dumps(result, indent=2) + "\n")
    if found.charts:
        from bench._chart import write_chart

        write_chart(result, Path(found.charts))
    if question.subject not in result["systems"]:
        sys.exit(1)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Root, no other run on this machine, and an end by SIGTERM or SIGHUP that cleans up like any other.

    SystemExit says why not.
    """
    if os.geteuid() != 0:
        sys.exit("bench: needs root: it makes network namespaces")
    with LOCK.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("bench: another run is under way on this machine")
        owner = os.getpid()

        def end(number: int, _frame: FrameType | None) -> None:
            if os.getpid() != owner:
                # A fork of pyroute2's, ended by it: what would be cleaned up here is not the fork's.
                os._exit(128 + number)
            sys.exit(128 + number)

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            forget_stale(PREFIX)  # of a run that was killed outright
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def ask(question: Question, options: Options, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Put it to all systems, and the document of what came out. Whatever happens, nothing is left."""
    tell = say or (lambda text: print(f"{question.name}: {text}", file=sys.stderr))
    figures = Figures(question.name, question.subject)
    wanted = question.wanted(options)
    seconds = max(1, round(options.seconds * question.share_of_seconds))
    timed = Options(seconds, options.rounds, options.systems, options.connections)
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder, contextlib.ExitStack() as stack:
        stage = stack.enter_context(Stage(PREFIX, Path(folder), nodes=len(wanted) * len(question.variants)))
        nodes = iter(stage.nodes)
        standings = []
        for name in wanted:
            standing = Standing(name)
            own = [next(nodes) for _ in question.variants]
            with _unless_absent(figures, standing, tell):
                for (shape, workers), node in zip(question.variants, own, strict=True):
                    system = _make(question, stage, node, (name, shape, workers))
                    stack.callback(system.stop)
                    standing.systems.append(system)
                    system.start()
                question.prepare(standing, timed)
                question.round(standing, Options(1, 1, (), 50))  # warm
                standings.append(standing)
        for number in range(1 if question.only_once else options.rounds):
            for standing in turns(standings, number):
                if standing.name not in figures.absent:
                    with _unless_absent(figures, standing, tell):
                        figures.add(standing.name, question.round(standing, timed))
            tell(f"round {number + 1} of {1 if question.only_once else options.rounds} done")
    return document(figures, machine(wanted))


def turns(standings: Sequence[T], number: int) -> list[T]:
    """The order of a round: each begins with the next one."""
    start = number % len(standings) if standings else 0
    return [*standings[start:], *standings[:start]]


@contextlib.contextmanager
def _unless_absent(figures: Figures, standing: Standing, tell: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except (Absent, OSError, subprocess.SubprocessError) as exc:
        reason = " | ".join(line.strip() for line in str(exc).splitlines() if line.strip())
        figures.drop(standing.name, reason)
        tell(f"{standing.name} is absent: {reason}")
        for system in standing.systems:
            system.stop()


def _make(question: Question, stage: Stage, node: Node, what: tuple[str, str, int]) -> System:
    name, shape, workers = what
    if question.make is not None:
        return question.make(stage, node, name)
    assert name in NAMES, name
    return make_system(name, make_place(stage, node, name, shape, workers))


def measure(system: System, load: Callable[[], Load], per: Mapping[str, str] | None = None) -> Round:
    """Run a load and read the CPU time before and after. `per`: other names for rps and cpu_us_per_request."""
    pids = system.pids()
    if not pids:
        raise Absent("it has ended")
    before = _proc.cpu_us(pids)
    done = load()
    try:
        spent = _proc.cpu_us(pids) - before
    except (FileNotFoundError, ProcessLookupError):
        raise Absent("one of its processes ended during the round") from None
    found = {
        "rps": done.rps,
        "cpu_us_per_request": spent / done.requests,
        "rss_mib": _proc.rss_mib(pids),
        "failed": float(done.failed),
    }
    if done.p50_us:
        found |= {"p50_us": done.p50_us, "p99_us": done.p99_us, "p999_us": done.p999_us}
    assert set(found) & set(CPU)
    return {(per or {}).get(name, name): value for name, value in found.items()}
