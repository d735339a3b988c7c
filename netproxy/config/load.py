"""From a path to a snapshot: source, validation and build in one call, and again when the files change.

A file that is edited badly must not undo what was in force: `Loader` remembers each object's last good version and
uses it while the object, or the file it stood in, can't be read, or claims what is another's. Objects that are gone
from readable files are gone. What is kept comes last: it never takes anything from an object that is good now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
from collections.abc import Iterable, Mapping

from ..errors import ConfigError
from . import source
from .fields import FieldPath
from .model import Document, Object, Resource
from .snapshot import Context, Snapshot, build_snapshot
from .validate import Validated, validate, validate_one


def load(path: str | os.PathLike[str], context: Context) -> Snapshot:
    """Raises ConfigError only when `path` can't be read; everything else is in `Snapshot.rejected`."""
    return Loader(path).load(context)


class Loader:
    """`memory`: file that keeps the last good versions across restarts; None: only this process remembers."""

    def __init__(self, path: str | os.PathLike[str], memory: str | None = None) -> None:
        self._path = path
        self._memory = memory
        self._good: dict[str, Object[Resource]] = _remembered(memory) if memory else {}
        self._written = _values(self._good)
        self.memory_error: OSError | None = None
        """Why `memory` is behind what is remembered."""

    def load(self, context: Context) -> Snapshot:
        """As the function `load`. `Snapshot.kept` names the objects whose last good version is in force."""
        # A great many small objects that all stay: 10,000 Workloads took 9 s with the collector and 2 s without.
        collecting = gc.isenabled()
        gc.disable()
        try:
            found = source.read(self._path)
            valid = validate(found.documents)
            errors = (*found.errors, *valid.errors)
            kept = self._keep(valid, errors)
            snapshot = build_snapshot((*valid.objects, *kept), context, errors)
            used = (*valid.objects, *kept)
            refused = snapshot.rejected[len(errors) :]
            if back := self._restore(valid, refused):
                titles = {item.title for item in back}
                why = tuple(error for error in refused if error.obj in titles)
                used = (*(item for item in valid.objects if item.title not in titles), *kept, *back)
                snapshot = build_snapshot(used, context, (*errors, *why))
                # What the second build says of them is about a version that is in no file any more.
                refused = snapshot.rejected[len(errors) + len(why) :]
                told = (*errors, *why, *(error for error in refused if error.obj not in titles))
                snapshot = dataclasses.replace(snapshot, rejected=told)
            lost = {error.obj for error in refused}
            in_force = {item.title: item for item in used if item.title not in lost}
            self._good = {title: item for title, item in self._good.items() if title in lost} | in_force
            self.save()
            names = sorted(item.title for item in (*kept, *back) if item.title not in lost)
            return dataclasses.replace(snapshot, kept=tuple(names))
        finally:
            if collecting:
                gc.enable()

    def _keep(self, valid: Validated, errors: Iterable[ConfigError]) -> list[Object[Resource]]:
        present = {item.title for item in valid.objects}
        titles, names, files = set(), set(), set()
        for error in errors:
            if not error.obj:
                # The whole file: syntax, encoding, permission.
                files.add(error.file)
            titles.add(error.obj)
            if error.field == "kind":
                # A typo: its title is not that of any object.
                names.add((error.file, error.obj.rpartition(" ")[2]))
        return [
            item
            for title, item in self._good.items()
            if title not in present
            and (title in titles or item.document.file in files or (item.document.file, item.name) in names)
        ]

    def _restore(self, valid: Validated, refused: Iterable[ConfigError]) -> list[Object[Resource]]:
        """The last good versions of objects that are valid by themselves and claim what is another's."""
        titles = {error.obj for error in refused}
        return [
            old
            for item in valid.objects
            if item.title in titles
            and (old := self._good.get(item.title)) is not None
            and old.document.value != item.document.value
        ]

    def save(self) -> None:
        """Bring `memory` up to date; `load` does it too. A disk that is full or read-only is in `memory_error`."""
        values = _values(self._good)
        if not self._memory or values == self._written:
            return
        documents = [
            {"file": item.document.file, "line": item.document.line_of(()), "value": item.document.value}
            for item in self._good.values()
        ]
        try:
            with open(f"{self._memory}.new", "w") as file:
                json.dump(documents, file)
            os.replace(f"{self._memory}.new", self._memory)
        except OSError as exc:
            self.memory_error = exc
        else:
            self._written, self.memory_error = values, None


class _Line:
    """The one line that is remembered of an object."""

    def __init__(self, line: int) -> None:
        self._line = line

    def __call__(self, _path: FieldPath) -> int:
        return self._line


def _values(objects: Mapping[str, Object[Resource]]) -> dict[str, object]:
    return {title: item.document.value for title, item in objects.items()}


def _remembered(path: str) -> dict[str, Object[Resource]]:
    """Whatever of it is still valid; a memory that can't be read is none."""
    good: dict[str, Object[Resource]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(path) as file:
        for entry in json.load(file):
            item = validate_one(Document(entry["file"], entry["value"], _Line(int(entry["line"]))))
            if not isinstance(item, list):
                good[item.title] = item
    return good
