"""Traces of requests that pass an agent: what the endpoint sees, and the spans that are kept."""

from __future__ import annotations

from netproxy.config.shard import MeshShard
from netproxy.relay.trace import TraceIds

from ...edits import Leg, Message, edited_request, request_octets
from .streams import World, play

TRACE, CALLER, OURS = b"ab" * 16, b"cd" * 8, b"11" * 8
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


def world_with(percent: float) -> World:
    world = World(MeshShard(trace_percent=percent))
    world.services.trace_ids = TraceIds(lambda n: bytes([0x11]) * n)
    return world


async def sent_for(world: World, fields: list[tuple[bytes, bytes]]) -> bytes:
    """What the endpoint gets for a GET with these fields, which is answered."""
    client, _ = world.connect()
    client.peer_sends(request_octets(Message(fields=[(b"host", b"web"), *fields], target=b"/web/a?b")))
    upstream = await world.accept()
    sent = upstream.take_sent()
    upstream.peer_sends(OK)
    client.peer_ends()
    return sent


def expected(fields: list[tuple[bytes, bytes]], flags: bytes) -> bytes:
    leg = Leg(trace=(b"11" * 16, OURS, flags))
    return request_octets(edited_request(Message(fields=[(b"host", b"web"), *fields], target=b"/web/a?b"), leg))


def test_begun_and_sampled() -> None:
    async def main() -> None:
        world = world_with(100)
        assert await sent_for(world, []) == expected([], b"01")
        (span,) = world.services.spans.take()
        assert (span.trace_id, span.span_id, span.parent_id) == ("11" * 16, "11" * 8, "")
        assert (span.kind, span.name, span.duration_s) == ("client", "shop/web", 0.0)
        assert span.attributes == {
            "http.request.method": "GET",
            "url.path": "/web/a",
            "network.protocol.version": "1.1",
            "client.address": "10.0.0.9",
            "netproxy.source": "shop/client",
            "netproxy.destination": "shop/web-1",
            "netproxy.reason": "OK",
            "http.response.status_code": 200,
            "http.route": "HTTPRoute shop/web rule 0",
            "server.address": "10.0.0.1",
            "server.port": 8080,
        }

    play(main)


def test_begun_and_not_sampled() -> None:
    async def main() -> None:
        world = world_with(0)
        assert await sent_for(world, []) == expected([], b"00")
        assert not world.services.spans.take()

    play(main)


def test_continued_as_the_caller_decided() -> None:
    async def main() -> None:
        for flags, spans in ((b"01", 1), (b"00", 0)):
            world = world_with(50)
            fields = [(b"traceparent", b"-".join((b"00", TRACE, CALLER, flags))), (b"tracestate", b"a=b")]
            assert await sent_for(world, fields) == expected(fields, b"")
            kept = world.services.spans.take()
            assert [(span.trace_id, span.parent_id) for span in kept] == [(TRACE.decode(), CALLER.decode())] * spans

    play(main)


def test_b3_is_continued_in_its_own_form() -> None:
    async def main() -> None:
        world = world_with(0)
        sent = await sent_for(world, [(b"b3", b"-".join((TRACE, CALLER, b"1")))])
        assert b"\r\nb3: " + b"-".join((TRACE, OURS, b"1", CALLER)) + b"\r\n" in sent
        assert b"traceparent" not in sent
        assert len(world.services.spans) == 1

    play(main)


def test_without_tracing_the_fields_pass() -> None:
    async def main() -> None:
        world = world_with(-1)
        fields = [(b"traceparent", b"nonsense"), (b"b3", b"x")]
        message = Message(fields=[(b"host", b"web"), *fields], target=b"/web/a?b")
        assert await sent_for(world, fields) == request_octets(edited_request(message, Leg()))
        assert not len(world.services.spans)

    play(main)
