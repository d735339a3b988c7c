"""What an HTTP/2 client and an HTTP/1.1 endpoint hear of each other is what was said and the documented edits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from netproxy.addr import OriginalDst
from netproxy.codec.events import Data, End, Trailers
from netproxy.config.shard import MeshShard
from tests.edits import (
    Fields,
    Leg,
    Message,
    edited_request_of_http2,
    edited_response_to_http2,
    request_octets,
)

from .h2_client import H2TestClient
from .streams import VIP, Fixed, World, play, web_shard
from .test_edits import DATE, OF_REQUESTS, PEER, XFCC, meshes, raw_response, responses

OF_HTTP2 = {
    **{name: OF_REQUESTS[name] for name in OF_REQUESTS if name not in (b"connection", b"keep-alive", b"upgrade")},
    b"te": [b"trailers"],
    b"cookie": [b"a=b", b"c=d", b""],
    b"expect": [b"100-continue"],
}
del OF_HTTP2[b"proxy-connection"]


@st.composite
def requests(draw: st.DrawFn) -> Message:
    method = draw(st.sampled_from([b"GET", b"HEAD", b"POST", b"DELETE", b"ODD"]))
    names = draw(st.lists(st.sampled_from(sorted(OF_HTTP2)), max_size=7))
    names = [name for at, name in enumerate(names) if name != b"expect" or name not in names[:at]]
    fields: Fields = [(name, draw(st.sampled_from(OF_HTTP2[name]))) for name in names]
    body = draw(st.sampled_from([b"", b"", b"x", bytes(300)]))
    trailers: Fields = []
    if body and draw(st.booleans()):
        fields.insert(draw(st.integers(0, len(fields))), (b"content-length", b"%d" % len(body)))
    elif body:
        trailers = draw(st.sampled_from([[], [(b"x-t", b"1")], [(b"x-netproxy-reason", b"UF"), (b"x-t", b"2")]]))
    target = draw(st.sampled_from([b"/web", b"/web//b?c=%20"]))
    return Message(fields, method, target, body=body, trailers=trailers)


@given(meshes, requests(), responses(), st.booleans())
def test_what_arrives_is_what_was_sent_and_the_documented_edits(
    mesh: MeshShard, request: Message, response: Message, inbound: bool
) -> None:
    leg = Leg(
        forwarded=mesh.forwarded,
        inbound=inbound,
        client=b"10.0.0.9" if inbound else b"",
        xfcc=XFCC if inbound else b"",
        dialled=VIP.encode(),
        request_id=b"id" if mesh.request_id else b"",
        date=DATE,
        via=mesh.via.encode(),
    )

    async def main() -> None:
        world = World(mesh)
        world.services.stamps = Fixed(b"id", date=DATE)
        world.tables.put(web_shard(http_version="1.1"))
        facts = world.facts(inbound=inbound)
        if inbound:
            facts.dst, facts.peer, facts.peer_sha256 = OriginalDst("10.0.0.1", 8080), PEER, "ab" * 32
            facts.as_http1 = True
        client = await H2TestClient.connect(world, facts)
        stream_id = client.ask(request.target, request.method, list(request.fields), None)
        if request.body:
            client.say(stream_id, Data(stream_id, request.body))
        if request.trailers:
            client.say(stream_id, Trailers(stream_id, request.trailers))
        client.say(stream_id, End(stream_id))
        await client.turn()
        upstream = await world.accept()
        edited = edited_request_of_http2(request, leg, b"web")
        assert upstream.take_sent() == request_octets(edited)

        to_head = request.method == b"HEAD"
        framing = response.get(b"content-length") or response.get(b"transfer-encoding")
        octets = raw_response(response)
        if to_head:
            octets = octets.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        upstream.peer_sends(octets)
        if not framing and not to_head and response.status not in (204, 304):
            upstream.peer_ends()
        answer = await client.answer(stream_id)
        # Either way an application answers, not another agent.
        expected = edited_response_to_http2(response, replace(request, version=b"2"), replace(leg, inbound=True))
        assert (answer.status, answer.headers, answer.ended) == (response.status, expected.fields, True)
        assert answer.body == (b"" if to_head or response.status in (204, 304) else response.body)
        assert answer.trailers == ([] if to_head else expected.trailers)

    play(main)
