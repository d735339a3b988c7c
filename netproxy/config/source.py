"""Files to documents: one YAML file, or a folder of them.

A folder is read with its subfolders, ``*.yaml`` and ``*.yml`` in the order of their paths; what begins with a dot is
skipped (editors' files, and the versions behind Kubernetes volumes, whose visible names are links to them). A file may
hold several documents, and ``kind: List`` is unpacked. JSON is YAML.

What is wrong with one file is an error of that file and the others go on. Only when the folder itself can't be
read does `read` raise: the caller then keeps what it has, since "no file" and "no permission" must not look alike.

Values are what Kubernetes makes of them: timestamps and ``12:30`` stay text, keys are always text.

Files are not trusted to be small or sane. Bounded are their size, their number, nesting, and what aliases expand to.
Nesting is checked on the event stream first where it may be deep, because libyaml's composer recurses on the C stack
(measured: 200,000 brackets end the process). `yaml.compose_all` gives nodes with places: the line of a field is looked
up when an error needs it.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
import yaml.constructor
import yaml.resolver

from ..errors import ConfigError
from .fields import FieldPath
from .model import Document, Problem

MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_FILES = 10_000
MAX_FOLDER_DEPTH = 32
MAX_NESTING = 100
MAX_ALIASED_NODES = 100_000
_MAYBE_DEEP = 2000  # brackets, or columns; 20,000 levels still fit the 8 MiB stack
_DOCUMENT_START = re.compile(rb"\n---(?=\s)")  # ends every nesting, in whatever context

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Path, mtime in ns, size and inode of every file: differs when something was written, added or removed."""

_TAG = "tag:yaml.org,2002:"
_STR = _TAG + "str"
_scalars = yaml.constructor.SafeConstructor()
_resolve = yaml.resolver.Resolver().resolve


@functools.lru_cache(maxsize=16_384)
def _plain_tag(text: str) -> str:
    return str(_resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]


class _Loader(yaml.CSafeLoader):
    """Remembers what plain scalars are: PyYAML's regular expressions were half of the time of reading."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool] | bool) -> str:
        if kind is yaml.ScalarNode and value is not None:
            if not isinstance(implicit, tuple) or not implicit[0] or len(value) > 100:
                return _STR
            return _plain_tag(value)
        return _TAG + ("seq" if kind is yaml.SequenceNode else "map")


@dataclass(frozen=True, slots=True)
class Read:
    """What the files hold. `fingerprint` was taken before they were read: a later change shows."""

    documents: tuple[Document, ...]
    errors: tuple[ConfigError, ...]
    fingerprint: Fingerprint


def read(path: str | os.PathLike[str]) -> Read:
    """Raises ConfigError when `path` itself or a folder below it can't be read."""
    before = fingerprint(path)
    documents: list[Document] = []
    errors: list[ConfigError] = []
    for file, *_ in before:
        try:
            data = _read_file(file)
        except OSError as exc:
            errors.append(ConfigError(f"can't be read: {exc.strerror}", file=file))
        except ConfigError as exc:
            errors.append(exc)
        else:
            found, wrong = parse(data, file)
            documents += found
            errors += wrong
    return Read(tuple(documents), tuple(errors), before)


def fingerprint(path: str | os.PathLike[str]) -> Fingerprint:
    """Cheap: stat only, for polling. Raises ConfigError as `read` does."""
    top = os.fspath(path)
    found: list[tuple[str, int, int, int]] = []
    try:
        info = os.stat(top)
        if stat.S_ISDIR(info.st_mode):
            _scan(top, found, {(info.st_dev, info.st_ino)}, 0)
        else:
            found.append((top, info.st_mtime_ns, info.st_size, info.st_ino))
    except OSError as exc:
        raise ConfigError(f"can't be read: {exc.strerror}", file=exc.filename or top) from exc
    found.sort(key=lambda entry: entry[0].split(os.sep))
    return tuple(found)


