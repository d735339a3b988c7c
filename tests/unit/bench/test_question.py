from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__, _all
from bench._question import Question, parse_options, turns
from bench._systems import CONFIGS, PROGRAMS, Place, render
from examples.stage import Pod, Stage
from netproxy.config.load import load
from netproxy.config.shard import ServiceShard
from netproxy.config.snapshot import Context

NAMES = __main__.names()
QUESTIONS: list[Question] = [
    module.QUESTION for name in NAMES if hasattr(module := importlib.import_module(f"bench.{name}"), "QUESTION")
]


def find(name: str) -> Question:
    return next(question for question in QUESTIONS if question.name == name)


def test_every_question_is_among_all() -> None:
    assert sorted(_all.ORDER) == NAMES


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_question(question: Question) -> None:
    assert question.name in NAMES
    assert question.text.endswith(".")
    assert question.subject in question.systems


@pytest.mark.parametrize("question", [item for item in QUESTIONS if item.make is None], ids=lambda item: item.name)
def test_peers_of_a_question_have_their_configuration(question: Question) -> None:
    for name in set(question.systems) & set(PROGRAMS):
        for shape in question.shapes:
            assert (CONFIGS / f"{name}-{shape}.{PROGRAMS[name].suffix}").is_file()


def test_peers() -> None:
    asked, _ = parse_options(find("http1_small"), ["--peers", "haproxy,nginx", "--seconds", "1", "--rounds", "5"])
    assert (asked.seconds, asked.rounds) == (1, 5)
    # In the question's order, and with the subject, which needs no mention.
    assert find("http1_small").wanted(asked) == ("netproxy", "nginx", "haproxy")
    asked, _ = parse_options(find("http1_small"), [])
    assert find("http1_small").wanted(asked) == find("http1_small").systems


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--peers", "squid"], "--peers squid: not in this question, which has origin, netproxy"),
        (["--peers", "nginx,nghttpx"], "--peers nghttpx"),
        (["--seconds", "0"], "0 is not between 1"),
        (["--seconds", "1.5"], "--seconds"),
        (["--rounds", "-1"], "-1 is not between"),
        (["--json", "/no/such/folder/x.json"], "the folder is not there"),
        (["--what"], "--what"),
    ],
)
def test_wrong_options(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(find("http1_small"), arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--help"]])
def test_no_question(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert __main__.main() == 2
    said = capsys.readouterr().err
    assert all(f"  {name} " in said for name in NAMES)
    assert ("no question is called nothing" in said) == (arguments == ["nothing"])


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--write", "/no/such/folder"], ["--rounds", "x"]])
def test_wrong_options_of_all(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _all.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_turns() -> None:
    assert [turns("abc", number) for number in range(4)] == [list(order) for order in ("abc", "bca", "cab", "abc")]
    assert turns([], 3) == []


def test_render() -> None:
    assert render("listen @port@; # a@b.c", {"port": 80}) == "listen 80; # a@b.c"
    with pytest.raises(KeyError, match=r"x.conf: no value for @prot@"):
        render("listen @prot@;", {"port": 80}, "x.conf")


def test_configurations_name_only_what_there_is() -> None:
    values = {
        "folder", "certificates", "name", "workers", "port", "tls_port", "origin_1", "origin_2", "vip", "node",
        "client_ip", "client_netns", "server_netns", "payload", "answer_headers", "mesh_http", "resumption",
        "app_protocol",
    }  # fmt: skip
    for path in CONFIGS.iterdir():
        assert set(re.findall(r"@([a-z_0-9]+)@", path.read_text())) <= values, path.name


@pytest.mark.parametrize("shape", ["http", "grpc", "mtls"])
def test_netproxys_objects_are_all_accepted(shape: str, tmp_path: Path) -> None:
    """Without one that was rejected a run would go on, under other conditions."""
    stage, node = Stage("none", tmp_path, nodes=0), SimpleNamespace(netns="node-a")
    pods = [Pod(stage, name, node, [f"10.0.0.{n}"]) for n, name in enumerate(("c", "s"), 1)]  # type: ignore[arg-type]
    place = Place(stage, node, "netproxy", shape, 1, *pods, tmp_path)  # type: ignore[arg-type]
    file = place.render("netproxy-meshed.yaml" if shape == "mtls" else "netproxy.yaml")
    snapshot = load(file, Context("node-a"))
    assert snapshot.rejected == ()
    (service,) = (shard for shard in snapshot.shards.values() if isinstance(shard, ServiceShard))
    assert service.ports[0].http_version == ("2" if shape == "grpc" else "1.1")
