"""What a run was made on and with. No name of the machine or of who owns it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from bench._systems import PROGRAMS, first_version, version

_ROOT = Path(__file__).resolve().parent.parent


def machine(systems: Iterable[str]) -> dict[str, object]:
    """Also the versions of everything that took part."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {
            "netproxy": _commit(),
            "Python": platform.python_version(),
            "wrk": _first(["wrk", "-v"]),
            "h2load": _first(["h2load", "--version"]),
            "nginx": version("nginx"),
            **{name: version(name) for name in systems if name in PROGRAMS},
        },
    }


def cpu_model(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _commit() -> str:
    """The commit, and whether there is more than it holds."""
    git = ["git", "-C", str(_ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "netproxy", "redirect"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no git here"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _first(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return first_version(done.stdout + done.stderr)
