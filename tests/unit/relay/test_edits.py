"""What arrives behind two agents is what was sent and the documented edits, octet by octet: over generated messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.addr import OriginalDst, SpiffeId
from netproxy.config.shard import Endpoint, MeshShard, ServicePort, ServiceShard
from netproxy.identity.tls import ALPN_H2_HTTP1
from netproxy.relay.connection import HttpConnection
from netproxy.relay.downstream_h2 import Http2Downstream
from tests.edits import (
    Fields,
    Leg,
    Message,
    content,
    edited_request,
    edited_response,
    out_of_http2,
    request_octets,
    response_octets,
    through_http2,
)

from .streams import VIP, FakeStream, Fixed, World, play, turns

PEER = SpiffeId("spiffe://cluster.local/ns/shop/sa/peer")
XFCC = b"By=spiffe://cluster.local/ns/shop/sa/client;Hash=" + b"ab" * 32 + b";URI=" + PEER.encode()
DATE = b"Wed, 25 Nov 2026 07:00:00 GMT"


def legs_of(mesh: MeshShard) -> tuple[Leg, Leg]:
    """What the two agents of `through` do: the caller's, and the other's."""
    both = Leg(mesh.header_case, mesh.forwarded, date=DATE, via=mesh.via.encode())
    ids = (b"id-out", b"id-in") if mesh.request_id else (b"", b"")
    out = Leg(**{**vars(both), "dialled": VIP.encode(), "request_id": ids[0]})
    into = {"inbound": True, "client": b"10.0.0.9", "xfcc": XFCC, "dialled": b"10.0.0.1:8080", "request_id": ids[1]}
    return out, Leg(**{**vars(both), **into})


class Path:
    """Client, its agent, the other agent and the application: `said` is what an end has received."""

    def __init__(self, mesh: MeshShard) -> None:
        self.out, self.into = World(mesh), World(mesh)
        for world, new in ((self.out, b"id-out"), (self.into, b"id-in")):
            world.services.stamps = Fixed(new, date=DATE)
        identity = SpiffeId("spiffe://cluster.local/ns/shop/sa/client")
        meshed = Endpoint("10.0.0.1", 8080, identity=identity, meshed=True)
        self.out.tables.put(ServiceShard("shop", "web", (VIP,), (ServicePort(80, "http", "http", (meshed,)),)))
        self.client, _ = self.out.connect(self.out.facts())
        self.between = FakeStream()
        self.middle: FakeStream | None = None
        self.app: FakeStream | None = None
        self.version = b"1.1"
        """Of HTTP between the agents."""

    async def ask(self, octets: bytes) -> bytes:
        self.client.peer_sends(octets)
        await turns(2)
        self.middle = await self.out.accept()
        facts = self.into.facts(inbound=True)
        facts.dst, facts.peer, facts.peer_sha256 = OriginalDst("10.0.0.1", 8080), PEER, "ab" * 32
        if self.middle.alpn == ALPN_H2_HTTP1:
            facts.as_http1 = True
            self.version = b"2"
            Http2Downstream(self.between, facts, self.into.services)
        else:
            HttpConnection(self.between, facts, self.into.services)
        await self.pump()
        self.app = await self.into.accept()
        return self.app.take_sent()

    async def pump(self) -> None:
        """What the agents say to each other arrives."""
        assert self.middle is not None
        while True:
            await turns()
            there, back = self.middle.take_sent(), self.between.take_sent()
            if not there and not back:
                return
            for stream, octets in ((self.between, there), (self.middle, back)):
                if octets:
                    stream.peer_sends(octets)

    async def answer(self, octets: bytes, *, ends: bool) -> bytes:
        assert self.app is not None and self.middle is not None
        self.app.peer_sends(octets)
        if ends:
            self.app.peer_ends()
        await self.pump()
        return self.client.take_sent()


def raw_request(message: Message) -> bytes:
    head = b"%b %b HTTP/%b\r\n" % (message.method, message.target, message.version)
    return head + raw_fields(message.fields) + content(message)


def raw_response(message: Message) -> bytes:
    head = b"HTTP/%b %d Odd reason\r\n" % (message.version, message.status)
    return head + raw_fields(message.fields) + (b"" if message.status in (204, 304) else content(message))


def raw_fields(fields: Fields) -> bytes:
    """With white space around values, of which nothing may be left."""
    return b"".join(name + b":\t " + value + b" \r\n" for name, value in fields) + b"\r\n"


# --- generated messages


def spelled(name: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from([name, name.title(), name.upper(), name[:1].upper() + name[1:]])


@st.composite
def some_fields(draw: st.DrawFn, pool: dict[bytes, list[bytes]]) -> Fields:
    names = draw(st.lists(st.sampled_from(sorted(pool)), max_size=7))
    return [(draw(spelled(name)), draw(st.sampled_from(pool[name]))) for name in names]


OF_BOTH = {
    b"x-a": [b"1", b"2", b"", b'"q, \t;"', b"\xff"],
    b"x-b": [b"3"],
    b"connection": [b"x-a", b"keep-alive, X-B", b"te", b"trailer", b"", b","],
    b"keep-alive": [b"timeout=5"],
    b"proxy-connection": [b"close"],
    b"te": [b"trailers", b"gzip, Trailers;q=0.5", b"gzip"],
    b"via": [b"1.0 first", b""],
    b"date": [b"yesterday"],
    b"trailer": [b"x-t"],
    b"http2-settings": [b"AAA"],
    b"x-netproxy-reason": [b"NR"],
}
OF_REQUESTS = {
    **OF_BOTH,
    b"upgrade": [b"x/1", b"h2c", b"websocket, HTTP/2.0, TLS/1.0, y", b""],
    b"x-forwarded-for": [b"192.0.2.1", b"a, b", b""],
    b"x_forwarded_for": [b"192.0.2.2"],
    b"x-forwarded_proto": [b"https"],
    b"x-forwarded-proto": [b"https"],
    b"x-forwarded-host": [b"h"],
    b"x-request-id": [b"mine", b""],
    b"x-forwarded-client-cert": [b"URI=evil"],
    b"x_forwarded-client.cert": [b"URI=evil"],
    b"cookie": [b"a=b"],
}


@st.composite
def requests(draw: st.DrawFn) -> Message:
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.0"]))
    method = draw(st.sampled_from([b"GET", b"HEAD", b"POST", b"OPTIONS", b"ODD"]))
    targets = [b"/", b"/a//b?c=%20", b"http://other:81", b"HTTP://other/x?y", b"http://other?z"]
    target = draw(st.sampled_from([*targets, *([b"*"] if method == b"OPTIONS" else [])]))
    fields = draw(some_fields(OF_REQUESTS))
    if version == b"1.1" or draw(st.booleans()):
        fields.insert(draw(st.integers(0, len(fields))), (draw(spelled(b"host")), b"web"))
    if draw(st.booleans()):
        fields.insert(draw(st.integers(0, len(fields))), (b"Connection", draw(st.sampled_from([b"Upgrade", b"close"]))))
    if version == b"1.0" and draw(st.booleans()):
        fields.append((b"Expect", draw(st.sampled_from([b"100-continue", b"anything"]))))
    return framed(draw, Message(fields, method, target, version=version), chunked=version == b"1.1")


@st.composite
def responses(draw: st.DrawFn) -> Message:
    status = draw(st.sampled_from([200, 200, 204, 304, 404, 426, 599]))
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.0"]))
    fields = draw(some_fields({**OF_BOTH, b"upgrade": [b"x/1", b"h2, y"], b"set-cookie": [b"a", b"b"]}))
    if draw(st.booleans()):
        fields.append((b"Connection", b"Upgrade"))
    message = Message(fields, status=status, version=version)
    if status in (204, 304):
        return message
    return framed(draw, message, chunked=version == b"1.1", until_close=True)


def framed(draw: st.DrawFn, message: Message, *, chunked: bool, until_close: bool = False) -> Message:
    kind = draw(st.sampled_from(["none", "length", "chunked"] if chunked else ["none", "length"]))
    body = draw(st.sampled_from([b"", b"x", b"0\r\n\r\n", bytes(300)]))
    if kind == "none":
        return replace(message, body=body if until_close else b"")
    trailers: Fields = []
    if kind == "length":
        frame = (draw(spelled(b"content-length")), b"%d" % len(body))
    else:
        frame = (draw(spelled(b"transfer-encoding")), draw(st.sampled_from([b"chunked", b"Chunked"])))
        trailers = draw(st.sampled_from([[], [(b"X-T", b"1")], [(b"x-netproxy-reason", b"UF"), (b"x-t", b"2")]]))
    fields = list(message.fields)
    fields.insert(draw(st.integers(0, len(fields))), frame)
    return replace(message, fields=fields, body=body, trailers=trailers)


meshes = st.builds(
    MeshShard,
    header_case=st.sampled_from(["lower", "preserve"]),
    forwarded=st.sampled_from(["append", "set", "preserve"]),
    request_id=st.booleans(),
    via=st.sampled_from(["", "mesh"]),
    mesh_http=st.sampled_from(["http1", "http2"]),
)


@given(meshes, requests(), responses())
def test_what_arrives_is_what_was_sent_and_the_documented_edits(
    mesh: MeshShard, request: Message, response: Message
) -> None:
    async def main() -> None:
        path = Path(mesh)
        out, into = legs_of(mesh)
        between = edited_request(request, out)
        arrived = await path.ask(raw_request(request))
        if path.version == b"2":
            was, between = between, through_http2(between)
            restored = out_of_http2(edited_request(between, into), was)
        else:
            restored = edited_request(between, into)
        assert arrived == request_octets(restored)
        to_head = request.method == b"HEAD"
        framing = response.get(b"content-length") or response.get(b"transfer-encoding")
        ends = not framing and not to_head and response.status not in (204, 304)
        octets = raw_response(response)
        if to_head:
            octets = octets.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        got = await path.answer(octets, ends=ends)
        passed = edited_response(response, between, into)
        if path.version == b"2":
            passed = through_http2(passed)
        assert got == response_octets(edited_response(passed, request, out), to_head=to_head)

    play(main)


@pytest.mark.parametrize("protocols", [b"h2c", b"TLS/1.0, HTTP/2.0", b"h2, H2C"])
def test_nothing_is_left_of_an_upgrade_that_is_between_two_hops(protocols: bytes) -> None:
    asks = [(b"Host", b"web"), (b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", protocols)]
    message = Message([*asks, (b"HTTP2-Settings", b"AAA")])
    assert edited_request(message, Leg()).fields == [(b"host", b"web")]

    async def main() -> None:
        mesh = MeshShard(forwarded="preserve", request_id=False)
        sent = await Path(mesh).ask(raw_request(message))
        assert sent == b"GET / HTTP/1.1\r\nhost: web\r\nx-forwarded-client-cert: " + XFCC + b"\r\n\r\n"

    play(main)


@pytest.mark.parametrize("mesh_http", ["http1", "http2"])
def test_a_head_that_is_as_large_as_it_may_be_passes_both_agents(mesh_http: str) -> None:
    fields = [(b"x-%d" % number, b"v" * 305) for number in range(200)]
    message = Message([(b"Host", b"web"), *fields])

    async def main() -> None:
        path = Path(MeshShard(mesh_http=mesh_http, request_id=False))  # type: ignore[arg-type]
        octets = raw_request(message)
        assert 62_000 < len(octets) < 65_536
        sent = await path.ask(octets)
        assert sent.count(b"v" * 305) == 200
        assert path.version == (b"2" if mesh_http == "http2" else b"1.1")

    play(main)
