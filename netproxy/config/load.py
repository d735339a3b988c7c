"""From a path to a snapshot: source, validation and build in one call."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

from . import source
from .snapshot import Context, Snapshot, build_snapshot
from .validate import validate


def load(path: str | os.PathLike[str], context: Context) -> Snapshot:
    """Raises ConfigError only when `path` can't be read; everything else is in `Snapshot.rejected`."""
    with _collector_paused():
        found = source.read(path)
        valid = validate(found.documents)
        return build_snapshot(valid.objects, context, (*found.errors, *valid.errors))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A great many small objects that all stay: 10,000 Workloads took 9 s with the collector and 2 s without."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
