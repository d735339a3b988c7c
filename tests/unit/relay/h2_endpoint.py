"""An endpoint that speaks HTTP/2: the far end of a `FakeStream`, played by the server engine."""

from __future__ import annotations

from collections.abc import Iterable

from netproxy.codec.events import Data, End, Event, Headers, RequestHead, ResponseHead, Trailers
from netproxy.codec.h2 import Code, H2Limits, H2Server, server_engine

from .streams import FakeStream, World, turns


class H2Endpoint:
    """`seen` is what came and was not taken yet. Content is credited when it is taken."""

    def __init__(self, stream: FakeStream, limits: H2Limits | None = None) -> None:
        self.stream = stream
        self.engine: H2Server = server_engine(limits)
        self.seen: list[Event] = []

    @classmethod
    async def accept(cls, world: World, limits: H2Limits | None = None) -> H2Endpoint:
        """The one open dial succeeds, and SETTINGS are exchanged."""
        endpoint = cls(await world.accept(), limits)
        await endpoint.turn()
        return endpoint

    async def turn(self) -> None:
        """What either side has said arrives, until nobody says any more."""
        await turns()
        while True:
            came = self.stream.take_sent()
            if came:
                self.seen += self.engine.receive(came)
            out = b"".join(self.engine.take_output())
            if out:
                self.stream.peer_sends(out)
            if not came and not out:
                return
            await turns()

    async def take(self, kind: type[Event] | None = None) -> list[Event]:
        """What came since, of one kind or all."""
        await self.turn()
        seen, self.seen = self.seen, []
        for event in seen:
            if isinstance(event, Data):
                self.engine.credit(event.stream_id, len(event.data))
        await self.turn()
        return [event for event in seen if kind is None or isinstance(event, kind)]

    async def requests(self) -> list[RequestHead]:
        return [event for event in await self.take() if isinstance(event, RequestHead)]

    async def request(self) -> RequestHead:
        (head,) = await self.requests()
        return head

    async def answer(
        self,
        stream_id: int,
        body: bytes = b"ok",
        status: int = 200,
        headers: Headers | None = None,
        trailers: Headers | None = None,
    ) -> None:
        await self.say(stream_id, ResponseHead(stream_id, status, headers or []))
        if body:
            await self.say(stream_id, Data(stream_id, body))
        if trailers:
            await self.say(stream_id, Trailers(stream_id, trailers))
        await self.say(stream_id, End(stream_id))

    async def say(self, stream_id: int, *events: Event) -> None:
        for event in events:
            self.engine.send(stream_id, event)
        await self.turn()

    async def reset(self, stream_id: int, code: int = Code.REFUSED_STREAM) -> None:
        self.engine.reset(stream_id, "no", code)
        await self.turn()


def heads(events: Iterable[Event]) -> list[RequestHead]:
    return [event for event in events if isinstance(event, RequestHead)]
