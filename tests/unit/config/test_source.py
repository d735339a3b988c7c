from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netproxy.config import source
from netproxy.config.source import fingerprint, parse, read
from netproxy.errors import ConfigError

ROUTE = b"""\
# a comment
kind: HTTPRoute
spec:
  rules:
  - backendRefs:
    - name: a
      weight: 1
    - {name: b,
       weight: -1}
"""


def values(data: bytes) -> list[object]:
    documents, errors = parse(data, "f.yaml")
    assert errors == []
    return [document.value for document in documents]


def failures(data: bytes) -> list[str]:
    return [str(error) for error in parse(data, "f.yaml")[1]]


def test_fields_have_their_lines() -> None:
    (document,), errors = parse(ROUTE, "f.yaml")
    assert errors == []
    places = {
        (): 2,
        ("spec",): 3,
        ("spec", "rules", 0): 5,
        ("spec", "rules", 0, "backendRefs"): 5,
        ("spec", "rules", 0, "backendRefs", 0): 6,
        ("spec", "rules", 0, "backendRefs", 0, "weight"): 7,
        ("spec", "rules", 0, "backendRefs", 1, "weight"): 9,
        ("spec", "rules", 0, "backendRefs", 1, "absent"): 8,
        ("spec", "rules", 7, "x"): 4,
        ("absent",): 2,
    }
    assert {path: document.line_of(path) for path in places} == places


def test_values_are_those_of_kubernetes() -> None:
    text = b"""\
    int: 80
    octal: 0644
    text: "80"
    clock: 12:30
    day: 2025-01-31
    when: 2025-01-31T12:00:00Z
    yes: no
    8080: port
    none: ~
    float: 1.5
    tagged: !!str 5
    equals: =
    """
    assert values(text) == [
        {
            "int": 80,
            "octal": 0o644,
            "text": "80",
            "clock": "12:30",
            "day": "2025-01-31",
            "when": "2025-01-31T12:00:00Z",
            "yes": False,
            "8080": "port",
            "none": None,
            "float": 1.5,
            "tagged": "5",
            "equals": "=",
        }
    ]


def test_several_documents_and_empty_ones() -> None:
    assert values(b"---\n---\n# nothing\n---\na: 1\n---\n~\n---\nb: 2\n...\n") == [{"a": 1}, {"b": 2}]
    assert values(b"") == values(b"# only\n") == []
    assert values(b"\xef\xbb\xbfa: 1") == [{"a": 1}]


def test_json_is_yaml() -> None:
    value = {"kind": "Service", "spec": {"ports": [{"port": 80}], "text": 'a "quoted" \t text/é'}}
    assert values(json.dumps(value, indent=2).encode()) == [value]


def test_list_is_unpacked_and_its_items_keep_their_lines() -> None:
    documents, errors = parse(b"kind: List\nitems:\n- a: 1\n- kind: List\n  items:\n  - b: 2\n- 7\n", "f")
    assert [d.value for d in documents] == [{"a": 1}, {"b": 2}]
    assert [d.line_of(()) for d in documents] == [3, 6]
    assert [e.line for e in errors] == [7]
    assert failures(b"kind: List\nitems: 3") == ["f.yaml:1: List: items: must be a list"]


def test_anchors_and_merges() -> None:
    (document,), errors = parse(b"base: &b\n  x: 1\n  y: 1\nuse:\n  <<: *b\n  y: 2\nsame: *b\n", "f")
    assert errors == []
    assert document.value == {"base": {"x": 1, "y": 1}, "use": {"x": 1, "y": 2}, "same": {"x": 1, "y": 1}}
    assert document.line_of(("use", "x")) == 2
    assert document.line_of(("use", "y")) == 6


def test_a_key_given_twice_is_a_problem_of_its_document() -> None:
    documents, errors = parse(b"a: 1\nb:\n  c: 1\n  c: 2\n", "f")
    assert errors == []
    assert [(p.path, p.line, p.message) for p in documents[0].problems] == [(("b", "c"), 4, "is given twice")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a: [1\nb: 2\n", "f.yaml:2: is not YAML: did not find expected ',' or ']' (while parsing a flow sequence)"),
        (b"ok: 1\n---\na: *nowhere\n", "f.yaml:3: is not YAML: found undefined alias"),
        (b"a: 1\nb: \x01\n", "f.yaml:2: is not YAML: control characters are not allowed"),
        (b"a: 1\nb: \xff\n", "f.yaml:2: is not UTF-8"),
        ("a: ä".encode("utf-16"), "f.yaml:1: is not UTF-8"),
        (b"- 1\n", "f.yaml:1: must be an object: a mapping with apiVersion, kind and metadata"),
        (b"a: 1\n---\ntext\n", "f.yaml:3: must be an object: a mapping with apiVersion, kind and metadata"),
    ],
)
def test_what_is_not_a_document(data: bytes, expected: str) -> None:
    assert failures(data) == [expected]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: !!binary aGk=", "has a tag that is not supported: tag:yaml.org,2002:binary"),
        (b"a: !mine {}", "has a tag that is not supported: !mine"),
        (b"a: !mine []", "has a tag that is not supported: !mine"),
        (b"a: !!int x", "is not a valid int"),
        (b"? [1]\n: 2", "a key must be text"),
        (b"<<: 5", '"<<" must merge a mapping'),
    ],
)
def test_odd_yaml(data: bytes, message: str) -> None:
    documents, errors = parse(data, "f")
    assert errors == []
    assert [p.message for p in documents[0].problems] == [message]


