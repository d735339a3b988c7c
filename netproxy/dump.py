"""The effective configuration as JSON, for ``/config_dump``. No private key is ever in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from .config.shard import Shard, SvidShard, encode_shard
from .config.snapshot import Snapshot
from .errors import ConfigError

KINDS = ("mesh", "service", "external", "workload", "svid")
REDACTED = "[redacted]"


class Unknown(ConfigError):
    """Nothing has that kind or name."""


def config_dump(
    snapshot: Snapshot | None,
    shards: Mapping[str, Shard],
    versions: tuple[Mapping[str, str], Mapping[str, str]],
    *,
    kind: str = "",
    name: str = "",
) -> dict[str, Any]:
    """`versions` by key: what we published, what the supervisor holds and gives to every worker.

    `kind` is one of `KINDS`, `name` what follows it in the key (``shop/reviews``); with one of them only shards are
    told. Raises Unknown.
    """
    if kind and kind not in KINDS:
        raise Unknown(f"unknown kind {kind!r}, there are {', '.join(KINDS)}")
    published, held = versions
    found = []
    for key in sorted(published.keys() | held.keys()):
        of_kind, _, of_name = key.partition("/")
        if kind in ("", of_kind) and name in ("", of_name):
            shard = shards.get(key)
            found.append(
                {
                    "key": key,
                    "version": published.get(key, ""),
                    "held": held.get(key, ""),
                    # None: it is of the brain before this one, and only the supervisor still has it.
                    "body": None if shard is None else json.loads(encode_shard(_redacted(shard))),
                }
            )
    if name and not found:
        raise Unknown(f"no {kind or 'object'} is called {name}")
    if kind or name or snapshot is None:
        return {"shards": found}
    return {
        "shards": found,
        "local_workloads": [asdict(item) for item in snapshot.local_workloads],
        "vip_networks": list(snapshot.vip_networks),
        "vips": {key: list(vips) for key, vips in snapshot.vips.items()},
        "steering": snapshot.steering,
        "last_good": list(snapshot.kept),
        "rejected": [str(error) for error in snapshot.rejected],
        "objects": statuses(snapshot),
    }


def _redacted(shard: Shard) -> Shard:
    return replace(shard, key_pem=REDACTED) if isinstance(shard, SvidShard) else shard


def statuses(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Every object with its place and conditions."""
    return [
        {
            "object": status.obj,
            "file": status.file,
            "line": status.line,
            "conditions": [
                {"type": c.type, "status": c.status, "reason": c.reason, "message": c.message}
                for c in status.conditions
            ],
        }
        for status in snapshot.statuses.values()
    ]
