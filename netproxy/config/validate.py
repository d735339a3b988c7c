"""Documents to typed objects, each accepted or rejected by itself.

All errors of an object are reported, each with the line of the very field and a message for people: pydantic
says what is wrong, this says it in words and guesses at typos. PURE.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import ConfigError
from .fields import NOT_YET, FieldPath
from .kubernetes import GATEWAY_API, GATEWAY_GROUP, EndpointSlice, HTTPRoute, Service, TCPRoute
from .mesh import MESH_API, ExternalService, MeshConfig, PeerAuthentication, Workload
from .model import Document, Object, Resource, field_text

KINDS: dict[str, tuple[str, type[Resource]]] = {
    "Service": ("v1", Service),
    "EndpointSlice": ("discovery.k8s.io/v1", EndpointSlice),
    "HTTPRoute": (GATEWAY_API, HTTPRoute),
    "TCPRoute": (GATEWAY_API, TCPRoute),
    "Workload": (MESH_API, Workload),
    "ExternalService": (MESH_API, ExternalService),
    "MeshConfig": (MESH_API, MeshConfig),
    "PeerAuthentication": (MESH_API, PeerAuthentication),
}
SUPPORTED = ", ".join(f"{kind} ({version})" for kind, (version, _) in KINDS.items())
OLD_VERSIONS = {"TCPRoute": f"{GATEWAY_GROUP}/v1alpha2"}
"""What is read as well, where the shape is the same."""

_KINDS_TO_COME = frozenset(
    {"GRPCRoute", "TLSRoute", "BackendTLSPolicy", "ReferenceGrant", "AuthorizationPolicy"}
    | {"RequestAuthentication", "BackendTrafficPolicy", "RateLimitPolicy", "FaultInjectionPolicy"}
)
_MAX_ERRORS = 100
"""Of one object: more help nobody."""


@dataclass(frozen=True, slots=True)
class Validated:
    """Both in the order of the documents."""

    objects: tuple[Object[Resource], ...]
    errors: tuple[ConfigError, ...]


def validate(documents: Iterable[Document]) -> Validated:
    """Of several valid objects with one kind, namespace and name, the first counts."""
    objects: list[Object[Resource]] = []
    errors: list[ConfigError] = []
    first: dict[str, str] = {}
    for document in documents:
        found = validate_one(document)
        if isinstance(found, list):
            errors += found
        elif place := first.get(found.title):
            errors.append(found.error(f"is defined already at {place}", "metadata", "name"))
        else:
            first[found.title] = document.place
            objects.append(found)
    return Validated(tuple(objects), tuple(errors))


def validate_one(document: Document) -> Object[Resource] | list[ConfigError]:
    """The object, or everything that is wrong with it in the order of the lines."""
    found: list[tuple[int, FieldPath, str]] = [(p.line, p.path, p.message) for p in document.problems]
    resource: Resource | None = None
    kind = document.value.get("kind")
    if problem := _kind_problem(document):
        path, message = problem
        found.append((document.line_of(path), path, message))
    else:
        model = KINDS[str(kind)][1]
        try:
            resource = model.model_validate(document.value)
        except ValidationError as exc:
            for error in exc.errors(include_url=False)[:_MAX_ERRORS]:
                found += [(document.line_of(path), path, text) for path, text in _in_words(error, model)]
    if resource is not None and not found:
        return Object(resource, document)
    found.sort(key=lambda problem: problem[0])
    title = _title(document)
    return [
        ConfigError(message, file=document.file, line=line, obj=title, field=field_text(path))
        for line, path, message in found
    ]


def _kind_problem(document: Document) -> tuple[FieldPath, str] | None:
    version, kind = document.value.get("apiVersion"), document.value.get("kind")
    if not isinstance(kind, str) or not kind:
        return ("kind",), f"required; supported: {SUPPORTED}"
    if kind in _KINDS_TO_COME:
        return ("kind",), f"{kind} is {NOT_YET}; supported: {SUPPORTED}"
    if kind not in KINDS:
        return ("kind",), f"unknown kind {_show(kind)}{_guess(kind, KINDS)}; supported: {SUPPORTED}"
    wanted = KINDS[kind][0]
    if version not in (wanted, OLD_VERSIONS.get(kind)) or version is None:
        return ("apiVersion",), f"{kind} is supported as {_show(wanted)}, not {_show(version)}; supported: {SUPPORTED}"
    return None


def _title(document: Document) -> str:
    """``Kind ns/name`` as far as they can be told."""
    kind, meta = document.value.get("kind"), document.value.get("metadata")
    name = namespace = None
    if isinstance(meta, dict):
        name, namespace = meta.get("name"), meta.get("namespace", "default")

    def text(value: object) -> str:
        return value[:253] if isinstance(value, str) and value and value.isprintable() else "?"

    return f"{text(kind)} {text(namespace or 'default')}/{text(name)}"


def _in_words(error: ErrorDetails, model: type[BaseModel]) -> Iterator[tuple[FieldPath, str]]:
    path: FieldPath = tuple(part for part in error["loc"] if part != "[key]")
    context: dict[str, Any] = error.get("ctx", {})
    if error["type"] == "too_short" and len(error["input"]) >= context["min_length"]:
        return  # pydantic counts the valid items only, and the others have errors of their own
    if error["type"] == "problems":
        for below, text in context["problems"]:
            yield (*path, *below), text
        return
    yield path, _message(error["type"], context, error, model)


def _message(kind: str, context: dict[str, Any], error: ErrorDetails, model: type[BaseModel]) -> str:
    given = error["input"]
    match kind:
        case "missing":
            return "required"
        case "extra_forbidden":
            *around, name = error["loc"]
            return f"unknown field{_guess(str(name), _field_names(model, around))}"
        case "literal_error":
            return f"must be {context['expected'].replace(chr(39), chr(34))}, not {_show(given)}"
        case "value_error":
            text = str(context["error"])
            return f"{text}, not {_show(given)}" if text.startswith("must be ") else text
        case "string_type":
            quotes = ": put it in quotes" if isinstance(given, bool | int | float) else ""
            return f"must be text, not {_show(given)}{quotes}"
        case "int_type" | "int_from_float":
            return f"must be a whole number, not {_show(given)}"
        case "float_type" | "finite_number":
            return f"must be a number, not {_show(given)}"
        case "bool_type":
            return f"must be true or false, not {_show(given)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"must be a mapping, not {_show(given)}"
        case "tuple_type" | "list_type":
            return f"must be a list, not {_show(given)}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:.12g}, not {_show(given)}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']:.12g}, not {_show(given)}"
        case "too_long":
            return f"must have at most {context['max_length']} entries, not {context['actual_length']}"
        case "too_short":
            return f"must have at least {context['min_length']} entry"
        case "string_too_long":
            return f"must be at most {context['max_length']} characters long"
        case "string_too_short":
            return "must not be empty"
        case _:
            return error["msg"]


def _show(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 and value.isprintable() else f"{value[:60]!r}..."
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a huge number" if abs(value) >= 1e20 else str(value)
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else "that"


def _guess(name: str, known: Iterable[str]) -> str:
    spelling = {text.lower(): text for text in known}
    close = difflib.get_close_matches(name.lower()[:64], spelling, n=1, cutoff=0.7)
    return f'; did you mean "{spelling[close[0]]}"?' if close else ""


def _field_names(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """The fields of the model that `path` leads to."""
    here: Any = model
    for part in path:
        if isinstance(part, str) and isinstance(here, type) and issubclass(here, BaseModel):
            here = next((f.annotation for f in here.model_fields.values() if f.alias == part), None)
        here = _inner(here)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return [field.alias or name for name, field in here.model_fields.items()]
    return []


def _inner(annotation: Any) -> Any:
    """The model inside of optional, Annotated, tuple and dict types."""
    while not isinstance(annotation, type) or typing.get_args(annotation):
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if not arguments:
            return None
        if origin in (typing.Union, types.UnionType):
            annotation = next((a for a in arguments if a is not type(None)), None)
        else:
            annotation = arguments[1] if origin is dict else arguments[0]
    return annotation
