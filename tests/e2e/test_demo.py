"""The demonstration holds, says so by its exit code, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pyroute2 import netns

from examples.stage import wait_for

_ROOT = Path(__file__).resolve().parent.parent.parent
_COMMAND = [sys.executable, "-m", "examples.demo"]


def _left() -> list[str]:
    names = [name for name in netns.listnetns() if name.startswith("demo-")]
    etc = Path("/etc/netns")
    return names + [str(path) for path in etc.glob("demo-*")] if etc.exists() else names


def test_the_demonstration() -> None:
    done = subprocess.run(_COMMAND, cwd=_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert _left() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demonstration_cleans_up(how: signal.Signals) -> None:
    with subprocess.Popen(
        _COMMAND, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as demo:
        wait_for(lambda: len(_left()) >= 5, "the stage to be there", 60)
        demo.send_signal(how)
        assert demo.wait(60) != 0
    assert _left() == []


def test_a_kept_demonstration_ends_when_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(
        _COMMAND, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, "KEEP": "1"}
    ) as demo:  # fmt: skip
        said = b"ends it and removes everything"
        wait_for(lambda: demo.poll() is not None or said in log.read_bytes(), "the end of the last step", 150)
        assert len(_left()) >= 7, log.read_text()[-3000:]
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 0, log.read_text()[-3000:]
    assert _left() == []
