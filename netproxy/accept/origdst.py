"""Where a steered connection was meant to go.

Outbound connections are redirected (destination NAT), so the kernel's connection tracking knows the
original destination: SO_ORIGINAL_DST (linux/netfilter_ipv4.h) and IP6T_SO_ORIGINAL_DST. Inbound ones come
by TPROXY, where the local address of the accepted socket is the original destination.
"""

from __future__ import annotations

import socket
import struct

from ..addr import OriginalDst, canonical_ip

_SO_ORIGINAL_DST = 80
_SOL_IPV6 = 41


def original_dst(sock: socket.socket) -> OriginalDst | None:
    """Of a redirected connection; None when it was not redirected but dialled the listener itself."""
    try:
        if sock.family == socket.AF_INET6:
            raw = sock.getsockopt(_SOL_IPV6, _SO_ORIGINAL_DST, 28)
            found = OriginalDst(canonical_ip(socket.inet_ntop(socket.AF_INET6, raw[8:24])), _port(raw))
        else:
            raw = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
            found = OriginalDst(socket.inet_ntop(socket.AF_INET, raw[4:8]), _port(raw))
    except OSError:
        # ENOENT: no tracked connection, ENOPROTOOPT: no connection tracking here at all.
        return None
    return None if found == local_dst(sock) else found


def _port(raw: bytes) -> int:
    return int(struct.unpack_from("!H", raw, 2)[0])


def local_dst(sock: socket.socket) -> OriginalDst:
    """Of a TPROXY connection. Raises OSError when the client is gone already."""
    host, port = sock.getsockname()[:2]
    return OriginalDst(canonical_ip(host), port)
