"""The state folder of a node: what addresses were found or assigned, and what could not be written. Brain's part.

Without the folder we go on, and forget at a restart what could not be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from typing import Literal

from .log import WARNING, log

AGAIN_S = 5.0
"""Between two tries of what failed."""

Addresses = Literal["vips", "nameservers"]
"""Of services and external hosts; of the resolvers of workloads."""


class StateFolder:
    def __init__(self, path: str) -> None:
        self.path = path
        self._errors: dict[str, str] = {}
        self._retry_at = 0.0

    @property
    def error(self) -> str:
        return in_short(self._errors.values())

    def note(self, what: str, failed: OSError | None = None) -> None:
        """`what` could be written, or failed. Logged when that changes."""
        if failed is None:
            if self._errors.pop(what, "") and not self._errors:
                log("state: it can be written again")
        elif self._errors.get(what) != str(failed):
            self._errors[what] = str(failed)
            log(f"state: {failed}; goes on without", WARNING)

    def make(self) -> bool:
        """The folder is there."""
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as exc:
            self.note("folder", exc)
            return False
        self.note("folder")
        return True

    def should_retry(self) -> bool:
        """Something could not be written, and it is time to try again."""
        if not self._errors or time.monotonic() < self._retry_at:
            return False
        self._retry_at = time.monotonic() + AGAIN_S
        return True

    def load(self, what: Addresses) -> dict[str, tuple[str, ...]]:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError), open(self._file(what)) as file:
            return {key: tuple(map(str, value)) for key, value in json.load(file).items()}
        return {}

    def save(self, what: Addresses, addresses: Mapping[str, Iterable[str]]) -> None:
        path = self._file(what)
        try:
            with open(f"{path}.new", "w") as file:
                json.dump({key: list(value) for key, value in addresses.items()}, file)
            os.replace(f"{path}.new", path)
        except OSError as exc:
            self.note(what, exc)
        else:
            self.note(what)

    def _file(self, what: Addresses) -> str:
        return os.path.join(self.path, f"{what}.json")


def in_short(errors: Iterable[str]) -> str:
    """Each once, the first few of them."""
    different = list(dict.fromkeys(errors))
    more = [f"and {len(different) - 3} more"] if len(different) > 3 else []
    return "; ".join([*different[:3], *more])
