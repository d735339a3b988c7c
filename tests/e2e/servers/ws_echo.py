"""A WebSocket server that echoes messages, fragments as one message.

Usage: ``ws_echo.py PORT JOURNAL``. The text ``close CODE REASON`` closes with them. JOURNAL gets a line for each
connection that ended: the close code that was received and the reason.
"""

import asyncio
import os
import sys

from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

PORT, JOURNAL = int(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


async def echo(connection):
    try:
        while True:
            message = await connection.recv()
            if isinstance(message, str) and message.startswith("close "):
                _, code, reason = message.split(" ", 2)
                await connection.close(int(code), reason)
            else:
                await connection.send(message)
    except ConnectionClosed as exc:
        os.write(JOURNAL, f"{exc.rcvd.code if exc.rcvd else 1006} {exc.rcvd.reason if exc.rcvd else ''}\n".encode())


async def main():
    async with serve(echo, "0.0.0.0", PORT, max_size=8 << 20, compression=None, ping_interval=None):
        await asyncio.Event().wait()


asyncio.run(main())