def test_deep_nesting_is_refused_before_it_overflows_the_stack() -> None:
    many = 200_000
    for data in (b"a: " + b"[" * many, b"{a: " * many, b"- " * many + b"1", b"a: " + b"[" * 150 + b"]" * 150):
        assert failures(data) == ["f.yaml:1: is nested more than 100 deep"]
    assert failures(b"x: 1\n" + b"---a [\n" * 3000)[0].startswith("f.yaml:")


def test_a_document_start_ends_all_nesting() -> None:
    flow = b"---\na: [[[]]]\n" * 1500
    assert len(values(flow)) == 1500


def test_aliases_that_explode_are_refused() -> None:
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)]
    (failure,) = failures(b"\n".join(lines))
    assert "aliases expand to more than 100000 values" in failure
    assert "nested more than" in failures(b"a: &a {b: *a}")[0]
    assert "nested more than" in failures(b"&a {<<: *a, b: 1}")[0]
    assert len(failures(b"kind: List\nitems: &a [{x: *a}, {y: *a}]")) == 2


def test_a_folder_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.yaml", "a/z.yml", "a.yaml", "a/b/c.yaml", "notes.txt", ".hidden.yaml", "..data/x.yaml"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"name: {name}\n")
    (tmp_path / "linked.yaml").symlink_to("..data/x.yaml")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = read(tmp_path)
    assert found.errors == ()
    assert [d.value["name"] for d in found.documents] == ["a/b/c.yaml", "a/z.yml", "a.yaml", "b.yaml", "..data/x.yaml"]
    assert found.documents[2].file == str(tmp_path / "a.yaml")


def test_one_file_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "mesh.json").write_text('{"a": 1}')
    assert [d.value for d in read(tmp_path / "mesh.json").documents] == [{"a": 1}]


def test_a_bad_file_never_blocks_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_FILE_BYTES", 1024 * 1024)
    (tmp_path / "a.yaml").write_text("a: [")
    os.mkfifo(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").symlink_to("nowhere")
    with open(tmp_path / "d.yaml", "wb") as stream:
        stream.truncate(1024 * 1024 + 1)
    (tmp_path / "e.yaml").write_text("ok: 1")
    found = read(tmp_path)
    assert [d.value for d in found.documents] == [{"ok": 1}]
    assert [str(e).removeprefix(f"{tmp_path}/").split(" (")[0] for e in found.errors] == [
        "a.yaml:1: is not YAML: did not find expected node content",
        "b.yaml: is not a regular file",
        "c.yaml: can't be read: No such file or directory",
        "d.yaml: is larger than 1 MiB",
    ]


def test_a_folder_that_cant_be_read_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="absent: can't be read: No such file"):
        read(tmp_path / "absent")
    (tmp_path / "sub").mkdir()
    scan = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ConfigError, match="sub: can't be read: Permission denied"):
        read(tmp_path)


def test_bounds_on_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"{number}.yaml").touch()
    monkeypatch.setattr(source, "MAX_FILES", 2)
    with pytest.raises(ConfigError, match="more than 2 files"):
        fingerprint(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(source, "MAX_FOLDER_DEPTH", 1)
    monkeypatch.setattr(source, "MAX_FILES", 9)
    with pytest.raises(ConfigError, match="more than 1 deep"):
        fingerprint(tmp_path)


def test_the_fingerprint_tells_every_change(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1")
    seen = {fingerprint(tmp_path)}
    assert fingerprint(tmp_path) in seen
    assert read(tmp_path).fingerprint in seen

    def changed() -> bool:
        now = fingerprint(tmp_path)
        is_new = now not in seen
        seen.add(now)
        return is_new

    file.write_text("a: 12")
    assert changed()
    os.utime(file, ns=(5, 5))
    assert changed()
    (tmp_path / "new").write_text("a: 12")
    os.utime(tmp_path / "new", ns=(5, 5))
    assert not changed()
    os.rename(tmp_path / "new", file)
    assert changed()
    (tmp_path / "b.yml").touch()
    assert changed()
    file.unlink()
    assert changed()


PIECES = [
    b"a",
    b": ",
    b"\n",
    b"  ",
    b"- ",
    b"[",
    b"]",
    b"{",
    b"}",
    b"&x ",
    b"*x",
    b"<<",
    b'"',
    b"'",
    b"|",
    b"? ",
    b", ",
    b"!!int ",
]
PIECES += [b"---\n", b"kind: List\nitems: ", b"\t", b"#", b"%", b"\xff", b"\x00", b"0x1", b"~", b"!x ", b"\r\n", b"="]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join))
@example(b"&x [*x]")
@example(b"? *x\n")
@example(b"? <<")
@example(b"kind: List\nitems: &x [{<<: *x}]")
def test_any_bytes_give_documents_or_errors_with_places(data: bytes) -> None:
    documents, errors = parse(data, "f")
    lines = len(data.splitlines())
    for document in documents:
        assert 1 <= document.line_of(()) <= lines
        assert all(1 <= problem.line <= lines for problem in document.problems)
        for key in document.value:
            assert 1 <= document.line_of((key, 0, "x")) <= lines
    assert all(1 <= error.line <= lines for error in errors)
