"""Loading again and again: what was good stays in force while its successor can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.config.load import Loader
from netproxy.config.shard import ServiceShard
from netproxy.config.snapshot import Context, Snapshot
from netproxy.errors import ConfigError

_CONTEXT = Context("node-a")
_SERVICE = """apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec: {{clusterIP: 240.240.0.{n}, selector: {{app: {name}}}, ports: [{{port: {port}}}]}}
"""


def _service(name: str, n: int, port: int | str = 80) -> str:
    return _SERVICE.format(name=name, n=n, port=port)


def _ports(snapshot: Snapshot) -> dict[str, list[int]]:
    return {s.name: [p.port for p in s.ports] for s in snapshot.shards.values() if isinstance(s, ServiceShard)}


def test_a_rejected_edit_keeps_the_last_good_version(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    loader = Loader(tmp_path)
    file.write_text(_service("web", 1) + "---\n" + _service("api", 2))
    assert _ports(loader.load(_CONTEXT)) == {"web": [80], "api": [80]}
    file.write_text(_service("web", 1, "eighty") + "---\n" + _service("api", 2, 81))
    snapshot = loader.load(_CONTEXT)
    assert _ports(snapshot) == {"web": [80], "api": [81]}
    assert snapshot.kept == ("Service shop/web",)
    assert [error.obj for error in snapshot.rejected] == ["Service shop/web"]
    file.write_text(_service("web", 1, 82) + "---\n" + _service("api", 2, 81))
    snapshot = loader.load(_CONTEXT)
    assert (_ports(snapshot), snapshot.kept, snapshot.rejected) == ({"web": [82], "api": [81]}, (), ())


@pytest.mark.parametrize("broken", ["a: [", "\x00", 'a: "', "- - -\n: :"])
def test_a_file_that_is_no_yaml_keeps_what_it_held(tmp_path: Path, broken: str) -> None:
    (tmp_path / "a.yaml").write_text(_service("web", 1))
    (tmp_path / "b.yaml").write_text(_service("api", 2))
    loader = Loader(tmp_path)
    loader.load(_CONTEXT)
    (tmp_path / "a.yaml").write_text(broken)
    snapshot = loader.load(_CONTEXT)
    assert _ports(snapshot) == {"web": [80], "api": [80]}
    assert snapshot.kept == ("Service shop/web",)
    assert snapshot.rejected


def test_what_was_removed_is_gone_though_another_kind_of_that_name_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(_service("web", 1) + "---\n" + _ROUTE)
    loader = Loader(tmp_path)
    loader.load(_CONTEXT)
    file.write_text(_ROUTE.replace("port: 80", "port: eighty"))
    snapshot = loader.load(_CONTEXT)
    assert (_ports(snapshot), snapshot.kept) == ({}, ("TCPRoute shop/web",))


_WORKLOAD = """apiVersion: netproxy.mesh/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: shop}}
spec: {{addresses: [10.0.0.{n}], attach: {{netns: /run/netns/{name}}}}}
"""


def _addresses(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    return {work.name: work.addresses for work in snapshot.local_workloads}


def test_an_edit_that_claims_what_is_anothers_keeps_the_last_good_version(tmp_path: Path) -> None:
    mesh, memory = tmp_path / "mesh", str(tmp_path / "memory.json")
    mesh.mkdir()

    def write(**numbers: int) -> None:
        (mesh / "a.yaml").write_text("---\n".join(_WORKLOAD.format(name=name, n=n) for name, n in numbers.items()))

    loader = Loader(mesh, memory)
    write(a=1, b=2)
    loader.load(_CONTEXT)
    write(a=1, b=1)
    for again in (loader, loader, Loader(mesh, memory)):
        snapshot = again.load(_CONTEXT)
        assert _addresses(snapshot) == {"a": ("10.0.0.1",), "b": ("10.0.0.2",)}
        assert snapshot.kept == ("Workload shop/b",)
        assert [(e.obj, e.line, e.field) for e in snapshot.rejected] == [("Workload shop/b", 9, "spec.addresses[0]")]
    write(a=1, b=1, c=2)  # what is kept takes nothing from what is good
    snapshot = loader.load(_CONTEXT)
    assert _addresses(snapshot) == {"a": ("10.0.0.1",), "c": ("10.0.0.2",)}
    assert (snapshot.kept, len(snapshot.rejected)) == ((), 1)
    write(a=1, b=1)
    assert _addresses(loader.load(_CONTEXT)) == {"a": ("10.0.0.1",), "b": ("10.0.0.2",)}
    write(a=1, b=3)
    snapshot = loader.load(_CONTEXT)
    assert _addresses(snapshot) == {"a": ("10.0.0.1",), "b": ("10.0.0.3",)}
    assert (snapshot.kept, snapshot.rejected) == ((), ())


def test_an_object_that_never_was_good_is_not_restored(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(_WORKLOAD.format(name="a", n=1) + "---\n" + _WORKLOAD.format(name="b", n=1))
    loader = Loader(tmp_path)
    for _ in range(2):
        snapshot = loader.load(_CONTEXT)
        assert _addresses(snapshot) == {"a": ("10.0.0.1",)}
        assert (snapshot.kept, len(snapshot.rejected)) == ((), 1)


def test_a_host_that_becomes_one_of_the_mesh_keeps_what_was_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(_service("web", 1))
    file = tmp_path / "b.yaml"
    file.write_text(_EXTERNAL)
    loader = Loader(tmp_path)
    first = loader.load(_CONTEXT)
    file.write_text(_EXTERNAL.replace("api.example.com", "api.example.com, web.shop"))
    snapshot = loader.load(Context("node-a", vips=first.vips))
    assert snapshot.shards == first.shards
    assert snapshot.kept == ("ExternalService shop/api",)


_ROUTE = """apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {name: web, namespace: shop}
spec: {parentRefs: [{group: "", kind: Service, name: web}], rules: [{backendRefs: [{name: web, port: 80}]}]}
"""
_EXTERNAL = """apiVersion: netproxy.mesh/v1alpha1
kind: ExternalService
metadata: {name: api, namespace: shop}
spec: {hosts: [api.example.com], ports: [{port: 443, protocol: TLS}]}
"""


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (_ROUTE, _ROUTE.replace("port: 80", "port: eighty")),
        (_EXTERNAL, _EXTERNAL.replace("TLS", "HTTPS")),
        (_EXTERNAL, _EXTERNAL.replace("ExternalService", "ExternalServcie")),
    ],
)
def test_every_kind_keeps_its_last_good_version(tmp_path: Path, good: str, bad: str) -> None:
    memory = str(tmp_path / "memory.json")
    mesh = tmp_path / "mesh"
    mesh.mkdir()
    (mesh / "a.yaml").write_text(_service("web", 1))
    (mesh / "b.yaml").write_text(good)
    first = Loader(mesh, memory).load(_CONTEXT)
    assert first.rejected == ()
    (mesh / "b.yaml").write_text(bad)
    context = Context("node-a", vips=first.vips)
    for loader in (Loader(mesh, memory), Loader(mesh, memory)):
        snapshot = loader.load(context)
        assert snapshot.shards == first.shards
        assert snapshot.kept == (f"{good.split()[3]} shop/{'web' if good is _ROUTE else 'api'}",)
        assert len(snapshot.rejected) == 1


def test_a_typo_in_the_kind_keeps_the_object(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(_service("web", 1))
    loader = Loader(tmp_path)
    loader.load(_CONTEXT)
    file.write_text(_service("web", 1).replace("kind: Service", "kind: Servcie"))
    assert _ports(loader.load(_CONTEXT)) == {"web": [80]}


def test_what_was_removed_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(_service("web", 1))
    (tmp_path / "b.yaml").write_text(_service("api", 2))
    loader = Loader(tmp_path)
    loader.load(_CONTEXT)
    (tmp_path / "a.yaml").unlink()
    (tmp_path / "b.yaml").write_text("a: [")
    snapshot = loader.load(_CONTEXT)
    assert _ports(snapshot) == {"api": [80]}
    assert snapshot.kept == ("Service shop/api",)


def test_a_memory_that_cant_be_written_is_told_and_written_later(tmp_path: Path) -> None:
    mesh, memory = tmp_path / "mesh", tmp_path / "state" / "last-good.json"
    mesh.mkdir()
    (mesh / "a.yaml").write_text(_service("web", 1))
    loader = Loader(mesh, str(memory))
    assert _ports(loader.load(_CONTEXT)) == {"web": [80]}
    assert isinstance(loader.memory_error, FileNotFoundError)
    (mesh / "a.yaml").write_text(_service("web", 1, "eighty"))
    assert loader.load(_CONTEXT).kept == ("Service shop/web",)
    memory.parent.mkdir()
    loader.save()
    assert loader.memory_error is None
    assert _ports(Loader(mesh, str(memory)).load(_CONTEXT)) == {"web": [80]}


def test_the_memory_survives_a_restart(tmp_path: Path) -> None:
    mesh, memory = tmp_path / "mesh", str(tmp_path / "last-good.json")
    mesh.mkdir()
    (mesh / "a.yaml").write_text(_service("web", 1))
    Loader(mesh, memory).load(_CONTEXT)
    (mesh / "a.yaml").write_text(_service("web", 1, "eighty"))
    snapshot = Loader(mesh, memory).load(_CONTEXT)
    assert _ports(snapshot) == {"web": [80]}
    assert snapshot.kept == ("Service shop/web",)


@pytest.mark.parametrize("content", ["", "[", '{"a": 1}', '[{"file": 1}]', '[{"file": "x", "line": 1, "value": {}}]'])
def test_a_broken_memory_is_none(tmp_path: Path, content: str) -> None:
    mesh, memory = tmp_path / "mesh", tmp_path / "last-good.json"
    mesh.mkdir()
    memory.write_text(content)
    (mesh / "a.yaml").write_text(_service("web", 1))
    assert _ports(Loader(mesh, str(memory)).load(_CONTEXT)) == {"web": [80]}
    assert memory.read_text() != content


def test_a_path_that_can_not_be_read_raises_and_forgets_nothing(tmp_path: Path) -> None:
    mesh = tmp_path / "mesh"
    mesh.mkdir()
    (mesh / "a.yaml").write_text(_service("web", 1))
    loader = Loader(mesh)
    loader.load(_CONTEXT)
    mesh.rename(tmp_path / "away")
    with pytest.raises(ConfigError):
        loader.load(_CONTEXT)
    mesh.mkdir()
    (mesh / "a.yaml").write_text("a: [")
    assert _ports(loader.load(_CONTEXT)) == {"web": [80]}
