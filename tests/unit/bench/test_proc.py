from __future__ import annotations

import os

import pytest

from bench import _proc
from bench._proc import TICK_US, cpu_us, parse_stat, tree

FIELDS = "S 7 42 42 0 -1 4194560 900 1000 1 2 150 50 30 40 20 0 3 0 1000 1000 200 18446744073709551615"


@pytest.mark.parametrize("name", ["nginx", "a b", "a) S 1 (b", "((", ")"])
def test_stat_whatever_the_name_is(name: str) -> None:
    found = parse_stat(f"42 ({name}) {FIELDS}\n")
    assert (found.pid, found.parent) == (42, 7)
    assert found.cpu_us == 200 * TICK_US  # user and system, not those of children


def test_tree_has_what_is_below_and_nothing_else() -> None:
    found = tree([os.getpid()])
    assert os.getpid() in found
    assert os.getppid() not in found
    assert tree([os.getppid()])[0] <= os.getpid()
    assert os.getpid() in tree([os.getppid()])
    assert tree([0x7FFFFFFF]) == []


def test_cpu_time_of_several_is_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_proc.Path, "read_text", lambda _path: f"42 (x) {FIELDS}")
    assert cpu_us([1, 2, 3]) == 600 * TICK_US


def test_a_process_that_is_gone_is_no_zero() -> None:
    with pytest.raises(FileNotFoundError):
        cpu_us([0x7FFFFFFF])