def _scan(folder: str, found: list[tuple[str, int, int, int]], seen: set[tuple[int, int]], depth: int) -> None:
    """`seen` are the folders visited: a link that leads back is not followed again."""
    if depth > MAX_FOLDER_DEPTH:
        raise ConfigError(f"folders are nested more than {MAX_FOLDER_DEPTH} deep", file=folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            is_yaml = entry.name.endswith((".yaml", ".yml"))
            try:
                info = entry.stat()
            except FileNotFoundError:  # removed just now, or a link to nowhere: reading the file says so
                if is_yaml:
                    found.append((entry.path, 0, 0, 0))
                continue
            if stat.S_ISDIR(info.st_mode):
                # DirEntry's own numbers are those of a link, not of what it leads to.
                if (info.st_dev, info.st_ino) not in seen:
                    seen.add((info.st_dev, info.st_ino))
                    _scan(entry.path, found, seen, depth + 1)
            elif is_yaml:
                found.append((entry.path, info.st_mtime_ns, info.st_size, info.st_ino))
                if len(found) > MAX_FILES:
                    raise ConfigError(f"more than {MAX_FILES} files", file=folder)


def _read_file(file: str) -> bytes:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError("is not a regular file", file=file)
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"is larger than {MAX_FILE_BYTES // (1024 * 1024)} MiB", file=file)
    return data


def parse(data: bytes, file: str) -> tuple[list[Document], list[ConfigError]]:
    """The documents of one file. A syntax error anywhere gives no document and that one error."""
    errors: list[ConfigError] = []
    documents: list[Document] = []
    try:
        data.decode()
        data = data.removeprefix(b"\xef\xbb\xbf")
        _check_nesting(data, file)
        roots = list(yaml.compose_all(data, Loader=_Loader))
    except UnicodeDecodeError as exc:
        return [], [ConfigError("is not UTF-8", file=file, line=data.count(b"\n", 0, exc.start) + 1)]
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        text = f"is not YAML: {exc.problem or exc.context}" + (
            f" ({exc.context})" if exc.problem and exc.context else ""
        )
        # What is missing at the end of the file is reported on the line after it.
        line = min(mark.line + 1, len(data.splitlines())) if mark else 0
        return [], [ConfigError(text, file=file, line=line)]
    except yaml.reader.ReaderError as exc:
        line = data.count(b"\n", 0, exc.position) + 1
        return [], [ConfigError(f"is not YAML: {exc.reason}", file=file, line=line)]
    except ConfigError as exc:
        return [], [exc]
    build = _Builder(file)
    for root in roots:
        for node in _unpack(root, file, errors, 0):
            try:
                documents.append(build.document(node))
            except ConfigError as exc:
                errors.append(exc)
    return documents, errors


