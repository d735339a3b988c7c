from __future__ import annotations

import http.server
import json
import os
import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from netproxy import __version__
from netproxy.cli import app, check, clean, run
from netproxy.cli.options import default_node, node_name
from netproxy.settings import NodeSettings
from redirect import Observed, RedirectError, Removed
from redirect.plan import Table
from redirect.probe import Probe

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
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    """`clean` looks into no namespace of this machine: as root it would remove what other sessions put there."""
    monkeypatch.setattr(clean, "_NETNS_DIR", str(tmp_path / "none"))
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


# --- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(cli: CliRunner, verb: str) -> None:
    found = cli.invoke(app, [verb, "--help"])
    assert found.exit_code == 0
    assert f"Example: netproxy {verb}" in " ".join(found.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_an_example_has_only_options_that_exist(cli: CliRunner, verb: str) -> None:
    help_text = " ".join(cli.invoke(app, [verb, "--help"]).stdout.split())
    example, _, rest = help_text.partition("Example: ")[2].partition("╭")
    for option in (word for word in example.split() if word.startswith("-")):
        assert re.search(rf"(?<!\S){option}(?!\S)", rest), option


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("more", [["--no-such-option"], ["one", "argument", "too", "many"]])
def test_usage_errors(cli: CliRunner, verb: str, more: list[str]) -> None:
    found = cli.invoke(app, [verb, *more])
    assert found.exit_code == 2
    assert f"netproxy {verb} --help" in found.stderr or f"root {verb} --help" in found.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is(verb: str) -> None:
    command: Any = typer.main.get_command(app)
    for parameter in command.commands[verb].params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("run", "clean")])
def test_what_prints_data_prints_it_for_programs_too(cli: CliRunner, verb: str) -> None:
    assert "<table|json|yaml>" in cli.invoke(app, [verb, "--help"]).stdout


def test_the_verbs_that_there_are(cli: CliRunner) -> None:
    found = cli.invoke(app, ["--help"])
    assert found.exit_code == 0
    assert {"run", "validate", "status", "clean", "config-dump", "log-level"} <= set(VERBS)
    assert all(verb in found.stdout for verb in VERBS)
    text = " ".join(found.stdout.split())
    assert "Example: netproxy run -f" in text
    # What to do first, in order.
    at = [text.index(f"netproxy {verb}") for verb in ("check", "validate", "run", "status")]
    assert at == sorted(at)


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


