"""docs/resources.md is what the models say, and its examples work."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from netproxy.config import reference, source
from netproxy.config.fields import Duration, Model, NotYet
from netproxy.config.snapshot import Context, build_snapshot
from netproxy.config.validate import KINDS, validate

FILE = Path(__file__).parents[3] / "docs" / "resources.md"


def test_the_file_is_what_the_models_say() -> None:
    assert FILE.read_text() == reference.reference(), "run make docs"


def test_every_kind_has_an_example_that_works() -> None:
    assert set(reference.EXAMPLES) == set(KINDS)
    text = "---".join(reference.EXAMPLES[kind] for kind in KINDS)
    # What the routes refer to.
    for name, port in (("db", 3306), ("db-new", 3306), ("reviews-v1", 80), ("reviews-v2", 80)):
        text += f"""---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec: {{ports: [{{port: {port}}}]}}
"""
    documents, errors = source.parse(text.encode(), "examples.yaml")
    assert errors == []
    valid = validate(documents)
    snapshot = build_snapshot(valid.objects, Context("node-a"), valid.errors)
    assert [str(error) for error in snapshot.rejected] == []
    for kind in KINDS:
        (obj,) = (o for o in valid.objects if o.resource.kind == kind and o.document.value in _examples())
        assert [(c.type, c.status) for c in snapshot.statuses[obj.title].conditions if c.status != "True"] == []
        assert snapshot.statuses[obj.title].get("Warning") is None


def _examples() -> list[object]:
    return [source.parse(text.encode(), "x")[0][0].value for text in reference.EXAMPLES.values()]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.5, "500ms"), (3600, "1h"), (5400, "1h30m"), (3661.001, "1h1m1s1ms")]
)
def test_durations_as_they_are_written(seconds: float, text: str) -> None:
    assert reference.duration_text(seconds) == text


class Silent(Model):
    port: int


class Strange(Model):
    what: bytes
    """A type that no words exist for."""


class Fine(Model):
    mode: Literal["a", "b"]
    """Which |
    one."""
    longest_wait: Duration = 90.0
    """How long."""
    later: NotYet = None


def test_a_field_needs_a_sentence_and_words_for_its_type() -> None:
    with pytest.raises(TypeError, match=r"Silent\.port needs a sentence"):
        list(reference._rows(Silent, "spec", [], []))
    with pytest.raises(TypeError, match="no words for the type"):
        list(reference._rows(Strange, "spec", [], []))
    refused: list[str] = []
    assert list(reference._rows(Fine, "spec", [], refused)) == [
        r"| `spec.mode` | `a` \| `b` | required | Which \| one. |",
        "| `spec.longestWait` | duration | `1m30s` | How long. |",
    ]
    assert refused == ["spec.later"]
