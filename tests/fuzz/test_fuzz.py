"""A small budget of what `make fuzz` does for minutes, the same each time; and that it would find something."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from netproxy.codec import h2_strict, strict
from netproxy.codec.events import End
from netproxy.codec.h1_native import H1NativeServer
from netproxy.codec.h1_reference import H1ReferenceServer
from netproxy.codec.h2_native import H2NativeServer
from netproxy.codec.h2_reference import H2ReferenceServer
from netproxy.errors import RemoteProtocolError

from ..differential import test_h1, test_h2
from ..differential.libraries import frames_of
from . import loop, targets
from .targets import SERVER, Input

ROOT = Path(__file__).parents[2]
RUNS = {"h1": 5000, "h2": 2500}
ATHERIS_RUNS = {"h1": 3000, "h2": 1200}


@pytest.mark.parametrize("protocol", loop.PROTOCOLS)
def test_mutations(protocol: str, tmp_path: Path) -> None:
    assert loop.run_own(protocol, tmp_path, runs=RUNS[protocol], seed=1) == RUNS[protocol]


@pytest.mark.parametrize("protocol", loop.PROTOCOLS)
def test_the_program(protocol: str, tmp_path: Path) -> None:
    """With atheris where it is, else other mutations than above."""
    options = ["--runs", str(ATHERIS_RUNS[protocol]), "--seed", "2", "--findings", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", protocol, *options],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    if importlib.util.find_spec("atheris") is not None:
        assert f"{protocol}: atheris mutations, seed 2" in done.stdout
        assert f"Done {ATHERIS_RUNS[protocol]} in" in done.stderr
    else:
        assert f"{protocol}: own mutations, seed 2" in done.stdout
        assert f"{ATHERIS_RUNS[protocol]} runs, nothing differs" in done.stdout


def made(protocol: str, runs: int, seed: int = 3) -> list[bytes]:
    chosen = loop.target(protocol)
    inputs = []
    for number in range(runs):
        rng = random.Random(f"{seed} {number}")
        inputs.append(chosen.mutated(rng.choice(chosen.seeds), chosen.seeds, rng))
    return inputs


@pytest.mark.parametrize("protocol", loop.PROTOCOLS)
def test_inputs_are_made_from_the_seed_alone(protocol: str) -> None:
    assert made(protocol, 50) == made(protocol, 50)
    assert made(protocol, 50) != made(protocol, 50, seed=4)


def test_what_mutations_reach() -> None:
    """Octets that are refused at once try out nothing: most rules have to be met, and many messages taken."""
    taken = 0
    rules = {"h1": set[str](), "h2": set[str]()}
    for data in made("h1", 3000):
        case = Input.read(data)
        if case.side == SERVER:
            events, detail = targets._read_requests(H1NativeServer(), case.wire)
            taken += End(1) in events
            rules["h1"].add(detail)
    for data in made("h2", 3000):
        case = Input.read(data)
        if case.side == SERVER:
            engine = H2NativeServer()
            engine.receive(targets.h2f.CLIENT_START)
            try:
                for raw in frames_of(case.wire):
                    rules["h2"] |= {event.detail for event in engine.receive(raw) if hasattr(event, "detail")}
            except RemoteProtocolError as exc:
                rules["h2"].add(exc.detail)
    # The rest is of answers, or takes amounts.
    assert taken > 250
    assert {rule.name for rule in strict.Rule if rule.detail not in rules["h1"]} <= {
        *("STATUS_LINE", "TE_STATUS", "SWITCH", "UNSOLICITED"),
        *("HEAD_SIZE", "FIELD_COUNT", "TRAILER_SIZE", "CHUNK_LINE_SIZE", "CHUNK_OVERHEAD"),
    }
    assert {rule.name for rule in h2_strict.Rule if rule.detail not in rules["h2"]} <= {
        *("STATUS", "INFORMATIONAL", "NO_HEAD", "NO_CONTENT", "TRAILER_FIELD", "TUNNEL_FRAME"),
        *("BLOCK_SIZE", "BOMB", "GLITCHES", "RESETS", "TOO_MANY", "WINDOW_EXCEEDED"),
        *("PREFACE", "NO_SETTINGS"),  # inputs choose among starts, see `targets`
    }


class Broken1(H1NativeServer):
    """Takes LF for CRLF at the end of a head."""

    def receive(self, data: bytes) -> Any:
        return super().receive(data.replace(b"\r\n\n", b"\r\n\r\n"))


class Broken2(H2NativeServer):
    """Reads the name of a field otherwise."""

    def receive(self, data: bytes, now: float = 0.0) -> Any:
        return super().receive(data.replace(b"grpc-status", b"grpc-statuS"), now)


@pytest.mark.parametrize("protocol", loop.PROTOCOLS)
def test_a_difference_is_found_and_written_down(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_h1, "SERVERS", (H1ReferenceServer, Broken1))
    monkeypatch.setattr(test_h2, "SERVERS", (Broken2, H2ReferenceServer))
    with pytest.raises(loop.Finding, match=f"again: python -m tests.fuzz {protocol} {tmp_path}"):
        loop.run_own(protocol, tmp_path, runs=RUNS[protocol], seed=1)
    (file,) = tmp_path.iterdir()
    with pytest.raises(AssertionError):
        loop.play_file(protocol, file)
    monkeypatch.undo()
    loop.play_file(protocol, file)
