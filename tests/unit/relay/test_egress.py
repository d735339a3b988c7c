"""What leaves the mesh: from an accepted socket to what is dialled for it, and HTTP requests to outside."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import Sequence

import pytest

from netproxy.accept.listener import Accepted
from netproxy.addr import ClientAddr, OriginalDst, ServiceKey, WorkloadKey
from netproxy.arena import EVENT_COUNT, EVENTS
from netproxy.config.shard import (
    Backend,
    Endpoint,
    ExternalHost,
    ExternalPort,
    ExternalShard,
    MeshShard,
    Rule,
    ServicePort,
    ServiceShard,
    WorkloadShard,
)
from netproxy.decide.egress import UNKNOWN
from netproxy.errors import Reason, UpstreamError
from netproxy.identity.tls import ContextCache
from netproxy.relay.egress import MAX_TRIES, Targets
from netproxy.relay.serve import Server
from tests.unit.accept.hellos import client_hello

from .streams import CLIENT, FakeStream, World, facts_with, play, turns

VIP, ANY, IN_NETWORK = "240.240.0.9", "203.0.113.9", "198.51.100.7"
PORTS = (ExternalPort(443, "", "tls"), ExternalPort(80, "", "http", 8080), ExternalPort(5432, "", "tcp"))
ONE = ExternalShard("shop", "one", (ExternalHost("one.example", (VIP,)), ExternalHost("*.one.example")), (), PORTS)
NET = ExternalShard("shop", "net", (), ("198.51.100.0/24",), PORTS)
ALLOW = MeshShard(detect_timeout_s=0.005)
DENY = dataclasses.replace(ALLOW, outbound_policy="deny")
GET = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class FakeResolver:
    """Names by table; counts what it was asked."""

    def __init__(self, names: dict[tuple[str, int], Sequence[str]] | None = None) -> None:
        self.names = names or {("one.example", 4): ["192.0.2.1"], ("a.one.example", 4): ["192.0.2.2"]}
        self.asked: list[tuple[str, int]] = []

    async def resolve(self, workload: WorkloadKey, name: str, family: int) -> Sequence[str]:
        assert workload == CLIENT
        self.asked.append((name, family))
        await asyncio.sleep(0)
        if (name, family) not in self.names:
            raise UpstreamError(Reason.DNS_FAILED, f"{name} does not exist")
        return self.names[name, family]


class Outside(World):
    def __init__(self, mesh: MeshShard = ALLOW, *shards: ExternalShard) -> None:
        super().__init__(mesh)
        for shard in shards or (ONE, NET):
            self.tables.put(shard)
        self.resolver = FakeResolver()
        self.services.resolver = self.resolver
        self.server = Server(self.services, ContextCache())

    def event(self, name: str, detail: str) -> int:
        arena = self.recorder.arena
        return arena.cells[arena.row(EVENTS, (name, detail)) + EVENT_COUNT]

    @property
    def dialled(self) -> list[str]:
        return [str(dial.endpoint) for dial in self.dialer.dials]

    async def call(self, host: str, port: int, first: bytes, families: tuple[int, ...] = (4,)) -> socket.socket:
        """A connection that was accepted and has said `first`; the client's end."""
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
        listener.close()
        client.sendall(first)
        for end in (client, sock):
            end.setblocking(False)
        dst = OriginalDst(host, port)
        accepted = Accepted(sock, CLIENT, False, ClientAddr("10.0.0.9", 40000), dst)
        self.task = asyncio.ensure_future(self.server.serve(accepted, frozenset(families)))
        return client

    async def outcome(self, client: socket.socket) -> str:
        """What is dialled, ``http`` for an HTTP connection that has dialled nothing, or why it was refused."""
        async with asyncio.timeout(5):
            while not self.dialer.open and not self.services.live and not self.task.done():
                await asyncio.sleep(0.001)
        await turns(20)
        if self.dialer.open:
            return str(self.dialer.open[0].endpoint)
        if self.services.live:
            return "http"
        return self.recorder.connections[-1][0].name


