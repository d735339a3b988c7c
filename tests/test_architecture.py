"""Who may import whom, and what the modules without effects may touch. The tables at the top are the rules.

The checks read sources and never import them. Each one is also shown a source that breaks its rule.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("netproxy", "redirect", "examples", "bench", "tests")

# --- the rules

ROOTS = {"supervisor", "brain", "worker", "control"}
"""Composition roots, one per process: the only ones that may know every folder."""

PLAIN = {"addr", "errors", "log", "settings"}
"""What has no layer of its own."""

ALLOWED: dict[str, set[str]] = {
    # A unit is a folder or a module directly in netproxy/. It may import itself and what stands here: a whole unit
    # ("codec"), or one module of it ("config.shard"). First the path of a request, then that of a change.
    "accept": PLAIN | {"config.shard", "stream", "tcp"},
    "identity": PLAIN | {"config.shard", "delivery", "stream", "tcp"},
    "codec": {"errors"},
    "decide": PLAIN | {"codec.events", "config.shard", "pattern"},
    "upstream": PLAIN | {"config.shard", "identity", "stream", "tcp"},
    "relay": PLAIN
    | {"accept", "arena", "codec", "config.shard", "decide", "identity", "observe", "stream", "tcp", "upstream"},
    "config": {"addr", "errors", "pattern"},
    "observe": PLAIN | {"arena", "config.shard"},
    "cli": PLAIN
    | ROOTS
    | {
        "arena",
        "channel",
        "codec",
        "compiled",
        "config",
        "decide",
        "dns",
        "dump",
        "identity",
        "journal",
        "logfile",
        "observe",
        "stream",
        "tcp",
    },
    "dns": PLAIN | {"config.shard", "observe.record"},
    # Modules.
    "__init__": set(),
    "__main__": {"cli"},
    "addr": set(),
    "admin": PLAIN | {"arena", "observe"},
    "arena": {"errors", "settings"},
    "certificates": PLAIN | {"config.shard", "identity", "state"},
    "attachments": {"channel", "holder"},
    "channel": {"errors", "settings"},
    "child": {"channel", "log", "settings"},
    "compiled": set(),
    "delivery": {"stream"},
    "dump": {"config", "errors"},
    "errors": set(),
    "holder": set(),
    "hosts": PLAIN | {"config.snapshot"},
    "journal": {"errors"},
    "log": set(),
    "logfile": set(),
    "pattern": set(),
    "pods": PLAIN | {"config.balanced", "config.snapshot", "hosts", "journal", "steering"},
    "resolvers": PLAIN | {"config.snapshot"},
    "settings": set(),
    "state": {"addr", "log"},
    "steering": PLAIN | {"config.balanced", "config.snapshot"},
    "stream": set(),
    "tcp": {"addr", "delivery", "errors", "stream"},
}

REDIRECT_USERS = ("netproxy.pods", "netproxy.hosts", "netproxy.steering", "netproxy.cli")
"""Modules and packages of netproxy that may steer."""

SUPERVISOR_LOADS = {
    f"netproxy.{name}" for name in ("supervisor", "attachments", "channel", "holder", "log", "logfile", "settings")
} | {"netproxy"}
"""All of the project that the supervisor may load; apart from it, the standard library only."""

PURE = (
    "netproxy/accept/sniff.py",
    "netproxy/addr.py",
    "netproxy/codec/*.py",
    "netproxy/config/balanced.py",
    "netproxy/config/external.py",
    "netproxy/config/fields.py",
    "netproxy/config/kubernetes.py",
    "netproxy/config/mesh.py",
    "netproxy/config/model.py",
    "netproxy/config/routes.py",
    "netproxy/config/shard.py",
    "netproxy/config/snapshot.py",
    "netproxy/config/status.py",
    "netproxy/config/validate.py",
    "netproxy/config/vip.py",
    "netproxy/decide/*.py",
    "netproxy/dns/names.py",
    "netproxy/errors.py",
    "netproxy/pattern.py",
    "netproxy/relay/exchange.py",
    "netproxy/relay/grpc.py",
    "netproxy/relay/ids.py",
    "netproxy/relay/trace.py",
    "netproxy/stream.py",
    "netproxy/upstream/health.py",
    "netproxy/upstream/pool.py",
    "netproxy/upstream/shared.py",
    "redirect/entries.py",
    "redirect/errors.py",
    "redirect/netfilter/iptables.py",
    "redirect/netfilter/nft.py",
    "redirect/netfilter/rules.py",
    "redirect/plan.py",
    "redirect/wanted.py",
)
"""No effects: no socket, loop, clock, thread, file, log or randomness. `now` and `rng` are arguments."""

# fmt: off
PURE_STDLIB = {
    "__future__", "abc", "array", "base64", "binascii", "bisect", "collections", "contextlib", "copy", "dataclasses",
    "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq", "http.HTTPStatus",
    "ipaddress", "itertools", "json", "math", "operator", "posixpath.isabs", "posixpath.normpath", "re", "string",
    "struct", "textwrap", "types", "typing", "unicodedata", "urllib.parse", "weakref", "zlib",
}
# fmt: on
"""An allow list: what is new here has to be looked at. Under TYPE_CHECKING anything goes (``random.Random``)."""

PURE_THIRD_PARTY = {
    "netproxy.codec": {"h11", "h2", "hpack", "hyperframe"},
    "netproxy.config": {"pydantic", "pydantic_core"},
    "netproxy.pattern": {"re2"},
}

PURE_NO_NAMES = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}
PURE_NO_CLOCK = {"now", "utcnow", "today"}
"""Of ``datetime`` and ``date``."""

BAD_NAMES = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}

# --- reading sources


@dataclass(frozen=True)
class Import:
    target: str
    """The module, or for ``from module import name`` that module and the name: ``module.name``."""
    line: int
    typing_only: bool


@dataclass(frozen=True)
class Module:
    path: str
    """From the root of the project, with slashes."""
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")

    @cached_property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def unit(self) -> str:
        """Folder or module directly in netproxy."""
        return self.name.split(".")[1] if "." in self.name else "__init__"

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._walk(self.tree, typing_only=False))

    def _walk(self, node: ast.AST, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = self._base(node)
            for alias in node.names:
                yield Import(base if alias.name == "*" else f"{base}.{alias.name}", node.lineno, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for child in node.body:
                yield from self._walk(child, typing_only=True)
            for child in node.orelse:
                yield from self._walk(child, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from self._walk(child, typing_only)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, node.module] if node.module else package)


class Project:
    """Modules by name."""

    def __init__(self, files: Mapping[str, str]) -> None:
        modules = (Module(path, source) for path, source in sorted(files.items()))
        self.modules = {module.name: module for module in modules}

    def in_package(self, package: str) -> Iterator[Module]:
        return (module for module in self.modules.values() if is_in(module.name, package))

    def loaded(self, target: str) -> str:
        """The module that an import of `target` loads: ``netproxy.addr.ClientAddr`` -> ``netproxy.addr``."""
        name = target
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name or target


def read_project() -> Project:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return Project({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths})


def is_in(name: str, prefix: str) -> bool:
    """Is `name` the same as `prefix`, or inside it?"""
    return name == prefix or name.startswith(prefix + ".")


def is_pure(path: str) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in PURE)


def top(target: str) -> str:
    return target.partition(".")[0]


# --- the checks: each gives one line per violation


def check_redirect(project: Project) -> Iterator[str]:
    for module in project.in_package("redirect"):
        for imported in module.imports:
            if top(imported.target) == "netproxy":
                yield f"{module.path}:{imported.line}: redirect knows nothing of netproxy"
    for module in project.in_package("netproxy"):
        for imported in module.imports:
            if top(imported.target) == "redirect" and not any(is_in(module.name, user) for user in REDIRECT_USERS):
                yield f"{module.path}:{imported.line}: only {' and '.join(REDIRECT_USERS)} may import redirect"


def check_supervisor(project: Project) -> Iterator[str]:
    root = project.modules.get("netproxy")
    for imported in root.imports if root else ():
        if top(imported.target) != "__future__":
            yield f"{root.path}:{imported.line}: runs in every process, so it imports nothing"
    seen: set[str] = set()
    queue = ["netproxy.supervisor"] if "netproxy.supervisor" in project.modules else []
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in SUPERVISOR_LOADS:
            yield f"{name.replace('.', '/')}: the supervisor loads it, and may load {sorted(SUPERVISOR_LOADS)} only"
        module = project.modules[name]
        for imported in module.imports:
            if imported.typing_only:
                continue
            if (loaded := project.loaded(imported.target)) in project.modules:
                # A package's __init__ runs before its modules.
                parts = loaded.split(".")
                queue += [part for i in range(len(parts)) if (part := ".".join(parts[: i + 1])) in project.modules]
            elif top(imported.target) not in sys.stdlib_module_names:
                yield f"{module.path}:{imported.line}: {imported.target} is not in the standard library"


def check_pure(project: Project) -> Iterator[str]:
    for module in project.modules.values():
        if not is_pure(module.path):
            continue
        third_party = {
            name for package, names in PURE_THIRD_PARTY.items() if is_in(module.name, package) for name in names
        }
        for imported in module.imports:
            target = imported.target
            if imported.typing_only:
                continue
            if (loaded := project.loaded(target)) in project.modules:
                if not is_pure(project.modules[loaded].path):
                    yield f"{module.path}:{imported.line}: {loaded} is not PURE, so a PURE module may not import it"
            # ``import http`` gives no http.client, so the parent of a dotted entry is fine too.
            elif not any(is_in(target, allowed) or is_in(allowed, target) for allowed in PURE_STDLIB | third_party):
                yield f"{module.path}:{imported.line}: {target} is not on the list for PURE modules"
        yield from _effects(module)


def _effects(module: Module) -> Iterator[str]:
    clocks = {"datetime", "date"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "datetime":
            clocks |= {alias.asname for alias in node.names if alias.asname and alias.name in clocks}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in PURE_NO_NAMES:
            yield f"{module.path}:{node.lineno}: {node.id} is an effect"
        if isinstance(node, ast.Attribute) and node.attr in PURE_NO_CLOCK:
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id in clocks) or (
                isinstance(owner, ast.Attribute) and owner.attr in clocks
            ):
                yield f"{module.path}:{node.lineno}: {ast.unparse(node)} reads the clock: take `now` as an argument"


def check_layers(project: Project) -> Iterator[str]:
    for module in project.in_package("netproxy"):
        unit = module.unit
        if unit not in ALLOWED and unit not in ROOTS:
            yield f"{module.path}: {unit} has no row in ALLOWED"
            continue
        for imported in module.imports:
            if top(imported.target) != "netproxy":
                continue
            loaded = project.loaded(imported.target).partition(".")[2]
            # A root may know every folder, but neither another root nor the command line.
            if unit in ROOTS:
                fine = top(loaded) == unit or top(loaded) not in ROOTS | {"cli", "__main__"}
            else:
                fine = top(loaded) in {unit, ""} or any(is_in(loaded, allowed) for allowed in ALLOWED[unit])
            if not fine:
                yield f"{module.path}:{imported.line}: {unit} may not import {loaded}"


def check_names(project: Project) -> Iterator[str]:
    for module in project.modules.values():
        if bad := BAD_NAMES.intersection(module.name.split(".")):
            yield f"{module.path}: {bad.pop()} says nothing; name it by what it does"


def check_docstrings(project: Project) -> Iterator[str]:
    for module in project.modules.values():
        if top(module.name) != "tests" and not (ast.get_docstring(module.tree) or "").strip():
            yield f"{module.path}: has no docstring"


CHECKS = [check_redirect, check_supervisor, check_pure, check_layers, check_names, check_docstrings]

# --- the project keeps the rules


@pytest.fixture(scope="module")
def project() -> Project:
    return read_project()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_project(project: Project, check) -> None:
    violations = list(check(project))
    assert not violations, "\n" + "\n".join(violations)


def test_project_is_found(project: Project) -> None:
    assert {"netproxy", "netproxy.errors", "netproxy.codec.events", "redirect"} <= project.modules.keys()


def test_layers_have_no_cycle() -> None:
    # A unit that is allowed another one whole or in part; the command line is on top and left out with the roots.
    TopologicalSorter({unit: {top(name) for name in allowed} - ROOTS for unit, allowed in ALLOWED.items()}).prepare()


# --- each check finds what it is for

DOC = '"""Doc."""\n'

BROKEN = [
    (check_redirect, {"redirect/apply.py": "from netproxy.addr import ClientAddr"}),
    (check_redirect, {"netproxy/worker.py": "import redirect.plan"}),
    (check_redirect, {"netproxy/supervisor.py": "def f():\n    from redirect import plan"}),
    (check_supervisor, {"netproxy/__init__.py": "from .errors import NetproxyError"}),
    (check_supervisor, {"netproxy/supervisor.py": "import uvloop"}),
    (check_supervisor, {"netproxy/supervisor.py": "from . import addr", "netproxy/addr.py": ""}),
    (check_supervisor, {"netproxy/supervisor.py": "from . import channel", "netproxy/channel.py": "import yaml"}),
    (check_pure, {"netproxy/codec/strict.py": "import asyncio"}),
    (check_pure, {"netproxy/decide/route.py": "def f():\n    import time"}),
    (check_pure, {"netproxy/decide/balance.py": "import random"}),
    (check_pure, {"netproxy/decide/balance.py": "from urllib import request"}),
    (check_pure, {"netproxy/codec/strict.py": "import http.client"}),
    (check_pure, {"netproxy/addr.py": "import h11"}),
    (check_pure, {"netproxy/upstream/pool.py": "from . import connect", "netproxy/upstream/connect.py": ""}),
    (check_pure, {"netproxy/upstream/pool.py": "from .connect import dial", "netproxy/upstream/connect.py": ""}),
    (check_pure, {"netproxy/config/validate.py": "def f(p):\n    return open(p)"}),
    (check_pure, {"redirect/plan.py": "print(1)"}),
    (check_pure, {"netproxy/config/model.py": "from datetime import datetime\nfield(default_factory=datetime.now)"}),
    (check_pure, {"netproxy/config/model.py": "import datetime as dt\ndt.datetime.utcnow()"}),
    (check_pure, {"netproxy/config/model.py": "from datetime import date as day\nday.today()"}),
    (check_layers, {"netproxy/codec/h1.py": "from ..relay import exchange", "netproxy/relay/exchange.py": ""}),
    (check_layers, {"netproxy/codec/h1.py": "from netproxy.addr import ClientAddr", "netproxy/addr.py": ""}),
    (check_layers, {"netproxy/upstream/pool.py": "from .. import decide", "netproxy/decide/__init__.py": ""}),
    (check_layers, {"netproxy/decide/route.py": "from ..config import source", "netproxy/config/source.py": ""}),
    (check_layers, {"netproxy/worker.py": "from . import brain", "netproxy/brain.py": ""}),
    (check_layers, {"netproxy/cli/top.py": "from ..relay import drain", "netproxy/relay/drain.py": ""}),
    (check_layers, {"netproxy/sidecar/inject.py": ""}),
    (check_names, {"netproxy/relay/utils.py": ""}),
    (check_names, {"tests/common/netns.py": ""}),
    (check_docstrings, {"netproxy/relay/drain.py": "x = 1"}),
    (check_docstrings, {"redirect/__init__.py": ""}),
]


@pytest.mark.parametrize(("check", "files"), BROKEN)
def test_violation_is_found(check, files: dict[str, str]) -> None:
    assert len(list(check(Project(files)))) == 1


FINE = {
    "netproxy/__init__.py": DOC,
    "netproxy/errors.py": DOC + "import enum",
    "netproxy/channel.py": DOC + "import socket, selectors",
    "netproxy/supervisor.py": DOC + "import os\nfrom .channel import Channel\nfrom netproxy import channel",
    "netproxy/pods.py": DOC + "from redirect import plan",
    "netproxy/brain.py": DOC + "from .relay import connection",
    "netproxy/cli/run.py": DOC + "import redirect\nfrom ..brain import main",
    "netproxy/config/shard.py": DOC + "from pydantic import TypeAdapter",
    "netproxy/decide/balance.py": DOC
    + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import random\n"
    + "from ..config.shard import Endpoint\nfrom .. import errors\nfrom . import route\n"
    + "from datetime import datetime\ndef f(now: datetime, reopen: int, clock: 'random.Random'): return now",
    "netproxy/decide/route.py": DOC + "from urllib.parse import unquote",
    "netproxy/relay/connection.py": DOC + "import asyncio\nfrom ..decide import route",
    "redirect/__init__.py": DOC,
    "redirect/plan.py": DOC + "from __future__ import annotations",
    "tests/unit/test_plan.py": "import redirect",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_is_allowed_is_not_a_violation(check) -> None:
    assert list(check(Project(FINE))) == []
