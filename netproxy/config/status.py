"""What became of each object: Kubernetes conditions, errors and warnings. PURE."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from .model import Object, Resource


@dataclass(frozen=True, slots=True)
class Condition:
    """As in Kubernetes. Type ``Warning`` (status True) is ours: accepted, but not all of it has an effect."""

    type: Literal["Accepted", "ResolvedRefs", "Warning"]
    status: Literal["True", "False"]
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """`parent` is ``Service shop/reviews``, with `` port 80`` or `` section http`` where the reference has them."""

    parent: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """`parents` is for routes; their `conditions` sum them up: accepted if any parent accepts."""

    obj: str
    file: str
    line: int
    conditions: tuple[Condition, ...]
    parents: tuple[ParentStatus, ...] = ()
    generation: int = 0

    def get(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)


class Statuses:
    """Collects them while a snapshot is built. `rejected` begins with the errors of reading and validation."""

    def __init__(self, invalid: Iterable[ConfigError]) -> None:
        self._invalid = tuple(invalid)
        self.rejected = list(self._invalid)
        self.found: dict[str, ObjectStatus] = {}
        self._warnings: dict[str, list[tuple[str, str]]] = {}

    def accept(self, obj: Object[Resource], *more: Condition) -> None:
        self.set(obj, (Condition("Accepted", "True", "Accepted"), *more))

    def refuse(self, obj: Object[Resource], reason: str, message: str) -> None:
        self.set(obj, (Condition("Accepted", "False", reason, message),))

    def reject(self, obj: Object[Resource], *errors: ConfigError, reason: str = "Conflicted") -> None:
        self.rejected += errors
        self.refuse(obj, reason, "; ".join(f"{error.field}: {error.message}" for error in errors))

    def set(
        self, obj: Object[Resource], conditions: tuple[Condition, ...], parents: tuple[ParentStatus, ...] = ()
    ) -> None:
        line, generation = obj.document.line_of(()), obj.resource.metadata.generation
        self.found[obj.title] = ObjectStatus(obj.title, obj.document.file, line, conditions, parents, generation)

    def warn(self, obj: Object[Resource], reason: str, message: str) -> None:
        self._warnings.setdefault(obj.title, []).append((reason, message))

    def finish(self) -> dict[str, ObjectStatus]:
        for title, found in self._warnings.items():
            status = self.found[title]
            shown = [message for _, message in found[:10]] + (
                [f"and {len(found) - 10} more"] if len(found) > 10 else []
            )
            warning = Condition("Warning", "True", found[0][0], "; ".join(shown))
            self.found[title] = dataclasses.replace(status, conditions=(*status.conditions, warning))
        by_obj: dict[str, list[ConfigError]] = {}
        for error in self._invalid:
            if error.obj and error.obj not in self.found:
                by_obj.setdefault(error.obj, []).append(error)
        for title, errors in by_obj.items():
            text = "; ".join(": ".join(part for part in (error.field, error.message) if part) for error in errors)
            refused = Condition("Accepted", "False", "Invalid", text)
            self.found[title] = ObjectStatus(title, errors[0].file, errors[0].line, (refused,))
        return self.found


def first(obj: Object[Resource]) -> str:
    """How the object that came first is named in the message for the second."""
    return f"{obj.title} at {obj.document.place}"
