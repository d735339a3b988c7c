"""An HTTP/1.1 server that costs little and never loses patience.

Usage: ``patient.py PORT``. GET /big answers 32 MiB as fast as they are read; whatever has content-length is read to its
end; everything is answered with ``ok``.
"""

import asyncio
import re
import sys

OK = b"HTTP/1.1 200 OK\r\nDate: Wed, 25 Nov 2026 07:00:00 GMT\r\nContent-Length: 2\r\n\r\nok"
BIG = 32 << 20
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.I)


async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if length := LENGTH.search(head):
                left = int(length[1])
                while left:
                    data = await reader.read(min(left, 65536))
                    if not data:
                        return
                    left -= len(data)
            if head.startswith(b"GET /big "):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BIG)
                for _ in range(BIG >> 16):
                    writer.write(bytes(1 << 16))
                    await writer.drain()
            else:
                writer.write(OK)
                await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


asyncio.run(main())
