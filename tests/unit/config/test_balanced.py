"""Which service ports need no proxy."""

from __future__ import annotations

import pytest

from netproxy.addr import SpiffeId, WorkloadKey
from netproxy.config.balanced import BalancedPort, balanced_ports, why_proxied
from netproxy.config.shard import Backend, Endpoint, Rule, ServicePort, ServiceShard
from tests.unit.config.meshes import attached, build, service, workload

PLAIN = (Endpoint("10.0.0.1", 5432), Endpoint("10.0.0.2", 5432, ready=False), Endpoint("fd00::1", 5432))
MESHED = Endpoint("10.0.0.3", 5432, True, WorkloadKey("shop/db-3"), SpiffeId("spiffe://a/b"), True)
ROUTE = Rule("TCPRoute shop/db rule 0", (), (Backend("shop/other", 1),))  # type: ignore[arg-type]


def port(**changes: object) -> ServicePort:
    return ServicePort(**({"port": 5432, "name": "db", "protocol": "tcp", "endpoints": PLAIN} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"endpoints": ()}, ""),
        ({"protocol": "auto"}, "not declared to be opaque TCP"),
        ({"protocol": "http"}, "not declared to be opaque TCP"),
        ({"tcp_rule": ROUTE}, "TCPRoute shop/db rule 0 says"),
        ({"endpoints": (*PLAIN, MESHED)}, "10.0.0.3 of shop/db-3 takes mesh TLS"),
    ],
)
def test_why_a_port_needs_the_proxy(changes: dict[str, object], why: str) -> None:
    found = why_proxied(port(**changes))
    assert (found == "") == (why == "") and why in found
    balanced = balanced_ports([ServiceShard("shop", "db", ("240.240.0.1",), (port(**changes),))])
    assert bool(balanced) == (why == "")


def test_endpoints_are_ready_and_of_the_family_of_the_address() -> None:
    shard = ServiceShard("shop", "db", ("240.240.0.1", "fd00:240::1"), (port(), port(port=1, endpoints=PLAIN[:1])))
    v4, v6, other = balanced_ports([shard], {"shop/db"})  # type: ignore[arg-type]
    assert v4 == BalancedPort("shop/db", "240.240.0.1", 5432, (("10.0.0.1", 5432),), True)  # type: ignore[arg-type]
    assert v6.endpoints == (("fd00::1", 5432),)
    # Of the other port no endpoint has an address of IPv6: a proxy may reach it all the same.
    assert (other.address, other.port) == ("240.240.0.1", 1)
    nobody = ServiceShard("shop", "db", ("240.240.0.1", "fd00:240::1"), (port(endpoints=()),))
    assert [found.endpoints for found in balanced_ports([nobody])] == [(), ()]
    assert balanced_ports([ServiceShard("shop", "db", (), (port(),), headless=True)]) == ()


def test_of_a_mesh() -> None:
    ports = "{name: db, port: 5432, appProtocol: tcp}, {name: http, port: 80}, {name: other, port: 3306}"
    text = service("db", ports, "sessionAffinity: ClientIP, clusterIP: 240.240.0.1")
    found = build(text, workload("db-1", "10.0.0.1", app="db")).balanced
    assert [(one.port, one.endpoints, one.affinity) for one in found] == [
        (3306, (("10.0.0.1", 3306),), True),  # MeshConfig opaquePorts
        (5432, (("10.0.0.1", 5432),), True),
    ]
    assert build(text, attached("db-1", "10.0.0.1", app="db")).balanced == ()
