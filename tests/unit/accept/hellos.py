"""Real ClientHellos, made by OpenSSL in memory."""

from __future__ import annotations

import functools
import ssl


@functools.cache
def client_hello(sni: str = "", alpn: tuple[str, ...] = ()) -> bytes:
    """The first flight: one or more TLS records."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=sni or None)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return out.read()


def in_records(hello: bytes, size: int) -> bytes:
    """The same handshake message, cut into records of at most `size` octets."""
    message = hello[5:]
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)
