"""A client that speaks HTTP/2: the far end of a `FakeStream`, played by the client engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from netproxy.codec.events import Data, End, Event, Headers, Informational, RequestHead, Reset, ResponseHead, Trailers
from netproxy.codec.h2 import Code, H2Client, H2Limits, client_engine

from .streams import CountedHttp2, FakeStream, World, turns


@dataclass
class Answer:
    """What came of one request."""

    head: ResponseHead | None = None
    informational: list[tuple[int, Headers]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: Headers = field(default_factory=list)
    ended: bool = False
    reset: Reset | None = None

    @property
    def status(self) -> int:
        assert self.head is not None
        return self.head.status

    @property
    def headers(self) -> Headers:
        assert self.head is not None
        return self.head.headers

    @property
    def problem(self) -> dict[str, object]:
        found = json.loads(bytes(self.body))
        assert isinstance(found, dict)
        assert found["status"] == self.status
        return found


class H2TestClient:
    """Content is credited when it comes, unless `credits` is False: then it is `owed`."""

    __test__ = False

    def __init__(self, stream: FakeStream, connection: CountedHttp2, limits: H2Limits | None = None) -> None:
        self.stream = stream
        self.connection = connection
        self.engine: H2Client = client_engine(limits)
        self.answers: dict[int, Answer] = {}
        self.events: list[Event] = []
        self.credits = True
        self.owed: dict[int, int] = {}

    @classmethod
    async def connect(cls, world: World, facts: object = None, limits: H2Limits | None = None) -> H2TestClient:
        client = cls(*world.connect_http2(facts), limits)  # type: ignore[arg-type]
        await client.turn()
        return client

    def write(self) -> None:
        """What was said goes out."""
        out = b"".join(self.engine.take_output())
        if out:
            self.stream.peer_sends(out)

    async def turn(self) -> None:
        """What either side has said arrives, until nobody says any more."""
        await turns()
        while True:
            came = self.stream.take_sent()
            if came:
                self._take(self.engine.receive(came))
            out = b"".join(self.engine.take_output())
            if out:
                self.stream.peer_sends(out)
            if not came and not out:
                return
            await turns()

    def _take(self, events: object) -> None:
        for event in events:  # type: ignore[attr-defined]
            self.events.append(event)
            answer = self.answers.get(getattr(event, "stream_id", 0))
            if answer is None:
                continue
            if isinstance(event, ResponseHead):
                answer.head = event
            elif isinstance(event, Informational):
                answer.informational.append((event.status, event.headers))
            elif isinstance(event, Data):
                answer.body += event.data
                if self.credits:
                    self.engine.credit(event.stream_id, len(event.data))
                else:
                    self.owed[event.stream_id] = self.owed.get(event.stream_id, 0) + len(event.data)
            elif isinstance(event, Trailers):
                answer.trailers = event.headers
            elif isinstance(event, End):
                answer.ended = True
            elif isinstance(event, Reset):
                answer.reset = event

    def ask(
        self,
        target: bytes = b"/web",
        method: bytes = b"GET",
        headers: Headers | None = None,
        body: bytes | None = b"",
        *,
        protocol: bytes = b"",
    ) -> int:
        """`body` None: content follows."""
        stream_id = self.engine.next_stream_id
        is_tunnel = method == b"CONNECT" and not protocol
        fields = [(b"host", target if is_tunnel else b"web"), *(headers or [])]
        self.engine.send(
            stream_id, RequestHead(stream_id, method, target, fields, b"2", scheme=b"http", protocol=protocol)
        )
        self.answers[stream_id] = Answer()
        if body:
            self.engine.send(stream_id, Data(stream_id, body))
        if body is not None:
            self.engine.send(stream_id, End(stream_id))
        self.write()
        return stream_id

    def say(self, stream_id: int, *events: Event) -> None:
        for event in events:
            self.engine.send(stream_id, event)
        self.write()

    def reset(self, stream_id: int, code: int = Code.CANCEL) -> None:
        self.engine.reset(stream_id, "no", code)
        self.write()

    async def answer(self, stream_id: int) -> Answer:
        await self.turn()
        return self.answers[stream_id]
