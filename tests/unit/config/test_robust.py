"""Whatever is written: one bad object never blocks another, and every error has a place."""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from netproxy.config import source
from netproxy.config.fields import FieldPath
from netproxy.config.model import Document
from netproxy.config.reference import EXAMPLES
from netproxy.config.snapshot import Context, Snapshot, build_snapshot
from netproxy.config.validate import KINDS, validate

GOOD = """
apiVersion: v1
kind: Service
metadata: {name: good, namespace: apart}
spec: {selector: {app: good}, ports: [{port: 80}]}
---
apiVersion: netproxy.mesh/v1alpha1
kind: Workload
metadata: {name: good, namespace: apart, labels: {app: good}}
spec: {addresses: [10.99.0.1], attach: {netns: /run/netns/apart}}
---
apiVersion: netproxy.mesh/v1alpha1
kind: ExternalService
metadata: {name: good, namespace: apart}
spec: {hosts: [apart.example], ports: [{port: 1, protocol: TCP}]}
"""


def documents(text: str) -> list[Document]:
    found, errors = source.parse(text.encode(), "mesh.yaml")
    assert errors == []
    return found


def build(*found: Document) -> Snapshot:
    valid = validate(found)
    return build_snapshot(valid.objects, Context("node-a"), valid.errors)


VALUES: dict[str, Any] = {kind: yaml.safe_load(text) for kind, text in EXAMPLES.items()}
APART = {key: shard for key, shard in build(*documents(GOOD)).shards.items() if "apart" in key}


def paths(value: Any, path: FieldPath = ()) -> Iterator[FieldPath]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def replaced(value: Any, path: FieldPath, new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


PLACES = [(kind, path) for kind, value in VALUES.items() for path in paths(value) if path]
JUNK = st.sampled_from([0, -1, 10**30, 1.5, True, "", "x", "\0", "240.240.0.1", [], ["x"], [None], {}, {"x": 1}, [{}]])


@given(st.lists(st.tuples(st.sampled_from(PLACES), JUNK), min_size=1, max_size=4))
def test_junk_anywhere_is_told_with_its_place_and_harms_nobody_else(changes: list[tuple[Any, Any]]) -> None:
    values = dict(VALUES)
    for (kind, path), junk in changes:
        try:
            values[kind] = replaced(values[kind], path, junk)
        except (KeyError, IndexError, TypeError):
            pass  # what was there is replaced already
    text = "---\n".join(yaml.safe_dump(value) for value in values.values()) + "---" + GOOD
    snapshot = build(*documents(text))
    lines = text.splitlines()
    for error in snapshot.rejected:
        assert error.file == "mesh.yaml"
        assert 1 <= error.line <= len(lines)
        assert error.field
        assert error.obj
        assert error.message
        assert snapshot.statuses[error.obj].conditions[0].status == "False"
    if not any("MeshConfig" in kind for (kind, _), _ in changes):
        # A trust domain, say, is everybody's.
        assert {key: shard for key, shard in snapshot.shards.items() if "apart" in key} == APART


@pytest.mark.parametrize(("kind", "path"), PLACES)
def test_the_line_is_that_of_the_field(kind: str, path: FieldPath) -> None:
    text = yaml.safe_dump(replaced(VALUES[kind], path, _Strange()), default_flow_style=False, sort_keys=False)
    (line,) = (number for number, content in enumerate(text.splitlines(), 1) if "strange" in content)
    for error in build(*documents(text)).rejected:
        assert error.line == line or error.field in ("kind", "apiVersion")  # a broken kind hides the rest
        assert error.field
    assert build(*documents(text)).rejected


class _Strange(dict[str, str]):
    """No field of any object is such a mapping, and it shows in the text."""

    def __init__(self) -> None:
        super().__init__({"strange": "-"})


yaml.SafeDumper.add_representer(
    _Strange, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, True)
)


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models(inner)


def with_nulls(value: Any, model: type[BaseModel]) -> Any:
    """Null for every field that is not given."""
    if not isinstance(value, dict):
        return value
    found = {info.alias: None for info in model.model_fields.values()} | value
    hints = typing.get_type_hints(model, include_extras=True)
    for name, info in model.model_fields.items():
        inner = next(models(hints[name]), None)
        given_value = found[info.alias]
        if inner is None or given_value is None:
            continue
        fill = functools.partial(with_nulls, model=inner)
        if isinstance(given_value, list):
            found[info.alias] = [fill(item) for item in given_value]
        elif typing.get_origin(hints[name]) is dict:
            found[info.alias] = {key: fill(item) for key, item in given_value.items()}
        else:
            found[info.alias] = fill(given_value)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_the_same_as_leaving_out(kind: str) -> None:
    filled = with_nulls(VALUES[kind], KINDS[kind][1])
    assert len(str(filled)) > len(str(VALUES[kind])) + 100
    (plain,) = validate([Document("f", VALUES[kind], lambda path: 1)]).objects
    found = validate([Document("f", filled, lambda path: 1)])
    assert [str(error) for error in found.errors] == []
    assert found.objects[0].resource == plain.resource


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_an_error_wherever_it_stands(kind: str) -> None:
    places = [path for path in paths(VALUES[kind]) if isinstance(_at(VALUES[kind], path), dict)]
    free = ("labels", "matchLabels", "annotations")
    for path in places:
        if path and path[-1] in free:
            continue
        value = replaced(VALUES[kind], path, {**_at(VALUES[kind], path), "surprise": 1})
        found = validate([Document("f", value, lambda path: 1)])
        assert found.objects == ()
        assert any("surprise" in error.field for error in found.errors)


def _at(value: Any, path: FieldPath) -> Any:
    for part in path:
        value = value[part]
    return value
