from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from netproxy.journal import Entry, Journal

WEB: Entry = {"netns": "/run/netns/web", "dev": 4, "ino": 1}


def test_it_is_on_disk_when_add_returns(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    journal = Journal(str(path), "node-a")
    assert not path.exists()
    journal.add("shop/web", WEB)
    assert json.loads(path.read_text()) == {"node": "node-a", "workloads": {"shop/web": WEB}}
    assert Journal(str(path), "node-a").entries == {"shop/web": WEB}
    assert os.listdir(tmp_path) == ["journal.json"]


def test_add_replaces_and_remove_forgets(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.json")
    journal = Journal(path, "node-a")
    moved: Entry = {**WEB, "ino": 2}
    journal.add("shop/web", WEB)
    journal.add("shop/web", moved)
    journal.add("shop/api", WEB)
    assert Journal(path, "node-a").entries == {"shop/web": moved, "shop/api": WEB}
    journal.remove("shop/web")
    journal.remove("shop/never")
    assert Journal(path, "node-a").entries == {"shop/api": WEB}


def test_what_does_not_change_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    journal = Journal(str(path), "node-a")
    journal.add("shop/web", WEB)
    path.unlink()
    journal.add("shop/web", dict(WEB))  # type: ignore[arg-type]
    journal.remove("shop/never")
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"workloads": []}', '{"workloads": null}', "\xff"])
def test_one_that_cannot_be_read_is_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.json"
    path.write_bytes(text.encode("latin-1"))
    journal = Journal(str(path), "node-a")
    assert journal.entries == {}
    journal.add("shop/web", WEB)
    assert Journal(str(path), "node-a").entries == {"shop/web": WEB}


def test_a_write_that_fails_keeps_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    journal = Journal(str(path), "node-a")
    journal.add("shop/web", WEB)
    (tmp_path / "journal.json.new").mkdir()
    with pytest.raises(OSError):
        journal.add("shop/api", WEB)
    assert Journal(str(path), "node-a").entries == {"shop/web": WEB}
