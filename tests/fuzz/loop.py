"""Two ways to go through mutations of the seeds: a loop of our own, and atheris. What differs is written to a file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PROTOCOLS = ("h1", "h2")
INSTRUMENTED = ["netproxy.codec", "h11", "h2", "hpack"]
MAX_INPUT = 8192 + 64


class Finding(AssertionError):
    """An input that came out differently, where it was written, and what was said."""


class Target(NamedTuple):
    run: Callable[[bytes], None]
    mutated: Callable[[bytes, list[bytes], random.Random], bytes]
    seeds: list[bytes]


def target(protocol: str) -> Target:
    """Imports the engines, so not before atheris could instrument them."""
    targets = importlib.import_module("tests.fuzz.targets")
    mutate = importlib.import_module("tests.fuzz.mutate")
    seeds = [bytes(seed) for seed in getattr(targets, f"{protocol}_seeds")()]
    return Target(getattr(targets, f"run_{protocol}"), getattr(mutate, f"mutated_{protocol}"), seeds)


def play_file(protocol: str, file: Path) -> None:
    target(protocol).run(file.read_bytes())


def run_own(protocol: str, folder: Path, *, seconds: float = 0, runs: int = 0, seed: int = 0) -> int:
    """So many runs, or as many as the seconds allow: how many they were. Raises Finding at the first."""
    chosen = target(protocol)
    end = time.monotonic() + seconds
    number = 0
    while number < runs if runs else time.monotonic() < end:
        # Each is made from its number alone: the same seed gives the same inputs.
        rng = random.Random(f"{seed} {number}")
        play(protocol, chosen, chosen.mutated(rng.choice(chosen.seeds), chosen.seeds, rng), folder)
        number += 1
    return number


def play(protocol: str, chosen: Target, data: bytes, folder: Path) -> None:
    try:
        chosen.run(data)
    except Exception as exc:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{protocol}-{hashlib.sha256(data).hexdigest()[:16]}"
        file.write_bytes(data)
        said = traceback.format_exception_only(exc)[-1].strip()[:2000]
        raise Finding(f"{said}\nagain: python -m tests.fuzz {protocol} {file}") from exc


def run_atheris(protocol: str, folder: Path, *, seconds: int = 0, runs: int = 0, seed: int = 0) -> NoReturn:
    """Does not return: libFuzzer ends the process, with code 0 when nothing was found."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED), contextlib.redirect_stderr(io.StringIO()):
        chosen = target(protocol)

    def mutator(data: bytes, size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, size))  # knows what the comparisons of the references look for
        return chosen.mutated(data, chosen.seeds, rng)[:size]

    def one(data: bytes) -> None:
        try:
            play(protocol, chosen, data, folder)
        except Finding as exc:
            print(f"{protocol}: {exc}", flush=True)
            raise

    corpus = folder / f"{protocol}-corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(chosen.seeds):
        (corpus / f"seed-{number:04}").write_bytes(data)
    limit = f"-atheris_runs={runs}" if runs else f"-max_total_time={seconds}"
    options = [limit, f"-seed={seed}", f"-max_len={MAX_INPUT}", f"-artifact_prefix={folder}/", "-verbosity=0"]
    setup: Any = atheris.Setup
    setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutator)
    atheris.Fuzz()
    raise AssertionError("libFuzzer came back")
