"""Properties of HTTP/2: what one engine writes the other reads, whatever the pairing and however it is cut up."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netproxy.codec.events import Data, End, Event, Headers, Informational, RequestHead, ResponseHead, Trailers
from netproxy.codec.h2_reference import H2ReferenceClient, H2ReferenceServer
from netproxy.codec.strict import FORBIDDEN_TRAILERS

from .h2_frames import CLIENT_START, merged, play
from .playing import octets

native = pytest.importorskip("netproxy.codec.h2_native")
CLIENTS = (native.H2NativeClient, H2ReferenceClient)
SERVERS = (native.H2NativeServer, H2ReferenceServer)


@pytest.fixture(autouse=True, scope="module")
def engine() -> None:
    """Each test here has all engines."""


TCHARS = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
SPECIAL = {b"host", b"content-length", b"te", b"cookie", b"connection", b"upgrade", b"transfer-encoding", b"keep-alive"}
names = st.text(TCHARS, min_size=1, max_size=8).map(str.encode).filter(lambda name: name not in SPECIAL)
values = st.binary(max_size=20).map(lambda v: bytes(o for o in v if o == 9 or (o >= 32 and o != 127)).strip(b" \t"))
fields = st.lists(
    st.one_of(st.tuples(names, values), st.sampled_from([(b"cookie", b"a=b"), (b"accept", b"*/*"), (b"etag", b'"1"')])),
    max_size=4,
    unique_by=lambda field: field[0],
)
trailers = st.lists(st.tuples(names.filter(lambda name: name not in FORBIDDEN_TRAILERS), values), max_size=3)
bodies = st.lists(st.one_of(st.binary(min_size=1, max_size=20), st.just(b"x" * 20_000)), max_size=4)
methods = (
    st.text(TCHARS.upper(), min_size=1, max_size=8).map(str.encode).filter(lambda m: m not in (b"CONNECT", b"HEAD"))
)
targets = st.text([chr(o) for o in range(0x21, 0x7F) if chr(o) != "#"], max_size=12).map(lambda t: b"/" + t.encode())
HOST = (b"host", b"a.example:80")


class Message(NamedTuple):
    head: Any
    rest: list[Event]

    @property
    def events(self) -> list[Event]:
        return [self.head, *self.rest]


@st.composite
def contents(draw: st.DrawFn, stream_id: int) -> tuple[Headers, list[Event]]:
    parts = draw(bodies)
    framing = [(b"content-length", b"%d" % sum(map(len, parts)))] if draw(st.booleans()) else []
    rest: list[Event] = [Data(stream_id, part) for part in parts]
    if (last := draw(trailers)) and draw(st.booleans()):
        rest.append(Trailers(stream_id, last))
    return framing, [*rest, End(stream_id)]


@st.composite
def exchanges(draw: st.DrawFn, stream_id: int) -> tuple[Message, list[Event], Message]:
    framing, rest = draw(contents(stream_id))
    scheme = draw(st.sampled_from([b"http", b"https"]))
    head = RequestHead(
        stream_id, draw(methods), draw(targets), [HOST, *draw(fields), *framing], b"2", None, scheme, b""
    )
    request = Message(head, rest)
    first: list[Event] = [Informational(stream_id, 103, draw(fields)) for _ in range(draw(st.integers(0, 2)))]
    framing, rest = draw(contents(stream_id))
    status = draw(st.integers(200, 999).filter(lambda s: s not in (204, 304)))
    return request, first, Message(ResponseHead(stream_id, status, [*draw(fields), *framing], b"2"), rest)


def carry(source: Any, target: Any, sizes: list[int]) -> list[Event]:
    seen: list[Event] = []
    wire = b"".join(source.take_output())
    for size in sizes:
        if wire:
            seen += target.receive(wire[:size])
            wire = wire[size:]
    return seen + (list(target.receive(wire)) if wire else [])


def settle(client: Any, server: Any) -> dict[str, list[Event]]:
    """Carries octets until nobody has any. All content is credited."""
    seen: dict[str, list[Event]] = {"client": [], "server": []}
    for _ in range(100):
        before = sum(map(len, seen.values()))
        for name, source, target in (("server", client, server), ("client", server, client)):
            events = carry(source, target, [])
            for event in events:
                if isinstance(event, Data):
                    target.credit(event.stream_id, len(event.data))
            seen[name] += events
        if sum(map(len, seen.values())) == before:
            return seen
    raise AssertionError("they never come to rest")


def of_stream(events: list[Event], stream_id: int) -> list[Event]:
    return merged(
        event for event in events if getattr(event, "stream_id", 0) == stream_id and type(event).__name__ != "Writable"
    )


@settings(max_examples=60)
@given(
    st.tuples(*(exchanges(n) for n in (1, 3, 5))),
    st.sampled_from([(c, s) for c in CLIENTS for s in SERVERS]),
    st.lists(st.integers(0, 2), max_size=12),
)
def test_exchanges_of_every_pairing(
    all_three: tuple[tuple[Message, list[Event], Message], ...], kinds: tuple[type[Any], type[Any]], order: list[int]
) -> None:
    """Three streams at once, their content interleaved as `order` says."""
    client, server = kinds[0](), kinds[1]()
    settle(client, server)
    for request, _, _ in all_three:
        client.send(request.head.stream_id, request.head)
    seen = settle(client, server)["server"]
    waiting = [list(request.rest) for request, _, _ in all_three]
    for at in order:
        if waiting[at]:
            event = waiting[at].pop(0)
            client.send(event.stream_id, event)  # type: ignore[union-attr]
    for rest in waiting:
        for event in rest:
            client.send(event.stream_id, event)  # type: ignore[union-attr]
    seen += settle(client, server)["server"]
    for request, _, _ in all_three:
        assert of_stream(seen, request.head.stream_id) == merged(request.events)
    waiting = [[*first, *response.events] for _, first, response in all_three]
    for at in [*order, 0, 1, 2] * 12:
        if waiting[at]:
            event = waiting[at].pop(0)
            server.send(event.stream_id, event)  # type: ignore[union-attr]
    assert not any(waiting)
    seen = settle(client, server)["client"]
    for _, first, response in all_three:
        assert of_stream(seen, response.head.stream_id) == merged([*first, *response.events])
    assert client.open_streams == server.open_streams == 0
    assert client.statistics()["owed"] == server.statistics()["owed"] == 0


@settings(max_examples=40)
@given(exchanges(1), st.lists(st.integers(1, 40), max_size=12))
def test_cutting_up_changes_nothing(exchange: tuple[Message, list[Event], Message], sizes: list[int]) -> None:
    request = exchange[0]
    if any(isinstance(event, Data) and len(event.data) > 1000 for event in request.rest):
        return
    client, server = CLIENTS[0](), SERVERS[0]()
    settle(client, server)
    for event in request.events:
        client.send(1, event)
    wire = b"".join(client.take_output())
    results = []
    for parts in ([wire], octets(wire), [wire[i : i + 7] for i in range(0, len(wire), 7)]):
        for kind in SERVERS:
            engine = kind()
            engine.receive(CLIENT_START)
            results.append(play(engine, parts))
    assert all(result == results[0] for result in results)
    assert results[0].events == merged(request.events)


@settings(max_examples=60)
@given(st.lists(fields, min_size=1, max_size=5))
def test_tables_stay_in_step(blocks: list[Headers]) -> None:
    for client_kind in CLIENTS:
        for server_kind in SERVERS:
            client, server = client_kind(), server_kind()
            settle(client, server)
            for some in blocks:
                stream_id = client.next_stream_id
                client.send(stream_id, RequestHead(stream_id, b"GET", b"/", [HOST, *some]))
                client.send(stream_id, End(stream_id))
                head = carry(client, server, [])[0]
                assert isinstance(head, RequestHead) and head.headers == [HOST, *some]
                server.send(stream_id, ResponseHead(stream_id, 200, some))
                server.send(stream_id, End(stream_id))
                assert carry(server, client, [])[0] == ResponseHead(stream_id, 200, some, b"2")


def test_large_heads_of_every_pairing() -> None:
    big = [(b"x-%d" % at, b"v" * 900) for at in range(60)]
    for client_kind in CLIENTS:
        for server_kind in SERVERS:
            client, server = client_kind(), server_kind()
            settle(client, server)
            client.send(1, RequestHead(1, b"GET", b"/", [HOST, *big]))
            client.send(1, End(1))
            assert carry(client, server, [])[0] == RequestHead(1, b"GET", b"/", [HOST, *big], b"2", None, b"http")
