"""Rules for every test.

* What lies in ``kernel/`` or ``e2e/`` carries that marker.
* Where such a test can run, it has to: with ``CI`` set, or as root, its skip is a failure.
* A session leaves nothing on the host: no namespace, interface, ruleset, rule, file or process that was not there
  before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

TESTS = Path(__file__).resolve().parent
MARKED_FOLDERS = ("kernel", "e2e")

SESSION_LOCK = Path("/run/netproxy-tests.lock")
SESSION_VARIABLE = "NETPROXY_TEST_SESSION"
"""Inherited by every process that a test starts, so that those of another session are not taken for ours."""

LEAK_PATIENCE_S = 5.0
"""What a test has stopped may still be exiting."""


# --- what is compiled


def pytest_sessionstart() -> None:
    """A module that was compiled before its source changed would be tested in the place of the source."""
    built = TESTS.parent / ".venv" / ".built"  # by tools/setup
    for line in built.read_text().splitlines() if built.exists() else ():
        digest, _, name = line.partition("  ")
        path = TESTS.parent / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            pytest.exit(f"{name} has changed since it was compiled: make setup", returncode=2)


# --- markers and skips


def _folder_marker(path: Path) -> str | None:
    """The marker that a file has from its folder."""
    with contextlib.suppress(ValueError):
        folder = path.resolve().relative_to(TESTS).parts[0]
        return folder if folder in MARKED_FOLDERS else None
    return None


def skip_is_failure() -> bool:
    return os.environ.get("CI", "").lower() not in {"", "0", "false"} or os.geteuid() == 0


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := _folder_marker(item.path):
            item.add_marker(marker)


def _fail_instead_of_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: a skip is a failure here (CI is set, or root): {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: after pytest itself has dealt with xfail
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marked = any(item.get_closest_marker(name) for name in MARKED_FOLDERS)
    if report.skipped and marked and not hasattr(report, "wasxfail") and skip_is_failure():
        _fail_instead_of_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself as a whole (``importorskip``)."""
    report = yield
    if report.outcome == "skipped" and _folder_marker(collector.path) and skip_is_failure():
        _fail_instead_of_skip(report)
    return report


# --- leaks


def _lines(*command: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return []


def _entries(folder: str) -> list[str]:
    return [str(path) for path in Path(folder).glob("**/*")]


def _processes(session: str) -> list[str]:
    """Those which mention netproxy in their argv and were started by this session. A zombie has no argv."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if "netproxy" in argv and f"{SESSION_VARIABLE}={session}".encode() in (
                (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(f"pid {entry.name}: {argv}")
    return found


HOST_PROBES: dict[str, Callable[[], list[str]]] = {
    "ip netns list": lambda: _entries("/run/netns"),
    "ip link": lambda: _entries("/sys/class/net"),
    "nft list ruleset": lambda: _lines("nft", "--stateless", "list", "ruleset"),
    "ip rule": lambda: _lines("ip", "rule"),
    "ip -6 rule": lambda: _lines("ip", "-6", "rule"),
    "/run/netproxy": lambda: _entries("/run/netproxy"),
    "/sys/fs/bpf/netproxy": lambda: _entries("/sys/fs/bpf/netproxy"),
}
"""State of the whole host that only root can change."""

State = dict[str, list[str]]


def read_host() -> State:
    return {name: probe() for name, probe in HOST_PROBES.items()} if os.geteuid() == 0 else {}


def leaks(before: State, after: State) -> list[str]:
    """What `after` has more of than `before`, as lines. What has gone is not ours to judge."""
    return [
        f"{name}: {line}"
        for name, lines in after.items()
        for line in (Counter(lines) - Counter(before.get(name, ()))).elements()
    ]


def _is_only_session(lock: IO[Any] | None) -> bool:
    """While another session is running, nobody can tell whose a namespace is."""
    if lock is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    session = f"{os.getpid()}.{time.monotonic_ns()}"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(SESSION_LOCK.open("ab")) if os.geteuid() == 0 else None
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_SH)
        outer_session = os.environ.get(SESSION_VARIABLE)
        os.environ[SESSION_VARIABLE] = session
        before = read_host()
        yield
        deadline = time.monotonic() + LEAK_PATIENCE_S
        while (left := leaks(before, read_host()) + _processes(session)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if outer_session is None:
            del os.environ[SESSION_VARIABLE]
        else:
            os.environ[SESSION_VARIABLE] = outer_session
        if not left:
            return
        text = "left on the host by this session:\n  " + "\n  ".join(left)
        if _processes(session) or _is_only_session(lock):
            pytest.fail(text, pytrace=False)
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\nnot judged, since another test session is running: {text}")
