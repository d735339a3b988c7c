from __future__ import annotations

import http.server
import json
import os
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from netproxy import __version__
from netproxy.cli import app
from netproxy.cli.options import default_node, node_name

BOOKSHOP = Path(__file__).parents[2] / "examples" / "bookshop"
VERBS = sorted(str(command.name) for command in app.registered_commands)
BROKEN = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {ports: [{port: 99999}]}
---
apiVersion: v1
kind: Nonsense
metadata: {name: x}
---
apiVersion: netproxy.mesh/v1alpha1
kind: Workload
metadata: {name: web-1, namespace: shop}
spec: {addresses: [not-an-address]}
"""


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


# --- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(cli: CliRunner, verb: str) -> None:
    found = cli.invoke(app, [verb, "--help"])
    assert found.exit_code == 0
    assert f"Example: netproxy {verb}" in " ".join(found.stdout.split())


def test_the_verbs_that_there_are(cli: CliRunner) -> None:
    found = cli.invoke(app, ["--help"])
    assert found.exit_code == 0
    assert {"run", "validate", "status", "clean"} <= set(VERBS)
    assert all(verb in found.stdout for verb in VERBS)


def test_version_and_usage(cli: CliRunner) -> None:
    found = cli.invoke(app, ["--version"])
    assert (found.exit_code, found.stdout) == (0, f"netproxy {__version__}\n")
    assert cli.invoke(app, []).exit_code in (0, 2)
    assert cli.invoke(app, ["nonsense"]).exit_code == 2
    assert cli.invoke(app, ["validate"]).exit_code == 2
    assert cli.invoke(app, ["status", "-o", "xml"]).exit_code == 2


# --- validate


def test_the_example_is_valid(cli: CliRunner) -> None:
    found = cli.invoke(app, ["validate", "-f", str(BOOKSHOP)])
    assert found.exit_code == 0, found.output
    assert "objects accepted, 0 errors" in found.stdout


def test_every_error_with_its_place(cli: CliRunner, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    found = cli.invoke(app, ["validate", "-f", str(path)])
    assert found.exit_code == 2
    lines = found.stderr.splitlines()
    for wanted in ("Service shop/web: spec.ports[0].port", "Nonsense", "Workload shop/web-1: spec.addresses[0]"):
        assert any(wanted in line and line.startswith(f"{path}:") for line in lines), found.stderr


@pytest.mark.parametrize(("output", "parse"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_errors_for_programs(cli: CliRunner, tmp_path: Path, output: str, parse: Any) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    found = cli.invoke(app, ["validate", "-f", str(path), "-o", output])
    assert found.exit_code == 2
    result = parse(found.stdout)
    assert result["rejected"] == len(result["errors"]) == 3
    assert {error["line"] for error in result["errors"]} == {4, 7, 13}
    assert all(error["file"] == str(path) for error in result["errors"])


def test_a_path_that_is_not_there(cli: CliRunner, tmp_path: Path) -> None:
    found = cli.invoke(app, ["validate", "-f", str(tmp_path / "none")])
    assert found.exit_code == 2
    assert str(tmp_path / "none") in found.stderr
    assert "Traceback" not in found.output


@pytest.mark.parametrize("name", ["UPPER", "a.b", "a" * 41, "a/b", "ä"])
def test_names_that_are_none(cli: CliRunner, name: str) -> None:
    with pytest.raises(typer.BadParameter):
        node_name(name)
    assert cli.invoke(app, ["validate", "-f", str(BOOKSHOP), "--node", name]).exit_code == 2


def test_the_default_name_is_one() -> None:
    assert node_name(None) == default_node() == node_name(default_node())


# --- status

STATUS: dict[str, Any] = {
    "node": "node-a",
    "healthy": True,
    "detail": "ok",
    "engine": {"http1": "reference"},
    "config": {"path": "/etc/mesh", "age_s": 1.0, "error": ""},
    "identity_error": "",
    "supervisor_pid": 1,
    "workloads": [
        {
            "workload": "shop/web-1",
            "state": "steered",
            "steering": "nft",
            "failure_policy": "open",
            "addresses": ["10.0.0.1"],
            "identity": "spiffe://x",
            "certificate_not_after": 0,
            "detail": "",
        }
    ],
    "processes": [{"role": "worker", "slot": 0, "pid": 2, "state": "ready", "age_s": 1.0}],
    "services": [
        {
            "service": "shop/web",
            "vips": ["240.240.0.1"],
            "ports": [{"port": 80, "protocol": "http", "endpoints": 2, "ready": 1, "rules": None}],
        }
    ],
    "objects": [
        {
            "object": "Service shop/web",
            "file": "web.yaml",
            "line": 1,
            "conditions": [{"type": "Accepted", "status": "False", "reason": "Invalid", "message": "because"}],
        }
    ],
    "last_good": [],
    "rejected": ["web.yaml:1: broken"],
}


class _Handler(http.server.BaseHTTPRequestHandler):
    answer = b""
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.send_header("content-length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def agent(root: Path, answer: bytes, code: int = 200) -> Iterator[None]:
    folder = root / "node-a"
    folder.mkdir()
    handler = type("Handler", (_Handler,), {"answer": answer, "code": code})
    with socketserver.ThreadingUnixStreamServer(str(folder / "admin.sock"), handler) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def status_args(root: Path, *more: str) -> list[str]:
    return ["status", "--node", "node-a", "--run-root", str(root), *more]


def test_status_without_an_agent(cli: CliRunner, tmp_path: Path) -> None:
    found = cli.invoke(app, status_args(tmp_path))
    assert found.exit_code == 1
    assert f"no answer on {os.path.join(tmp_path, 'node-a', 'admin.sock')}" in found.stderr


@pytest.mark.parametrize("output", ["table", "json", "yaml"])
def test_status(cli: CliRunner, tmp_path: Path, output: str) -> None:
    with agent(tmp_path, json.dumps(STATUS).encode()):
        found = cli.invoke(app, status_args(tmp_path, "-o", output))
    assert found.exit_code == 0, found.output
    if output == "table":
        for text in ("node-a", "shop/web-1", "240.240.0.1", "80/http 1/2 ready", "because", "web.yaml:1: broken"):
            assert text in found.stdout
    else:
        assert (json.loads if output == "json" else yaml.safe_load)(found.stdout) == STATUS


def test_status_of_an_agent_that_is_not_healthy(cli: CliRunner, tmp_path: Path) -> None:
    with agent(tmp_path, json.dumps({**STATUS, "healthy": False}).encode()):
        assert cli.invoke(app, status_args(tmp_path, "-o", "json")).exit_code == 1


@pytest.mark.parametrize(("answer", "code"), [(b"oops", 500), (b"no json", 200)])
def test_status_of_an_agent_that_answers_nonsense(cli: CliRunner, tmp_path: Path, answer: bytes, code: int) -> None:
    with agent(tmp_path, answer, code):
        found = cli.invoke(app, status_args(tmp_path))
    assert found.exit_code == 1
    assert "netproxy: " in found.stderr
    assert "Traceback" not in found.output


# --- clean


def test_clean_without_anything_to_clean(cli: CliRunner, tmp_path: Path) -> None:
    assert cli.invoke(app, ["clean", "--all", "--run-root", str(tmp_path)]).exit_code == 0
