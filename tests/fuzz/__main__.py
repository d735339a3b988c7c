"""``python -m tests.fuzz [h1|h2|all]``: changed messages to both engines and the libraries, until something differs.

With atheris (libFuzzer) where it has a wheel for the interpreter, else with a loop of our own over the same mutations.
atheris sees no branches of compiled code. It does see those of the reference engines, of their rules and of h11, h2 and
hpack, which do the same step by step, so an input that is new to them is kept and changed further.

``python -m tests.fuzz h2 FILE``: plays a finding again.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.loop import PROTOCOLS, Finding, play_file, run_atheris, run_own


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("protocol", nargs="?", choices=(*PROTOCOLS, "all"), default="all")
    parser.add_argument("file", nargs="?", type=Path, help="play this one input")
    parser.add_argument("--seconds", type=int, default=60, help="of each (default: 60)")
    parser.add_argument("--runs", type=int, default=0, help="instead of seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the random (default: another each time)")
    parser.add_argument("--findings", type=Path, help="folder for them (default: a new temporary one)")
    parser.add_argument("--engine", choices=("auto", "atheris", "own"), default="auto")
    found = parser.parse_args()
    seed = found.seed or time.time_ns() % 2**31
    has_atheris = importlib.util.find_spec("atheris") is not None
    engine = found.engine if found.engine != "auto" else "atheris" if has_atheris else "own"
    if engine == "atheris" and not has_atheris:
        parser.error("--engine atheris: it is not installed for this Python")
    if found.protocol == "all":
        if found.file:
            parser.error("which protocol is the file of?")
        limit = ["--runs", str(found.runs)] if found.runs else ["--seconds", str(found.seconds)]
        folder = found.findings or Path(tempfile.mkdtemp(prefix="netproxy-fuzz-"))
        # A process each: atheris ends the one it is in.
        command = [sys.executable, "-m", "tests.fuzz"]
        rest = [*limit, "--seed", str(seed), "--findings", str(folder), "--engine", engine]
        codes = [subprocess.run([*command, name, *rest], check=False).returncode for name in PROTOCOLS]
        if any(codes):
            print(f"findings are in {folder}")
        else:
            print(f"{', '.join(PROTOCOLS)}: nothing differs")
            if not found.findings:
                shutil.rmtree(folder)
        return int(any(codes))
    if found.file:
        play_file(found.protocol, found.file)
        print(f"{found.protocol}: {found.file} plays without a difference")
        return 0
    folder = found.findings or Path(tempfile.mkdtemp(prefix="netproxy-fuzz-"))
    print(f"{found.protocol}: {engine} mutations, seed {seed}, findings go to {folder}", flush=True)
    if engine == "atheris":
        run_atheris(found.protocol, folder, seconds=found.seconds, runs=found.runs, seed=seed)
    try:
        runs = run_own(found.protocol, folder, seconds=found.seconds, runs=found.runs, seed=seed)
    except Finding as exc:
        print(f"{found.protocol}: {exc}", flush=True)
        return 1
    print(f"{found.protocol}: {runs} runs, nothing differs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
