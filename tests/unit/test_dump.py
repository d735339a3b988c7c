"""The effective configuration as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netproxy.addr import SpiffeId
from netproxy.config import shard
from netproxy.config.load import load
from netproxy.config.shard import Shard, SvidShard
from netproxy.config.snapshot import Context, Snapshot
from netproxy.dump import KINDS, REDACTED, Unknown, config_dump

BOOKSHOP = Path(__file__).parents[2] / "examples" / "bookshop"


PEM = "-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n"
SVID = SvidShard(SpiffeId("spiffe://cluster.local/ns/shop/sa/web"), "chain", PEM, "bundle", 1.0)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return load(str(BOOKSHOP), Context("node-a"))


def dump(snapshot: Snapshot | None, held: dict[str, str] | None = None, **query: str) -> dict[str, Any]:
    shards: dict[str, Shard] = {**(snapshot.shards if snapshot else {}), SVID.key(): SVID}
    published = {key: "v1" for key in shards}
    found = config_dump(snapshot, shards, (published, published if held is None else held), **query)
    told: dict[str, Any] = json.loads(json.dumps(found))
    return told


def test_everything_but_keys(snapshot: Snapshot) -> None:
    found = dump(snapshot)
    assert "PRIVATE KEY" not in json.dumps(found)
    shards = {shard["key"]: shard for shard in found["shards"]}
    assert set(shards) == {*snapshot.shards, SVID.key()}
    assert shards[SVID.key()]["body"] == {
        "identity": SVID.identity,
        "chain_pem": "chain",
        "key_pem": REDACTED,
        "bundle_pem": "bundle",
        "not_after": 1.0,
    }
    assert {(shard["version"], shard["held"]) for shard in shards.values()} == {("v1", "v1")}
    assert len(found["local_workloads"]) == len(snapshot.local_workloads) > 0
    assert len(found["objects"]) == len(snapshot.statuses) > 0
    assert {"vips", "vip_networks", "steering", "rejected", "last_good"} <= set(found)


def test_what_workers_have_may_differ(snapshot: Snapshot) -> None:
    found = dump(snapshot, {"mesh": "v0", "svid/gone": "v7"})
    shards = {shard["key"]: (shard["version"], shard["held"]) for shard in found["shards"]}
    assert shards["mesh"] == ("v1", "v0")
    assert shards[SVID.key()] == ("v1", "")
    assert shards["svid/gone"] == ("", "v7")
    assert next(shard for shard in found["shards"] if shard["key"] == "svid/gone")["body"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_kind(snapshot: Snapshot, kind: str) -> None:
    found = dump(snapshot, kind=kind)
    assert set(found) == {"shards"}
    assert {shard["key"].partition("/")[0] for shard in found["shards"]} <= {kind}
    assert bool(found["shards"]) is (kind != "external")


def test_of_one_name(snapshot: Snapshot) -> None:
    key = next(key for key in snapshot.shards if key.startswith("service/"))
    kind, _, name = key.partition("/")
    assert [shard["key"] for shard in dump(snapshot, kind=kind, name=name)["shards"]] == [key]
    assert key in [shard["key"] for shard in dump(snapshot, name=name)["shards"]]
    with pytest.raises(Unknown, match="no service is called none/none"):
        dump(snapshot, kind="service", name="none/none")
    with pytest.raises(Unknown, match="there are mesh, service"):
        dump(snapshot, kind="secret")


def test_before_there_is_a_snapshot() -> None:
    assert [shard["key"] for shard in dump(None)["shards"]] == [SVID.key()]


def test_every_kind_of_shard_is_known() -> None:
    assert set(KINDS) == set(shard._KINDS)
