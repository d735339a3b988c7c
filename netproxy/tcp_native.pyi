import asyncio
import socket

from netproxy.stream import Sink, Stream

class TcpStream(Stream):
    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, sink: Sink | None = None, *, high_water: int = ...
    ) -> None: ...