def _check_nesting(data: bytes, file: str) -> None:
    """A level needs a bracket or a column: documents with few brackets and short lines can't be deep."""
    most = max(part.count(b"[") + part.count(b"{") for part in _DOCUMENT_START.split(data))
    if most < _MAYBE_DEEP and max(map(len, data.splitlines()), default=0) < _MAYBE_DEEP:
        return
    depth = 0
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_NESTING:
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise ConfigError(f"is nested more than {MAX_NESTING} deep", file=file, line=line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _unpack(node: yaml.Node, file: str, errors: list[ConfigError], depth: int) -> Iterator[yaml.MappingNode]:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null":
        return
    if not isinstance(node, yaml.MappingNode):
        errors.append(
            ConfigError("must be an object: a mapping with apiVersion, kind and metadata", file=file, line=line)
        )
        return
    kind, items = _get(node, "kind"), _get(node, "items")
    if kind is None or kind[1].value != "List" or items is None:
        yield node
    elif not isinstance(items[1], yaml.SequenceNode):
        errors.append(ConfigError("must be a list", file=file, line=line, obj="List", field="items"))
    elif depth >= 4:
        errors.append(ConfigError("a List in a List in a List ...", file=file, line=line, obj="List"))
    else:
        for item in items[1].value:
            yield from _unpack(item, file, errors, depth + 1)


def _get(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value. What ``<<`` merges counts, after the mapping's own keys."""
    waiting: list[yaml.Node] = [node]
    visited: set[int] = set()  # a mapping may merge itself
    while waiting:
        here = waiting.pop(0)
        if not isinstance(here, yaml.MappingNode) or id(here) in visited:
            continue
        visited.add(id(here))
        for key, value in here.value:
            if key.value == name:
                return key, value
            if key.tag == _TAG + "merge":
                waiting += value.value if isinstance(value, yaml.SequenceNode) else [value]
    return None


def _line_of(root: yaml.MappingNode, path: FieldPath) -> int:
    node: yaml.Node = root
    line = root.start_mark.line
    for part in path:
        if isinstance(node, yaml.MappingNode) and isinstance(part, str):
            found = _get(node, part)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


@dataclass(slots=True)
class _Builder:
    """The nodes of one file to plain values. A collection met again was reached through an alias, and counts."""

    file: str
    aliased: int = 0
    seen: set[int] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def document(self, node: yaml.MappingNode) -> Document:
        self.problems = []
        value = self.mapping(node, ())
        return Document(self.file, value, functools.partial(_line_of, node), tuple(self.problems))

    def value(self, node: yaml.Node, path: FieldPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.tag == _STR else self.scalar(node, path)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        self.enter(node, path)
        if node.tag != _TAG + "seq":
            self.wrong(node, path, f"has a tag that is not supported: {node.tag}")
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def enter(self, node: yaml.Node, path: FieldPath) -> None:
        if len(path) > MAX_NESTING:
            self.fatal(node, f"is nested more than {MAX_NESTING} deep")
        if id(node) in self.seen:
            self.aliased += 1 + len(node.value)
            if self.aliased > MAX_ALIASED_NODES:
                self.fatal(node, f"aliases expand to more than {MAX_ALIASED_NODES} values")
        else:
            self.seen.add(id(node))

    def mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        self.enter(node, path)
        if node.tag != _TAG + "map":
            self.wrong(node, path, f"has a tag that is not supported: {node.tag}")
        result: dict[str, Any] = {}
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(key, path, "a key must be text")
            elif key.tag == _TAG + "merge":
                merged += [(key, other) for other in (item.value if isinstance(item, yaml.SequenceNode) else [item])]
            elif key.value in result:
                self.wrong(key, (*path, key.value), "is given twice")
            else:
                result[key.value] = self.value(item, (*path, key.value))
        for key, other in merged:
            if isinstance(other, yaml.MappingNode):
                # One level deeper, so that a mapping that merges itself comes to an end.
                for name, item in self.mapping(other, (*path, "<<")).items():
                    result.setdefault(name, item)
            else:
                # At the key: where the value is left out, its place is behind the end of the file.
                self.wrong(key, path, '"<<" must merge a mapping')
        return result

    def scalar(self, node: yaml.ScalarNode, path: FieldPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        text = node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return _scalars.construct_yaml_bool(node)
            if kind in ("timestamp", "value", "merge"):
                return text
            if kind in ("int", "float"):
                if ":" in text:  # YAML 1.1 reads 12:30 as 750; Kubernetes does not
                    return text
                return _scalars.construct_yaml_int(node) if kind == "int" else _scalars.construct_yaml_float(node)
        except (ValueError, KeyError):
            self.wrong(node, path, f"is not a valid {kind}")
            return None
        self.wrong(node, path, f"has a tag that is not supported: {node.tag}")
        return None

    def wrong(self, node: yaml.Node, path: FieldPath, message: str) -> None:
        if len(self.problems) < 100:
            self.problems.append(Problem(path, node.start_mark.line + 1, message))

    def fatal(self, node: yaml.Node, message: str) -> None:
        raise ConfigError(message, file=self.file, line=node.start_mark.line + 1)
