"""What this node is about to touch, written before it is touched: `netproxy clean` works from it.

JSON in the run folder: ``{"node": ..., "workloads": {key: {"netns": path, "dev": n, "ino": n}}}``. Replaced
atomically. An entry goes when nothing of ours is left in that namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import NotRequired, TypedDict


class Entry(TypedDict):
    netns: str
    dev: int
    ino: int
    cgroup: NotRequired[int]
    """Its id, of a service of the host."""


class Journal:
    def __init__(self, path: str, node: str) -> None:
        self._path = path
        self._node = node
        self.entries: dict[str, Entry] = {}
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError), open(path) as file:
            self.entries = dict(json.load(file)["workloads"])

    def add(self, workload: str, entry: Entry) -> None:
        """Raises OSError: what can't be written down is not touched."""
        if self.entries.get(workload) != entry:
            self.entries[workload] = entry
            self._write()

    def remove(self, workload: str) -> None:
        if self.entries.pop(workload, None) is not None:
            with contextlib.suppress(OSError):  # an entry too many is looked at in vain, no more
                self._write()

    def _write(self) -> None:
        temporary = f"{self._path}.new"
        with open(temporary, "w") as file:
            json.dump({"node": self._node, "workloads": self.entries}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
