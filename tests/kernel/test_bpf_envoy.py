"""A proxy that knows nothing of us behind the hooks: Envoy, whose listener asks SO_ORIGINAL_DST as of netfilter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from redirect.bpf import Count, Hooks
from tests.kernel.test_bpf import MARK, bpffs, hooks, loaded, moved, peer_of, workload, world
from tests.kernel.test_steering import FAR, LOOPBACK, POD, World, exchange, pending, wait_for

__all__ = ["bpffs", "hooks", "loaded", "world"]

SOL_SOCKET, SO_MARK = 1, 36
FILTERS = "type.googleapis.com/envoy.extensions.filters"


def configuration(families: frozenset[int]) -> dict[str, Any]:
    """TCP to where each connection was to go. What it opens itself has the mark by which the hooks let it pass."""
    listener = {
        "listener_filters": [
            {"name": "dst", "typed_config": {"@type": f"{FILTERS}.listener.original_dst.v3.OriginalDst"}}
        ],
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "tcp",
                        "typed_config": {
                            "@type": f"{FILTERS}.network.tcp_proxy.v3.TcpProxy",
                            "stat_prefix": "out",
                            "cluster": "there",
                        },
                    }
                ]
            }
        ],
    }
    mark = {"level": SOL_SOCKET, "name": SO_MARK, "int_value": MARK, "state": "STATE_PREBIND"}
    cluster = {
        "name": "there",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "upstream_bind_config": {"socket_options": [mark]},
    }
    listeners = [
        {"name": f"out{family}", "address": {"socket_address": {"address": LOOPBACK[family], "port_value": 15001}}}
        | listener
        for family in sorted(families)
    ]
    return {"static_resources": {"listeners": listeners, "clusters": [cluster]}}


def start_envoy(world: World, folder: Path) -> None:
    spec = importlib.util.find_spec("envoy")
    assert spec is not None and spec.origin is not None
    program = Path(spec.origin).parent / "_bin" / "envoy"
    config = folder / "envoy.json"
    config.write_text(json.dumps(configuration(world.families)))
    log = world.stack.enter_context((folder / "envoy.log").open("wb"))
    command = [str(program), "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "-c", str(config)]
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{world.pod.name}", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )

    def stop() -> None:
        process.terminate()
        process.wait(10)

    world.stack.callback(stop)

    def listens() -> bool:
        assert process.poll() is None, (folder / "envoy.log").read_text()
        return world.pod.run("ss", "-Hltn").count(":15001") == len(world.families)

    wait_for(listens, "Envoy to listen")


def test_envoy_learns_where_a_connection_was_to_go(hooks: Hooks, world: World, tmp_path: Path) -> None:
    key = hooks.enrol_pod(world.pod.fd, workload(world, policy="closed", inbound=False))
    start_envoy(world, tmp_path)
    for family in sorted(world.families):
        near = world.far(family)
        other = world.far(family, 8081)
        for port, listener in ((8080, near), (8081, other)):
            client = world.connect(world.pod, family, FAR[family], port)
            server = world.accept(listener)
            assert peer_of(client) == (FAR[family], port)
            assert peer_of(server)[0] == POD[family]  # Envoy's own connection
            exchange(client, server)
            exchange(server, client)
        assert not pending(near) and not pending(other)
    each = 2 * len(world.families)
    assert moved(hooks, key) == {Count.STEERED: each, Count.BYPASS_PROXY: each}
