"""TLS sessions that may be resumed: what a client keeps of them, and until when they may be used.

A resumed handshake (RFC 8446 section 2.2, PSK with ECDHE, never 0-RTT) shows no certificate. So it stands for the
certificates of the full one before it, and must not do so for longer than they would stand for themselves:

* A session ends with its ticket, our certificate, the peer's, and the root that the peer's leads to, whichever is
  first. The client does not offer it after that; the server looks again, since a client may do what it likes.
* It is bound to one SSL context at either end: a client's session is never offered by another one, and a server's
  ticket keys are the context's own. A context is made of one SVID and one trust bundle (`ContextCache`), so a renewed
  certificate, a root that was removed, another identity or trust domain begin with a full handshake.
* A ticket that came in a resumed connection is not kept: at the latest when the first one ends, both sides show their
  certificates and prove that they have the keys.

OpenSSL checks the chain in the full handshake only; that is why `proven_until` knows the bundle.
"""

from __future__ import annotations

import functools
import ssl
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from ..addr import EndpointAddr, SpiffeId
from ..config.shard import SvidShard
from ..errors import IdentityError
from .trust import parse_bundle, parse_certificates


@functools.lru_cache(maxsize=1024)
def proven_until(leaf_der: bytes, bundle_pem: str) -> float:
    """When a certificate or the root that signed it ends, Unix time; 0.0: no root of the bundle signed it itself.

    Of several such roots the one that lasts longest counts, as in a full handshake.
    """
    try:
        leaf = x509.load_der_x509_certificate(leaf_der)
        roots = parse_bundle(bundle_pem)
    except (ValueError, IdentityError):
        return 0.0
    until = 0.0
    for root in roots:
        try:
            leaf.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            continue
        until = max(until, root.not_valid_after_utc.timestamp())
    return min(until, leaf.not_valid_after_utc.timestamp())


def own_until(svid: SvidShard) -> float:
    """When what we show ends; 0.0 behind an intermediate CA, since the other side could not look again."""
    return min(svid.not_after, _chain_until(svid.chain_pem))


@functools.lru_cache(maxsize=1024)
def _chain_until(chain_pem: str) -> float:
    try:
        chain = parse_certificates(chain_pem)
    except IdentityError:
        return 0.0
    return chain[0].not_valid_after_utc.timestamp() if len(chain) == 1 else 0.0


class SessionKey(NamedTuple):
    svid: SvidShard
    alpn: tuple[str, ...]
    """What we offer. An application protocol is agreed on anew, but the session should lead to who speaks it."""
    peer: SpiffeId
    endpoint: EndpointAddr


class _Kept(NamedTuple):
    session: ssl.SSLSession
    context: ssl.SSLContext
    until: float


class Sessions:
    """A client's, least recently used dropped: 7 KiB each. `now` is Unix time, as certificates have it."""

    def __init__(self, limit: int, now: Callable[[], float]) -> None:
        self._limit = limit
        self._now = now
        self._kept: OrderedDict[SessionKey, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def offer(self, key: SessionKey, context: ssl.SSLContext) -> ssl.SSLSession | None:
        """The session to begin a connection with. It may be used more than once: who listens sees the addresses
        anyway, so a ticket used twice (RFC 8446 appendix C.4) tells nothing new."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.context is not context or kept.until <= self._now():
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return kept.session

    def keep(self, key: SessionKey, context: ssl.SSLContext, session: ssl.SSLSession, peer_der: bytes) -> None:
        """Of a full handshake in which the peer was found to be `key.peer`."""
        lifetime = min(session.timeout, session.ticket_lifetime_hint)
        until = min(session.time + lifetime, own_until(key.svid), proven_until(peer_der, key.svid.bundle_pem))
        if until <= self._now():
            return
        self._kept[key] = _Kept(session, context, until)
        self._kept.move_to_end(key)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def forget(self, key: SessionKey) -> None:
        self._kept.pop(key, None)

    def drop(self, gone: Callable[[SessionKey, ssl.SSLContext], bool]) -> None:
        for key in [key for key, kept in self._kept.items() if gone(key, kept.context)]:
            del self._kept[key]