def tls(sni: str = "") -> bytes:
    return client_hello(sni)


SMTP = b""  # silence
RAW = b"\x00\x01raw"
A_ONE, OTHER = GET % b"one.example", GET % b"other.example"


@pytest.mark.parametrize(
    ("policy", "host", "port", "first", "expected"),
    [
        # At the VIP of a host, whatever the policy.
        (None, VIP, 5432, SMTP, "192.0.2.1:5432"),
        (None, VIP, 443, tls("one.example"), "192.0.2.1:443"),
        (None, VIP, 443, tls("ONE.example"), "192.0.2.1:443"),
        (None, VIP, 443, tls(), "192.0.2.1:443"),
        (None, VIP, 443, tls("a.one.example"), "192.0.2.2:443"),
        (None, VIP, 443, tls("other.example"), "EGRESS_DENIED"),
        (None, VIP, 443, RAW, "EGRESS_DENIED"),
        (None, VIP, 443, SMTP, "EGRESS_DENIED"),
        (None, VIP, 443, A_ONE, "http"),
        (None, VIP, 80, A_ONE, "192.0.2.1:8080"),
        (None, VIP, 80, OTHER, "http"),
        (None, VIP, 80, SMTP, "http"),
        (None, VIP, 80, RAW, "EGRESS_DENIED"),
        (None, VIP, 80, tls("one.example"), "EGRESS_DENIED"),
        (None, VIP, 81, A_ONE, "NO_ROUTE"),
        # Within a network: the address that was dialled.
        (None, IN_NETWORK, 5432, SMTP, f"{IN_NETWORK}:5432"),
        (None, IN_NETWORK, 443, tls("any.example"), f"{IN_NETWORK}:443"),
        (None, IN_NETWORK, 80, OTHER, f"{IN_NETWORK}:80"),
        (None, IN_NETWORK, 80, SMTP, "http"),
        ("deny", IN_NETWORK, 443, RAW, "EGRESS_DENIED"),
        ("allow", IN_NETWORK, 443, RAW, f"{IN_NETWORK}:443"),
        ("deny", IN_NETWORK, 81, RAW, "EGRESS_DENIED"),
        # Anywhere, by the name: to where that is, not to the address.
        (None, ANY, 443, tls("one.example"), "192.0.2.1:443"),
        (None, ANY, 443, tls("a.one.example"), "192.0.2.2:443"),
        (None, ANY, 80, A_ONE, "192.0.2.1:8080"),
        # Anywhere.
        ("allow", ANY, 443, tls("other.example"), f"{ANY}:443"),
        ("allow", ANY, 443, tls(), f"{ANY}:443"),
        ("allow", ANY, 443, SMTP, f"{ANY}:443"),
        ("allow", ANY, 443, RAW, f"{ANY}:443"),
        ("allow", ANY, 80, OTHER, f"{ANY}:80"),
        ("allow", ANY, 22, SMTP, f"{ANY}:22"),
        ("deny", ANY, 443, tls("other.example"), "EGRESS_DENIED"),
        ("deny", ANY, 443, tls("xone.example"), "EGRESS_DENIED"),
        ("deny", ANY, 444, tls("one.example"), "EGRESS_DENIED"),
        ("deny", ANY, 443, tls(), "EGRESS_DENIED"),
        ("deny", ANY, 443, tls("one.example")[:40], "EGRESS_DENIED"),
        ("deny", ANY, 443, RAW, "EGRESS_DENIED"),
        ("deny", ANY, 443, A_ONE, "http"),
        ("deny", ANY, 80, OTHER, "http"),
        ("deny", ANY, 22, SMTP, "EGRESS_DENIED"),
        ("deny", ANY, 22, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http"),
    ],
)  # fmt: skip
def test_where_a_connection_goes(policy: str | None, host: str, port: int, first: bytes, expected: str) -> None:
    for mesh in (ALLOW, DENY):
        if policy in (None, mesh.outbound_policy):
            play(lambda mesh=mesh: goes(mesh, host, port, first, expected))  # type: ignore[misc]


async def goes(mesh: MeshShard, host: str, port: int, first: bytes, expected: str) -> None:
    world = Outside(mesh)
    client = await world.call(host, port, first)
    with client:
        assert await world.outcome(client) == expected
        for live in list(world.services.live):
            live.abort()
        for dial in world.dialer.open:
            dial.fail(Reason.INTERNAL)
        await world.task
    await turns()
    assert world.outstanding == 0
    assert world.event("egress_denied", "tls" if first[:1] == b"\x16" and len(first) > 50 else "tcp") == (
        expected == "EGRESS_DENIED"
    )
    if host == ANY and expected == f"{ANY}:443":
        assert world.event("egress_allowed", "tls") + world.event("egress_allowed", "tcp") == 1


def test_an_endpoint_of_a_service_is_known_without_a_workload() -> None:
    async def main() -> None:
        world = Outside(DENY)
        spec = ServicePort(80, "", "auto", (Endpoint(ANY, 5000),))
        for known in (True, False):
            world.tables.put(ServiceShard("shop", "headless", (), (spec,) if known else (), headless=True))
            client = await world.call(ANY, 5000, b"")
            with client:
                assert await world.outcome(client) == (f"{ANY}:5000" if known else "EGRESS_DENIED")
                for dial in world.dialer.open:
                    dial.fail()
                await world.task

    play(main)


def test_relayed_to_an_external_service_and_counted_as_such() -> None:
    async def main() -> None:
        world = Outside(DENY)
        client = await world.call(ANY, 443, tls("one.example"))
        with client:
            await world.outcome(client)
            upstream = world.dialer.open[0].accept()
            await world.task
            async with asyncio.timeout(5):
                while not upstream.sent:
                    await asyncio.sleep(0.001)
            assert upstream.take_sent() == tls("one.example")
            (relay,) = world.services.live
            assert "external/shop/one" in repr(vars(relay))
            relay.check(world.time)
            assert not upstream.closing
            # Just what the change forbids ends.
            world.tables.put(dataclasses.replace(ONE, ports=PORTS[1:]))
            relay.check(world.time)
            assert upstream.was_reset
            assert world.recorder.connections[-1][0] is Reason.EGRESS_DENIED
        await turns()
        assert not world.services.live
        assert world.outstanding == 0

    play(main)


def test_what_nobody_declared_ends_with_the_policy_that_allowed_it() -> None:
    async def main() -> None:
        world = Outside(ALLOW)
        for port in (22, 5432):
            client = await world.call(ANY, port, RAW)
            with client:
                await world.outcome(client)
                upstream = world.dialer.open[0].accept()
                await world.task
                (relay,) = world.services.live
                relay.check(world.time)
                world.tables.put(DENY)
                if port == 5432:
                    world.tables.put(dataclasses.replace(NET, networks=("203.0.113.0/24",)))
                relay.check(world.time)
                assert upstream.was_reset == (port == 22)
                relay.abort()
                await turns()
                world.tables.put(ALLOW)

    play(main)


@pytest.mark.parametrize("known", [True, False])
def test_what_the_mesh_has_by_now_stays(known: bool) -> None:
    """The change that denies the unknown also says what the address is."""

    async def main() -> None:
        world = Outside(ALLOW)
        client = await world.call(ANY, 22, RAW)
        with client:
            await world.outcome(client)
            upstream = world.dialer.open[0].accept()
            await world.task
            (relay,) = world.services.live
            spec = ServicePort(22, "", "auto", (Endpoint(ANY if known else "203.0.113.8", 22),))
            world.tables.put(ServiceShard("shop", "headless", (), (spec,), headless=True))
            world.tables.put(DENY)
            relay.check(world.time)
            assert upstream.was_reset is not known
            relay.abort()
            await turns()

    play(main)


# --- names and addresses


@pytest.mark.parametrize(
    ("names", "families", "expected"),
    [
        ({4: ["192.0.2.1"], 6: ["2001:db8::1"]}, (4, 6), ["192.0.2.1", "2001:db8::1"]),
        ({6: ["2001:db8::1"]}, (4, 6), ["2001:db8::1"]),
        ({4: ["192.0.2.1"]}, (6,), []),
        ({4: [f"192.0.2.{number}" for number in range(9)]}, (4,), ["192.0.2.0", "192.0.2.1", "192.0.2.2"]),
        ({4: ["192.0.2.1", "192.0.2.1"]}, (4,), ["192.0.2.1"]),
        ({4: ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", VIP, "192.0.2.1"]}, (4,), ["192.0.2.1"]),
        ({4: ["127.0.0.1"]}, (4,), []),
        (
            {6: ["::1", "::7f00:1", "64:ff9b::a9fe:a9fe", "fe80::1", "::", "64:ff9b::c000:201", "2001:db8::1"]},
            (6,),
            ["64:ff9b::c000:201", "2001:db8::1"],
        ),
        ({}, (4, 6), []),
    ],
)
def test_addresses_are_tried_one_after_the_other(
    names: dict[int, list[str]], families: tuple[int, ...], expected: list[str]
) -> None:
    async def main() -> None:
        world = Outside(DENY)
        world.resolver.names = {("one.example", family): found for family, found in names.items()}
        client = await world.call(ANY, 443, tls("one.example"), families)
        with client:
            for _ in expected:
                await world.outcome(client)
                world.dialer.open[0].fail(Reason.CONNECT_TIMEOUT)
                await turns()
            await world.task
        assert [dial.endpoint.host for dial in world.dialer.dials] == expected
        assert len(expected) <= MAX_TRIES
        assert world.recorder.connections[-1][0] is (Reason.CONNECT_TIMEOUT if expected else Reason.DNS_FAILED)
        assert world.outstanding == 0

    play(main)


def test_an_endpoint_without_its_identity_is_not_passed_over() -> None:
    async def main() -> None:
        world = Outside(DENY, dataclasses.replace(ONE, endpoints=("192.0.2.1", "192.0.2.2")))
        client = await world.call(ANY, 443, tls("one.example"))
        with client:
            await world.outcome(client)
            world.dialer.open[0].fail(Reason.IDENTITY_MISMATCH)
            await world.task
        assert len(world.dialer.dials) == 1
        assert world.recorder.connections[-1][0] is Reason.IDENTITY_MISMATCH
        assert world.resolver.asked == []

    play(main)


def test_endpoints_inside_of_the_mesh_are_reached_by_mesh_tls() -> None:
    async def main() -> None:
        world = Outside(DENY, dataclasses.replace(ONE, endpoints=("10.0.0.77",)))
        world.tables.put(WorkloadShard("shop", "w", ("10.0.0.77",), world.shard.identity, "w", meshed=True))
        client = await world.call(ANY, 443, tls("one.example"))
        with client:
            await world.outcome(client)
            (dial,) = world.dialer.open
            assert dial.tls == (world.shard.identity, world.shard.identity, ("netproxy/tcp",))
            dial.fail()
            await world.task

    play(main)


def test_without_a_resolver_names_fail() -> None:
    async def main() -> None:
        world = Outside(DENY)
        world.services.resolver = None
        client = await world.call(VIP, 5432, b"")
        with client:
            await world.task
        assert world.recorder.connections[-1][0] is Reason.DNS_FAILED

    play(main)


def test_without_an_address_of_its_own_nothing_is_asked() -> None:
    async def main() -> None:
        world = Outside(DENY)
        client = await world.call(VIP, 5432, b"", ())
        with client:
            await world.task
        assert world.recorder.connections[-1][0] is Reason.CONNECT_FAILED
        assert world.resolver.asked == []

    play(main)


def test_the_connect_timeout_is_shared() -> None:
    async def main() -> None:
        world = Outside(DENY)
        world.resolver.names = {("one.example", 4): ["192.0.2.1", "192.0.2.2"]}
        permission = world.tables.egress.tls((ANY, 443), "one.example")
        assert permission is not None
        facts = facts_with(world.facts(), port=None, dst=OriginalDst(ANY, 443), families=frozenset((4,)))
        targets = Targets(world.services, facts, permission)
        await targets.next()
        assert targets.connect_s() == pytest.approx(2.5)
        world.time += 1.0
        await targets.next()
        assert targets.connect_s() == pytest.approx(4.0)
        assert await targets.next() is None
        alone = Targets(world.services, facts_with(facts, dst=OriginalDst(ANY, 22)), UNKNOWN)
        await alone.next()
        assert alone.connect_s() == pytest.approx(5.0)

    play(main)


# --- HTTP


class Called(Outside):
    """An HTTP connection that leaves the mesh."""

    def __init__(self, mesh: MeshShard = DENY, host: str = ANY, *shards: ExternalShard) -> None:
        super().__init__(mesh, *shards)
        dst = OriginalDst(host, 80)
        egress = self.tables.egress.at_vip(*dst) or UNKNOWN
        facts = facts_with(self.facts(), port=None, dst=dst, egress=egress)
        self.client, self.connection = self.connect(facts)

    async def served(self, host: bytes, endpoint: str) -> FakeStream:
        self.client.peer_sends(GET % host)
        await turns(10)
        (dial,) = self.dialer.open
        assert str(dial.endpoint) == endpoint
        upstream = dial.accept()
        await turns()
        assert upstream.take_sent() == b"GET / HTTP/1.1\r\nhost: %b\r\n\r\n" % host
        upstream.peer_sends(OK)
        assert self.client.take_sent() == OK
        return upstream

    def problem(self) -> dict[str, object]:
        head, _, body = self.client.take_sent().partition(b"\r\n\r\n")
        fields = json.loads(body)
        assert head.startswith(b"HTTP/1.1 %d " % fields["status"])
        assert isinstance(fields, dict)
        return fields


def test_each_request_of_a_connection_is_decided_by_its_own_host() -> None:
    async def main() -> None:
        world = Called()
        first = await world.served(b"one.example", "192.0.2.1:8080")
        await world.served(b"a.one.example", "192.0.2.2:8080")
        assert world.recorder.entries[0].parties.destination_service == "external/shop/one"
        world.client.peer_sends(GET % b"evil.example:80")
        problem = world.problem()
        assert (problem["status"], problem["reason"]) == (502, "EGRESS_DENIED")
        detail = str(problem["detail"])
        assert "hosts: [evil.example]" in detail
        assert "{port: 80, protocol: HTTP}" in detail
        assert "outboundPolicy: allow" in detail
        assert not world.client.closing
        # And the connection to the first one is used again.
        world.client.peer_sends(GET % b"one.example")
        await turns(10)
        assert first.take_sent()
        first.peer_sends(OK)
        assert world.client.take_sent() == OK
        assert world.event("egress_denied", "http") == 1
        world.assert_idle()

    play(main)


def test_the_authority_of_the_target_is_what_counts() -> None:
    async def main() -> None:
        world = Called()
        world.client.peer_sends(b"GET http://evil.example/ HTTP/1.1\r\nHost: one.example\r\n\r\n")
        assert "hosts: [evil.example]" in str(world.problem()["detail"])
        world.client.peer_sends(b"GET http://one.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        await turns(10)
        upstream = world.dialer.open[0].accept()
        await turns()
        assert upstream.take_sent() == b"GET / HTTP/1.1\r\nhost: one.example\r\n\r\n"
        upstream.peer_sends(OK)
        assert world.client.take_sent() == OK
        world.client.peer_sends(b"CONNECT evil.example:80 HTTP/1.1\r\nHost: one.example\r\n\r\n")
        assert "hosts: [evil.example]" in str(world.problem()["detail"])
        world.assert_idle()

    play(main)


@pytest.mark.parametrize("fields", [b"Host: one.example\r\nHost: one.example", b"Host: one.example, evil.example"])
def test_two_hosts_are_none(fields: bytes) -> None:
    async def main() -> None:
        world = Called()
        world.client.peer_sends(b"GET / HTTP/1.1\r\n%b\r\n\r\n" % fields)
        assert world.problem()["status"] in (400, 502)
        assert not world.dialer.dials

    play(main)


def test_a_host_that_is_no_name_is_told_how_to_be_allowed() -> None:
    async def main() -> None:
        world = Called()
        world.client.peer_sends(GET % b"203.0.113.9")
        assert "addresses: [203.0.113.9]" in str(world.problem()["detail"])
        world.assert_idle()

    play(main)


def test_at_a_vip_the_host_must_be_its_own() -> None:
    async def main() -> None:
        for mesh in (ALLOW, DENY):
            world = Called(mesh, VIP)
            await world.served(b"one.example", "192.0.2.1:8080")
            world.client.peer_sends(GET % b"evil.example")
            problem = world.problem()
            assert problem["reason"] == "EGRESS_DENIED"
            assert "is the address of one.example" in str(problem["detail"])
            assert problem["decided_by"] == "ExternalService shop/one"
            world.client.peer_sends(b"GET / HTTP/1.0\r\n\r\n")
            await turns(10)
            kept = world.dialer.dials[0].answer.result()
            assert isinstance(kept, FakeStream)
            assert kept.take_sent() == b"GET / HTTP/1.1\r\nhost: one.example\r\n\r\n"
            kept.peer_sends(OK)
            world.tables.drop("external/shop/one")

    play(main)


def test_a_vip_that_is_gone_leads_nowhere() -> None:
    async def main() -> None:
        world = Called(ALLOW, VIP)
        await world.served(b"one.example", "192.0.2.1:8080")
        world.tables.drop("external/shop/one")
        world.client.peer_sends(GET % b"one.example")
        assert world.problem()["reason"] == "EGRESS_DENIED"
        world.assert_idle()

    play(main)


def test_a_port_that_is_declared_otherwise() -> None:
    async def main() -> None:
        world = Called(DENY, VIP, dataclasses.replace(ONE, ports=(ExternalPort(80, "", "tls"),)))
        world.client.peer_sends(GET % b"one.example")
        assert "port 80 of ExternalService shop/one is declared as tls" in str(world.problem()["detail"])

    play(main)


def test_what_nobody_declared_goes_to_the_address_under_allow() -> None:
    async def main() -> None:
        world = Called(ALLOW)
        await world.served(b"evil.example", f"{ANY}:80")
        assert world.recorder.entries[0].parties.destination_service == ""
        assert world.event("egress_allowed", "http") == 1
        world.tables.put(DENY)
        world.client.peer_sends(GET % b"evil.example")
        assert world.problem()["reason"] == "EGRESS_DENIED"
        world.assert_idle()

    play(main)


@pytest.mark.parametrize("started", [False, True])
def test_a_request_under_way_ends_when_it_is_forbidden(started: bool) -> None:
    async def main() -> None:
        world = Called(ALLOW)
        world.client.peer_sends(GET % b"one.example")
        await turns(10)
        upstream = world.dialer.open[0].accept()
        await turns()
        if started:
            upstream.peer_sends(OK[:-1])
            world.client.take_sent()
        world.check(0.5)
        assert not upstream.closing
        world.tables.drop("external/shop/one")
        world.check(0.5)
        assert upstream.was_reset
        if started:
            assert world.client.was_reset
        else:
            assert world.problem()["reason"] == "EGRESS_DENIED"
        await turns()
        world.assert_idle()

    play(main)


def test_a_tunnel_ends_when_it_is_forbidden() -> None:
    async def main() -> None:
        world = Called()
        world.client.peer_sends(
            b"GET / HTTP/1.1\r\nHost: one.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        await turns(10)
        upstream = world.dialer.open[0].accept()
        await turns()
        upstream.peer_sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        world.client.peer_sends(b"ping")
        assert upstream.take_sent().endswith(b"ping")
        world.check(0.5)
        world.tables.put(MeshShard(outbound_policy="deny", via="x"))
        world.check(0.5)
        assert not upstream.closing
        world.tables.put(dataclasses.replace(ONE, ports=PORTS[:1]))
        world.check(0.5)
        assert upstream.was_reset
        assert world.client.was_reset
        assert world.recorder.entries[-1].reason is Reason.EGRESS_DENIED
        await turns()
        world.assert_gone()

    play(main)


def test_the_next_address_and_the_body_that_waited() -> None:
    async def main() -> None:
        world = Called()
        world.resolver.names = {("one.example", 4): ["192.0.2.1", "192.0.2.2"]}
        world.client.peer_sends(b"POST / HTTP/1.1\r\nHost: one.example\r\nContent-Length: 3\r\n\r\nabc")
        await turns(10)
        world.dialer.open[0].fail()
        await turns(10)
        (dial,) = world.dialer.open
        assert dial.endpoint.host == "192.0.2.2"
        upstream = dial.accept()
        await turns()
        sent = upstream.take_sent()
        assert sent.count(b"POST / HTTP/1.1\r\n") == 1
        assert sent.endswith(b"\r\n\r\nabc")
        upstream.peer_sends(OK)
        assert world.client.take_sent() == OK
        world.assert_idle()

    play(main)


def test_all_addresses_fail() -> None:
    async def main() -> None:
        world = Called()
        world.resolver.names = {("one.example", 4): ["192.0.2.1", "192.0.2.2"]}
        world.client.peer_sends(GET % b"one.example")
        for _ in range(2):
            await turns(10)
            world.dialer.open[0].fail()
        await turns(10)
        problem = world.problem()
        assert (problem["status"], problem["reason"]) == (503, "CONNECT_FAILED")
        assert problem["decided_by"] == "ExternalService shop/one"
        world.assert_idle()

    play(main)


def test_a_name_that_does_not_resolve() -> None:
    async def main() -> None:
        world = Called()
        world.client.peer_sends(GET % b"b.one.example")
        await turns(10)
        problem = world.problem()
        assert (problem["status"], problem["reason"]) == (503, "DNS_FAILED")
        assert "b.one.example does not exist" in str(problem["detail"])
        assert not world.client.closing
        world.assert_idle()

    play(main)


def test_a_client_that_leaves_while_its_name_is_looked_up() -> None:
    async def main() -> None:
        world = Called()
        world.client.peer_sends(GET % b"one.example")
        world.client.peer_resets()
        await turns(10)
        assert not world.dialer.dials
        assert world.ends == [(Reason.DOWNSTREAM_CLOSED, 0)]
        world.assert_gone()

    play(main)


# --- TCP by weight


def test_a_port_with_a_tcp_rule_is_relayed_whatever_it_carries() -> None:
    async def main() -> None:
        world = Outside(DENY)
        rule = Rule("TCPRoute shop/db rule 0", (), (Backend(ServiceKey("shop/other"), 80),))
        spec = ServicePort(80, "", "auto", (Endpoint("10.0.0.1", 1),), tcp_rule=rule)
        world.tables.put(ServiceShard("shop", "db", ("240.240.0.8",), (spec,)))
        client = await world.call("240.240.0.8", 80, A_ONE)
        with client:
            assert await world.outcome(client) == "10.0.0.2:8080"
            world.dialer.open[0].fail()
            await world.task
        world.tables.put(
            ServiceShard("shop", "db", ("240.240.0.8",), (dataclasses.replace(spec, tcp_rule=Rule("r", (), ())),))
        )
        client = await world.call("240.240.0.8", 80, A_ONE)
        with client:
            assert await world.outcome(client) == "BACKEND_INVALID"

    play(main)
