"""What requests and connections tell the access log at their end."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest

from netproxy.accept.listener import Accepted
from netproxy.addr import ClientAddr, OriginalDst, SpiffeId, WorkloadKey
from netproxy.config.shard import AccessLog, Endpoint, MeshShard
from netproxy.decide.route import Choice
from netproxy.errors import Reason
from netproxy.identity.tls import ContextCache
from netproxy.observe.access import Entry
from netproxy.observe.record import Parties
from netproxy.relay.serve import Server
from netproxy.relay.tcp import TcpRelay

from .streams import CLIENT, WEB, FakeStream, Fixed, World, play, turns, web_shard

GET = (
    b"GET http://shop.example/web?a=b HTTP/1.1\r\nHost: web\r\nX-Request-Id: 11-22\r\n"
    b"User-Agent: probe\r\nX-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For: 192.0.2.2\r\n\r\n"
)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def test_a_request_of_the_client() -> None:
    async def main() -> None:
        world = World(MeshShard(mesh_http="http1"))
        meshed = Endpoint("10.0.0.1", 8080, True, WorkloadKey("shop/web-1"), SpiffeId("spiffe://x/web"), meshed=True)
        world.tables.put(web_shard((meshed,)))
        client, _ = world.connect()
        client.peer_sends(GET)
        world.time += 0.1
        upstream = await world.accept()
        world.time += 0.2
        upstream.peer_sends(OK[:-2])
        world.time += 0.3
        upstream.peer_sends(OK[-2:])
        (line,) = world.lines
        assert line == {
            "start_time": "1970-01-01T00:16:40.000Z",
            "node": "node-a",
            "reporter": "source",
            "workload": "shop/client",
            "protocol": "HTTP/1.1",
            "method": "GET",
            "path": "/web?a=b",
            "authority": "shop.example",
            "response_code": 200,
            "response_flags": "-",
            "response_code_details": "via_upstream",
            "reason": "OK",
            "bytes_received": 0,
            "bytes_sent": 2,
            "duration_ms": 600.0,
            "upstream_connect_ms": 100.0,
            "response_head_ms": 300.0,
            "upstream_request_attempt_count": 1,
            "upstream_connection_reused": False,
            "tls": "mutual_tls",
            "source": {"workload": "shop/client", "principal": world.shard.identity, "address": "10.0.0.9:40000"},
            "destination": {
                "workload": "shop/web-1",
                "principal": "spiffe://x/web",
                "service": "shop/web",
                "address": "10.0.0.1:8080",
            },
            "original_destination": "240.240.0.1:80",
            "route_name": "HTTPRoute shop/web rule 0",
            "request_id": "11-22",
            "user_agent": "probe",
            "x_forwarded_for": "192.0.2.1,192.0.2.2",
        }

    play(main)


def test_a_request_that_arrives() -> None:
    async def main() -> None:
        world = World()
        facts = world.facts(inbound=True)
        facts.peer = SpiffeId("spiffe://x/caller")
        client, _ = world.connect(facts)
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(OK)
        (line,) = world.lines
        assert (line["reporter"], line["workload"], line["tls"]) == ("destination", "shop/client", "mutual_tls")
        assert line["source"]["principal"] == "spiffe://x/caller"
        assert line["destination"] == {
            "workload": "shop/client",
            "principal": world.shard.identity,
            "address": "240.240.0.1:80",
        }
        assert "route_name" not in line

    play(main)


def test_an_id_of_ours_and_a_replay() -> None:
    async def main() -> None:
        world = World()
        world.services.stamps = Fixed(b"made-here")
        client, _ = world.connect()
        request = b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n"
        client.peer_sends(request)
        (await world.accept()).peer_sends(OK)
        first = next(iter(world.pool._idle.values()))[0][1]
        client.peer_sends(request)
        first.stream.peer_resets()
        await turns()
        (await world.accept()).peer_sends(OK)
        counts = [(line["upstream_request_attempt_count"], line["upstream_connection_reused"]) for line in world.lines]
        assert counts == [(1, False), (2, False)]
        assert {line["request_id"] for line in world.lines} == {"made-here"}

    play(main)


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (
            b"GET /missing HTTP/1.1\r\nHost: web\r\n\r\n",
            {
                "path": "/missing",
                "response_code": 404,
                "response_code_details": "route_not_found",
                "decided_by": "shop/web",
            },
        ),
        (
            b"GET /invalid HTTP/1.1\r\nHost: web\r\n\r\n",
            {"response_flags": "NC", "decided_by": "HTTPRoute shop/web rule 3", "detail": "no such port"},
        ),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", {"response_code": 400, "response_flags": "DPE"}),
        (
            b"POST /web HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            {"response_code": 400, "reason": "DOWNSTREAM_PROTOCOL"},
        ),
    ],
)
def test_refused_requests(octets: bytes, expected: dict[str, Any]) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(octets)
        await turns()
        (line,) = world.lines
        assert {name: line.get(name) for name in expected} == expected
        assert line["detail"]

    play(main)


@pytest.mark.parametrize(
    ("answer", "details", "status"),
    [
        (b"", "upstream_reset_before_response_started{connection_termination}", 502),
        (OK[:-1], "upstream_reset_after_response_started{connection_termination}", 200),
    ],
)
def test_an_upstream_that_breaks(answer: bytes, details: str, status: int) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        if answer:
            upstream.peer_sends(answer)
        upstream.peer_resets()
        await turns()
        (line,) = world.lines
        assert (line["response_code_details"], line["response_code"], line["response_flags"]) == (details, status, "UC")
        assert line["detail"].startswith("10.0.0.1:8080: ")

    play(main)


def test_a_tunnel_at_its_end() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(b"GET /web HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        upstream = await world.accept()
        upstream.peer_sends(b"HTTP/1.1 101 OK\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        client.peer_sends(b"abc")
        upstream.peer_sends(b"12")
        assert not world.lines
        world.time += 60
        client.peer_ends()
        upstream.peer_ends()
        (line,) = world.lines
        assert (line["response_code"], line["reason"], line["duration_ms"]) == (101, "OK", 60_000.0)
        assert (line["bytes_received"], line["bytes_sent"]) == (3, 2)

    play(main)


def test_an_opaque_connection() -> None:
    async def main() -> None:
        world = World()
        facts = world.facts()
        facts.began = world.time
        world.time += 1.5
        down, up = FakeStream(), FakeStream()
        state = world.port.endpoints[0]
        state.outstanding += 1
        parties = Parties("source", "shop/client", "spiffe://x", "shop/web-1", "shop/web")
        TcpRelay(
            down, up, world.services, facts=facts, choice=Choice(WEB, state, "", 0.0), parties=parties, security="none"
        )
        down.peer_sends(b"abc")
        up.peer_sends(b"12")
        down.peer_ends()
        up.peer_ends()
        (line,) = world.lines
        assert (line["protocol"], line["bytes_received"], line["bytes_sent"]) == ("TCP", 3, 2)
        assert (line["reason"], line["duration_ms"]) == ("OK", 1500.0)
        assert line["destination"]["address"] == "10.0.0.1:8080"

    play(main)


@pytest.mark.parametrize("inbound", [False, True])
def test_a_connection_that_is_one_too_many(inbound: bool) -> None:
    async def main() -> None:
        world = World(MeshShard(max_connections=0))
        near, far = socket.socketpair()
        accepted = Accepted(far, CLIENT, inbound, ClientAddr("10.0.0.9", 40000), OriginalDst("10.0.0.1", 80))
        await Server(world.services, ContextCache()).serve(accepted, frozenset((4,)))
        (line,) = world.lines
        assert (line["reason"], line["response_flags"], line["protocol"]) == ("OVERLOADED", "UO", "TCP")
        assert line["reporter"] == ("destination" if inbound else "source")
        assert line["original_destination"] == "10.0.0.1:80"
        near.close()

    play(main)


def test_nothing_is_formatted_that_nobody_wants() -> None:
    async def main() -> None:
        world = World()
        world.services.access.select(AccessLog(min_status=500))
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        world.services.access.log = unwanted  # type: ignore[method-assign]
        upstream.peer_sends(OK)
        assert world.ends == [(Reason.OK, 200)]
        world.services.access.select(AccessLog())
        client.peer_sends(b"GET /missing HTTP/1.1\r\nHost: web\r\n\r\n")
        assert world.ends[1:] == [(Reason.NO_ROUTE, 404)]

    def unwanted(entry: Entry) -> None:
        raise AssertionError(dataclasses.asdict(entry))

    play(main)
