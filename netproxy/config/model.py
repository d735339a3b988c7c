"""The objects a user writes, typed: Kubernetes shapes and our own.

Field names are those of Kubernetes (camelCase) and unknown fields are errors: a typo must never be a setting
that silently does nothing. Values are strict (``port: "80"`` is text, hence an error), and ``null`` for a known field
is the same as leaving it out, as in Kubernetes. Fields of Kubernetes that mean nothing here are named in the
models, typed Any. What the Gateway API allows and netproxy can't do yet is refused with "not supported yet".

A check that concerns one field is on that field's type; one that compares fields is a model validator that names
the guilty field through `fields.problems`, so that every message carries the place of the very field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import ConfigError
from .fields import FieldPath
from .kubernetes import EndpointSlice, HTTPRoute, Service, TCPRoute
from .mesh import ExternalService, MeshConfig, PeerAuthentication, Workload

Resource = Service | EndpointSlice | HTTPRoute | TCPRoute | Workload | ExternalService | MeshConfig | PeerAuthentication


# --- what a source hands over, and what validation makes of it


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a document before its fields are looked at, such as a duplicate key."""

    path: FieldPath
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """One object as plain Python values. `line_of` gives the line of a field, or of the nearest field around it."""

    file: str
    value: Mapping[str, Any]
    line_of: Callable[[FieldPath], int]
    problems: tuple[Problem, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line_of(())}"


R_co = TypeVar("R_co", bound=Resource, covariant=True)


@dataclass(frozen=True, slots=True)
class Object(Generic[R_co]):
    """A valid resource and where it was written."""

    resource: R_co
    document: Document

    @property
    def name(self) -> str:
        """``ns/name``"""
        return f"{self.resource.metadata.namespace}/{self.resource.metadata.name}"

    @property
    def title(self) -> str:
        """``Kind ns/name``, as in `ConfigError.obj`."""
        return f"{self.resource.kind} {self.name}"

    @property
    def age(self) -> tuple[float, str]:
        """Sorts oldest first, then by name. An object without a creationTimestamp is younger than any with one."""
        created = self.resource.metadata.creation_timestamp
        return (created.timestamp() if created else float("inf"), self.name)

    def error(self, message: str, *path: str | int) -> ConfigError:
        document = self.document
        return ConfigError(
            message, file=document.file, line=document.line_of(path), obj=self.title, field=field_text(path)
        )


_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def field_text(path: FieldPath) -> str:
    """``spec.rules[0].weight``; ``metadata.labels[example.com/app]``"""
    text = ""
    for part in path:
        if isinstance(part, int) or _PLAIN_KEY.fullmatch(part) is None:
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
