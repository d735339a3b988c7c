from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from . import conftest

SKIPPING = {
    "tests/kernel/test_runtime.py": """
import pytest
def test_skips(): pytest.skip("no kernel")
@pytest.mark.skip(reason="by mark")
def test_marked(): pass
@pytest.mark.xfail
def test_expected(): assert False
""",
    "tests/e2e/test_module.py": """
import pytest
pytest.importorskip("no_such_module_anywhere")
""",
    "tests/unit/test_other.py": """
import pytest
def test_skips(): pytest.skip("optional")
""",
}


def run_pytest(
    folder: Path, files: Mapping[str, str], *args: str, ci: str = "true"
) -> subprocess.CompletedProcess[str]:
    """Runs our conftest over `files` in a session of its own."""
    files = {
        "tests/conftest.py": Path(conftest.__file__).read_text().replace("PATIENCE_S = 5.0", "PATIENCE_S = 0.0"),
        "pytest.ini": "[pytest]\nmarkers =\n    kernel:\n    e2e:\n",
        **files,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder), "-q", "-rA", *args]
    env = {**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_in_ci_a_skipped_kernel_or_e2e_test_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SKIPPING, "tests/kernel")
    assert done.returncode != 0
    assert "FAILED tests/kernel/test_runtime.py::test_skips" in done.stdout
    # A skip by mark happens in the set-up of the test, which pytest calls an error.
    assert "ERROR tests/kernel/test_runtime.py::test_marked" in done.stdout
    assert "XFAIL tests/kernel/test_runtime.py::test_expected" in done.stdout
    assert "a skip is a failure here (CI is set, or root): Skipped: no kernel" in done.stdout


def test_in_ci_a_module_that_skips_itself_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SKIPPING, "tests/e2e")
    assert done.returncode != 0
    assert "ERROR tests/e2e/test_module.py" in done.stdout
    assert "no_such_module_anywhere" in done.stdout


def test_other_tests_may_skip(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SKIPPING, "tests/unit")
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" in done.stdout


@pytest.mark.parametrize(
    ("ci", "uid", "expected"), [("", 1000, False), ("false", 1000, False), ("true", 1000, True), ("", 0, True)]
)
def test_where_a_skip_is_a_failure(monkeypatch: pytest.MonkeyPatch, ci: str, uid: int, expected: bool) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert conftest.skip_is_failure() is expected


def test_folders_give_markers(tmp_path: Path) -> None:
    files = {f"tests/{name}/test_{name}.py": "def test_it(): pass\n" for name in ("kernel", "e2e", "unit")}
    done = run_pytest(tmp_path, files, "-m", "kernel or e2e")
    assert "2 passed, 1 deselected" in done.stdout


def test_a_process_left_behind_fails_the_session(tmp_path: Path) -> None:
    program, pidfile = tmp_path / "netproxy-left-behind", tmp_path / "pid"
    program.symlink_to("/bin/sleep")
    source = f"""
import subprocess
def test_leaves():
    child = subprocess.Popen([{str(program)!r}, "60"])
    open({str(pidfile)!r}, "w").write(str(child.pid))
    child.returncode = 0  # or Popen warns that it still runs
"""
    try:
        done = run_pytest(tmp_path, {"tests/unit/test_leak.py": source})
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGKILL)
    assert done.returncode != 0
    assert "left on the host by this session" in done.stdout
    assert "netproxy-left-behind 60" in done.stdout


def test_only_what_was_not_there_before_is_a_leak() -> None:
    before = {"ip rule": ["0: local", "9: same"], "/run/netproxy": ["/run/netproxy/old"]}
    after = {"ip rule": ["0: local", "9: same", "9: same"], "/run/netproxy": [], "ip link": ["veth0"]}
    assert conftest.leaks(before, after) == ["ip rule: 9: same", "ip link: veth0"]


def test_a_process_of_another_session_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"], env={conftest.SESSION_VARIABLE: "theirs"}) as child:
        try:
            assert conftest._processes("ours") == []
        finally:
            child.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="reads the host's state as root")
def test_every_probe_of_the_host_works() -> None:
    state = conftest.read_host()
    assert "lo" in {Path(line).name for line in state["ip link"]}
    assert state["ip rule"]