HALF = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {ports: [{port: 99999}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec: {parentRefs: [{group: "", kind: Service, name: none}], rules: [{backendRefs: [{name: none, port: 80}]}]}
"""
"""A Service that is invalid, and a valid route whose parent does not exist."""


def test_only_what_is_accepted_counts_and_nothing_is_said_twice(cli: CliRunner, tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text(HALF)
    found = cli.invoke(app, ["validate", "-f", str(path)])
    assert found.exit_code == 2
    assert found.stdout == "0 objects accepted, 1 error, 2 warnings\n"
    lines = found.stderr.splitlines()
    assert [line.startswith("warning: ") for line in lines] == [False, True, True]
    assert sum("Service shop/web" in line for line in lines) == 1
    assert "Accepted NoMatchingParent" in lines[1]
    result = json.loads(cli.invoke(app, ["validate", "-f", str(path), "-o", "json"]).stdout)
    assert (result["accepted"], result["rejected"], len(result["warnings"])) == (0, 1, 2)


def test_a_parent_that_refuses_is_told_though_another_accepts(cli: CliRunner, tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    none = '{group: "", kind: Service, name: none}'
    path.write_text(HALF.replace("99999", "80").replace(none, none.replace("none", "web") + f", {none}"))
    found = cli.invoke(app, ["validate", "-f", str(path)])
    assert found.stdout == "2 objects accepted, 0 errors, 2 warnings\n"
    route = f"warning: {path}:6: HTTPRoute shop/web"
    assert found.stderr.splitlines() == [
        f"{route}: ResolvedRefs BackendNotFound: Service shop/none does not exist",
        f"{route}: Service shop/none: Accepted NoMatchingParent: Service shop/none does not exist",
    ]


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
    "engine": {"http1": "reference", "http2": "native", "relay": "compiled", "streams": "loop"},
    "config": {"path": "/etc/mesh", "age_s": 1.0, "error": ""},
    "identity_error": "",
    "state_error": "",
    "steering": {
        "wanted": "auto",
        "mechanism": "iptables-nft",
        "reason": "nftables can't be used: [no] module",
        "outbound_port": 15001,
    },
    "supervisor_pid": 1,
    "workloads": [
        {
            "workload": "shop/web-1",
            "state": "steered",
            "steering": "iptables-nft",
            "failure_policy": "open",
            "policy_in_force": "closed",
            "steering_wanted": "nftables",
            "steering_reason": "steering: [nftables] is configured",
            "steering_note": "older rules can't be removed: [x]",
            "unsteered_connections": {
                "count": 3,
                "first": [
                    {"local": "10.0.0.1:5000", "peer": "10.0.0.9:80"},
                    {"local": "[fd00::1]:1", "peer": "[fd00::2]:2"},
                ],
                "complete": True,
            },
            "addresses": ["10.0.0.1"],
            "identity": "spiffe://x",
            "certificate_not_after": 0,
            "netns": "/run/netns/none-of-that-name",
            "detail": "",
            "dns": {"capture": True, "nameservers": ["10.0.0.53"], "source": "/etc/resolv.conf", "note": "[/odd]"},
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
    "log_level": "info",
    "access_log": {"target": "-", "error": "", "written": 1, "dropped": {"ENOSPC": 7}},
}


class _Handler(http.server.BaseHTTPRequestHandler):
    answer = b""
    code = 200

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

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
        for text in (
            "node-a",
            "shop/web-1",
            "240.240.0.1",
            "80/http 1/2 ready",
            "10.0.0.53",
            "[/odd]",
            "because",
            "(in force: closed)",
            "[no] module",
            "shop/web-1: steering nftables: steering: [nftables] is configured",
            "[fd00::1]:1 - [fd00::2]:2 and 1 more",
            "web.yaml:1: broken",
            "log level info",
            "7 lost (ENOSPC)",
        ):
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


@pytest.mark.parametrize("verb", ["status", "config-dump"])
def test_what_an_agent_tells_is_no_markup(cli: CliRunner, tmp_path: Path, verb: str) -> None:
    odd = "[a-z]+[/][/red]"
    condition = {"type": "Accepted", "status": "False", "reason": "Invalid", "message": f"5 {odd}"}
    status = {
        **STATUS,
        "detail": f"1 {odd}",
        "config": {**STATUS["config"], "error": f"2 {odd}"},
        "identity_error": f"3 {odd}",
        "state_error": f"4 {odd}",
        "objects": [{**STATUS["objects"][0], "conditions": [condition]}],
        "rejected": [f"6 {odd}"],
        "last_good": [f"7 {odd}"],
        "workloads": [{**STATUS["workloads"][0], "detail": f"8 {odd}"}],
    }
    shard = {"key": f"nothing/{odd}", "version": "1", "held": "1", "body": {}}
    with agent(tmp_path, json.dumps(status if verb == "status" else {"shards": [shard]}).encode()):
        found = cli.invoke(app, [verb, *status_args(tmp_path)[1:]])
    assert found.exit_code == 0, found.output
    assert found.stdout.count(odd) == (8 if verb == "status" else 1)


@pytest.mark.usefixtures("can_steer")
@pytest.mark.parametrize("verb", ["status", "check"])
def test_an_agent_of_before_an_upgrade(cli: CliRunner, tmp_path: Path, verb: str) -> None:
    old = {key: value for key, value in STATUS.items() if key not in ("access_log", "steering")}
    with agent(tmp_path, json.dumps(old).encode()):
        arguments = status_args(tmp_path) if verb == "status" else check_args(tmp_path)
        found = cli.invoke(app, arguments)
    assert found.exit_code == 1
    assert "it is of another version, SIGUSR2 upgrades it" in " ".join(found.output.split())
    assert "Traceback" not in found.output and not isinstance(found.exception, KeyError)


def test_status_says_where_the_access_log_could_not_be_opened(cli: CliRunner, tmp_path: Path) -> None:
    log = {"target": "/log", "error": "/log[x]: Is a directory", "written": 0, "dropped": {}}
    with agent(tmp_path, json.dumps({**STATUS, "access_log": log}).encode()):
        assert "/log[x]: Is a directory; what was open stays" in cli.invoke(app, status_args(tmp_path)).stdout


@pytest.mark.usefixtures("can_steer")
def test_check_of_an_access_log_that_could_not_be_opened_anew(cli: CliRunner, tmp_path: Path) -> None:
    log = {"target": "/log", "error": "/log: Is a directory", "written": 0, "dropped": {}}
    with agent(tmp_path, json.dumps({**STATUS, "access_log": log}).encode()):
        found = cli.invoke(app, check_args(tmp_path, "-o", "json"))
    assert (found.exit_code, findings(found)["access log"]) == (1, False)


# --- run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--access-log", "{}/none/log"], "none/log: No such file or directory"),
        (["--access-log", "{}"], ": Is a directory"),
        (["--log-level", "loud"], "--log-level"),
        (["--node", "UPPER"], "UPPER"),
        (["--workers", "0"], "--workers"),
        (["-f", "{}/none"], "none"),
    ],
)
def test_run_with_what_it_cant_use(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.setattr(run.os, "geteuid", lambda: 0)
    monkeypatch.setattr(run.os, "execv", lambda *_: pytest.fail("it was started"))
    found = cli.invoke(app, ["run", "-f", str(BOOKSHOP), *(word.format(tmp_path) for word in more)])
    assert found.exit_code == 2, found.output
    assert said in found.stderr
    assert "Traceback" not in found.output


def test_run_takes_its_options_to_the_supervisor(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.os, "geteuid", lambda: 0)
    monkeypatch.setattr(run.os, "execv", lambda _path, argv: started.append(argv))
    more = ["--access-log", "log", "--log-level", "debug", "--http1-engine", "native", "--http2-engine", "reference"]
    for options in ([], more):
        assert cli.invoke(app, ["run", "-f", str(BOOKSHOP), *options]).exit_code == 0
    plain, other = (NodeSettings.from_json(argv[-1]) for argv in started)
    assert (plain.access_log, plain.log_level) == ("-", "info")
    assert (plain.http1_engine, plain.http2_engine) == ("auto", "auto")
    assert (other.access_log, other.log_level) == (str(tmp_path / "log"), "debug")
    assert (other.http1_engine, other.http2_engine) == ("native", "reference")


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_run_with_an_engine_that_was_not_compiled(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    def chosen(wanted: str) -> str:
        if wanted == "native":
            raise ValueError("no such engine here")
        return wanted

    monkeypatch.setattr(run.os, "geteuid", lambda: 0)
    monkeypatch.setattr(run.os, "execv", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr({"http1": run.h1, "http2": run.h2}[protocol], "chosen", chosen)
    found = cli.invoke(app, ["run", "-f", str(BOOKSHOP), f"--{protocol}-engine", "native"])
    assert (found.exit_code, found.output) == (2, "netproxy: no such engine here\n")


# --- config-dump, log-level


def dumped(key: str, version: str, held: str, body: dict[str, Any] | None) -> dict[str, Any]:
    return {"key": key, "version": version, "held": held, "body": body}


PORT = {"port": 80, "protocol": "http", "endpoints": [{"ready": True}, {"ready": False}]}
DUMP = {
    "shards": [
        dumped("mesh", "v1", "v1", {"outbound_policy": "deny"}),
        dumped("service/shop/web", "v2", "v1", {"vips": ["240.240.0.1"], "ports": [PORT]}),
        dumped("workload/shop/web-1", "v3", "", {"addresses": ["10.0.0.1"], "mtls": "STRICT", "local": True}),
        dumped("external/shop/far", "v4", "v4", {"hosts": [{"name": "far.example"}], "networks": []}),
        dumped("svid/spiffe://x", "", "v5", None),
    ]
}


@pytest.mark.parametrize("output", ["table", "json", "yaml"])
def test_config_dump(cli: CliRunner, tmp_path: Path, output: str) -> None:
    with agent(tmp_path, json.dumps(DUMP).encode()):
        found = cli.invoke(app, ["config-dump", *status_args(tmp_path, "-o", output)[1:]])
    assert found.exit_code == 0, found.output
    if output == "table":
        for text in ("shop/web", "240.240.0.1 80/http 1/2 ready", "10.0.0.1 STRICT, local", "far.example", "nothing"):
            assert text in found.stdout
        assert "of a brain before this one" in found.stdout
        assert "outbound policy deny" in found.stdout
    else:
        assert (json.loads if output == "json" else yaml.safe_load)(found.stdout) == DUMP


@pytest.mark.parametrize("output", ["table", "json", "yaml"])
def test_log_level(cli: CliRunner, tmp_path: Path, output: str) -> None:
    with agent(tmp_path, b'{"level": "debug"}'):
        for level in ([], ["debug"]):
            found = cli.invoke(app, ["log-level", *level, *status_args(tmp_path, "-o", output)[1:]])
            assert found.exit_code == 0, found.output
            told = found.stdout.strip()
            if output != "table":
                told = (json.loads if output == "json" else yaml.safe_load)(told)["level"]
            assert told == "debug"


@pytest.mark.parametrize("verb", ["config-dump", "log-level"])
def test_an_agent_that_says_no(cli: CliRunner, tmp_path: Path, verb: str) -> None:
    found = cli.invoke(app, [verb, *status_args(tmp_path)[1:]])
    assert (found.exit_code, "no answer on" in found.stderr) == (1, True)
    with agent(tmp_path, b'{"error": "no service is called none"}', 404):
        found = cli.invoke(app, [verb, *status_args(tmp_path)[1:]])
    assert (found.exit_code, found.stderr) == (1, "netproxy: no service is called none\n")


# --- clean


def test_clean_without_anything_to_clean(cli: CliRunner, tmp_path: Path) -> None:
    assert cli.invoke(app, ["clean", "--all", "--run-root", str(tmp_path)]).exit_code == 0


def test_clean_keeps_the_lock_that_a_starting_agent_may_wait_for(cli: CliRunner, tmp_path: Path) -> None:
    folder = tmp_path / "node-a"
    (folder / "sub").mkdir(parents=True)
    for name in ("lock", "supervisor.pid", "journal.json"):
        (folder / name).touch()
    inode = (folder / "lock").stat().st_ino
    found = cli.invoke(app, ["clean", "--node", "node-a", "--run-root", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert [(path.name, path.stat().st_ino) for path in folder.iterdir()] == [("lock", inode)]


@pytest.mark.parametrize("left", [(), ("netproxy-node-a-g1",)])
def test_clean_says_what_it_removed_and_what_it_could_not(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    (tmp_path / "node-a").mkdir()
    netns = tmp_path / "pod"
    netns.touch()
    entry = {"netns": str(netns), "dev": 1, "ino": 1}
    (tmp_path / "node-a" / "journal.json").write_text(json.dumps({"workloads": {"shop/web-1": entry}}))
    tables = (Table("netproxy-node-a-g1", 1, 7, ()), Table("netproxy-node-a-g2", 2, None, ()))
    seen = Observed("node-a", True, frozenset({"240.240.0.0/16"}), tables)
    after = Observed("node-a", True, frozenset(), tuple(table for table in tables if table.name in left))
    answers = iter([seen])
    monkeypatch.setattr(clean, "_OWNER_S", 0.0)
    monkeypatch.setattr(clean, "open_netns", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(clean, "observe", lambda _fd, _node: next(answers, after))
    monkeypatch.setattr(clean, "remove", lambda _fd, _node: Removed(left))
    found = cli.invoke(app, ["clean", "--node", "node-a", "--run-root", str(tmp_path)])
    assert found.exit_code == bool(left)
    assert found.stdout == f"{netns}: removed {'1 table' if left else '2 tables'} and 1 route\n"
    assert ("netproxy-node-a-g1 stays" in found.stderr) == bool(left)
    assert (tmp_path / "node-a" / "journal.json").exists() == bool(left)


# --- check


def routes_of(_fd: int, node: str, mechanisms: tuple[str, ...]) -> Observed:
    if mechanisms:
        raise RedirectError(f"{mechanisms[0]}: this kernel has none")
    return Observed(node, True, frozenset({"240.240.0.0/16"}), ())


@pytest.fixture
def can_steer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where all is there: what it really has, tests/kernel says."""
    monkeypatch.setattr(check.os, "geteuid", lambda: 0)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _name: ModuleSpec("nftables", None, origin="there"))
    monkeypatch.setattr(check, "open_netns", lambda _path: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(check, "observe", routes_of)
    monkeypatch.setattr(check, "blocked", lambda _fd, _cidrs, _port: "")
    monkeypatch.setattr(check, "probe", lambda mechanism: Probe(frozenset({4, 6}), "", mechanism))


def check_args(root: Path, *more: str) -> list[str]:
    return ["check", "--node", "node-a", "--run-root", str(root), "--state-root", str(root / "state"), *more]


def findings(found: Any) -> dict[str, bool | None]:
    return {item["name"]: item["ok"] for item in json.loads(found.stdout)["checks"]}


@pytest.mark.usefixtures("can_steer")
@pytest.mark.parametrize("output", ["table", "json", "yaml"])
def test_check_without_an_agent(cli: CliRunner, tmp_path: Path, output: str) -> None:
    found = cli.invoke(app, check_args(tmp_path, "-o", output))
    assert found.exit_code == 0, found.output
    for text in ("nftables IPv4", "nftables IPv6", "native", "does not run", str(tmp_path / "state")):
        assert text in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_machine_that_can_not(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "probe", lambda mechanism: Probe(frozenset({4}), "IPv6: no such module", mechanism))
    monkeypatch.setattr(check.os, "geteuid", lambda: 0)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _name: ModuleSpec("nftables", None, origin="there"))
    found = cli.invoke(app, check_args(tmp_path, "-o", "json"))
    assert found.exit_code == 1
    assert (findings(found)["nftables IPv4"], findings(found)["nftables IPv6"]) == (True, None)
    assert findings(found)["steering: auto"] is False
    assert "no such module" in found.stdout
    monkeypatch.setattr(check.os, "geteuid", lambda: 1000)
    found = cli.invoke(app, check_args(tmp_path, "-o", "json"))
    assert found.exit_code == 1
    assert (findings(found)["root"], findings(found)["nftables"]) == (False, None)
    (tmp_path / "state").touch()  # no folder can be made there
    assert cli.invoke(app, check_args(tmp_path / "state" / "x")).exit_code == 1


@pytest.mark.usefixtures("can_steer")
@pytest.mark.parametrize(
    ("state", "error", "ok"),
    [("steered", "", True), ("absent", "", True), ("failed", "", False), ("steered", "disk is full", False)],
)
def test_check_of_an_agent(cli: CliRunner, tmp_path: Path, state: str, error: str, ok: bool) -> None:
    status = {**STATUS, "state_error": error, "workloads": [{**STATUS["workloads"][0], "state": state}]}
    with agent(tmp_path, json.dumps(status).encode()):
        found = cli.invoke(app, check_args(tmp_path, "-o", "json"))
    assert found.exit_code == (0 if ok else 1), found.output
    assert findings(found)["agent"] is not bool(error)
    assert findings(found)["access log"] is None
    assert "7 lines lost (ENOSPC)" in found.stdout
    assert findings(found).get("way out of shop/web-1", False) is (state == "steered")
    assert findings(found)["workload shop/web-1"] is {"steered": True, "absent": None, "failed": False}[state]


@pytest.mark.usefixtures("can_steer")
def test_check_says_what_is_in_the_way(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "blocked", lambda _fd, _cidrs, port: f"nothing reaches {port}: inet odd input")
    with agent(tmp_path, json.dumps(STATUS).encode()):
        found = cli.invoke(app, check_args(tmp_path, "-o", "json"))
    assert found.exit_code == 1
    for text in ("nothing reaches 15001: inet odd input", "in force closed", "3 connections older than the rules"):
        assert text in found.stdout


@pytest.mark.usefixtures("can_steer")
@pytest.mark.parametrize("protocol", ["HTTP/1", "HTTP/2"])
def test_check_where_no_compiler_was(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr({"HTTP/1": check.h1, "HTTP/2": check.h2}[protocol], "ENGINES", ("reference",))
    found = cli.invoke(app, check_args(tmp_path, "-o", "json"))
    assert found.exit_code == 0
    told = {item["name"]: item["detail"] for item in json.loads(found.stdout)["checks"]}
    other = "HTTP/2" if protocol == "HTTP/1" else "HTTP/1"
    assert told[f"{protocol} engine"] == "reference: not compiled, a request costs more"
    assert told[f"{other} engine"] == "native"
    assert findings(found)[f"{protocol} engine"] is None
