"""Resumed TLS sessions, OpenSSL at both ends: when they are, and all that makes a handshake a full one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from netproxy.addr import EndpointAddr, SpiffeId
from netproxy.config.shard import SvidShard
from netproxy.errors import IdentityError
from netproxy.identity.resume import SessionKey, own_until, proven_until
from netproxy.identity.spiffe import SpiffeVerifier
from netproxy.identity.svid import issue_svid
from netproxy.identity.tls import ALPN_HTTP1, ALPN_TCP, ContextCache, TlsStream
from netproxy.identity.trust import bundle_pem, parse_bundle, parse_certificates

from .ends import DAY_S, REVIEWS, WEB, Mesh, Recorder, run, tcp_pair

AT = EndpointAddr("10.0.0.1", 80)
HOUR_S = 3600.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    return Mesh(tmp_path_factory.mktemp("ca"))


class Node:
    """The contexts of a worker, its clock, and what it counted."""

    def __init__(self, **limits: int) -> None:
        self.ahead_s = 0.0
        self.counted: Counter[str] = Counter()
        self.contexts = ContextCache(now=lambda: time.time() + self.ahead_s, count=self._count, **limits)

    def _count(self, name: str, n: int, detail: str) -> None:
        assert name == "tls_handshakes"
        self.counted[detail] += n


class Pair:
    """A client's node and a server's, and the SVIDs they have now."""

    def __init__(self, mesh: Mesh, **limits: int) -> None:
        self.client, self.server = Node(**limits), Node()
        self.web, self.reviews = mesh.svid(WEB), mesh.svid(REVIEWS)
        self.verifier = SpiffeVerifier("cluster.local")

    def key(self, **change: Any) -> SessionKey:
        return SessionKey(self.web, (ALPN_HTTP1,), REVIEWS, AT)._replace(**change)

    async def open(self, key: SessionKey | None = None) -> tuple[TlsStream, TlsStream, SpiffeId]:
        """Both ends and who the client is. Raises what the server's end does, else what the client's does."""
        low = await tcp_pair()
        made = await asyncio.gather(
            self.client.contexts.connect(low[0], key or self.key(), 10),
            self.server.contexts.accept(low[1], self.reviews, self.verifier, 10),
            return_exceptions=True,
        )
        client, server = made
        if isinstance(server, BaseException) or isinstance(client, BaseException):
            for stream in low:
                stream.abort()
            raise server if isinstance(server, BaseException) else client  # type: ignore[misc]
        return client, *server

    async def call(self, key: SessionKey | None = None) -> bool:
        """A request and its answer, both ended by half-close. Whether the session was a resumed one."""
        client, server, peer = await self.open(key)
        assert peer == WEB
        assert client.resumed is server.resumed
        assert client.alpn == server.alpn == (key or self.key()).alpn[0]
        assert [server.peer_certificate_der()] == ders(self.web)
        assert [client.peer_certificate_der()] == ders(self.reviews)
        here, there = Recorder(), Recorder()
        client.sink, server.sink = here, there
        client.write(b"request")
        client.write_eof()
        await there.until(lambda r: r.eof)
        server.write(b"answer")
        server.write_eof()
        await here.until(lambda r: r.eof)
        assert (here.data, there.data) == (b"answer", b"request")
        client.close()
        server.close()
        await here.until_closed()
        await there.until_closed()
        return client.resumed


def ders(svid: SvidShard) -> list[bytes]:
    from cryptography.hazmat.primitives.serialization import Encoding

    return [certificate.public_bytes(Encoding.DER) for certificate in parse_certificates(svid.chain_pem)]


def both(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run("uvloop", main)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_second_handshake_is_resumed_and_both_know_the_peer(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        assert [await pair.call() for _ in range(4)] == [False, True, True, True]
        assert pair.client.counted == {"client/full": 1, "client/resumed": 3}
        assert pair.server.counted == {"server/full": 1, "server/resumed": 3}

    run(loop, main)


def test_only_to_the_same_endpoint_peer_and_protocol(mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        await pair.call()
        assert not await pair.call(pair.key(endpoint=EndpointAddr("10.0.0.2", 80)))
        assert not await pair.call(pair.key(alpn=(ALPN_TCP,)))
        assert await pair.call(pair.key())

    both(main)


@pytest.mark.parametrize("side", ["web", "reviews"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_a_renewed_svid_begins_anew(mesh: Mesh, side: str, told: bool) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        assert not await pair.call()
        svid = mesh.svid(getattr(pair, side).identity)
        setattr(pair, side, svid)
        if told:
            (pair.client if side == "web" else pair.server).contexts.drop(svid.identity)
        assert not await pair.call()
        assert await pair.call()

    both(main)


@pytest.mark.parametrize("side", ["web", "reviews"])
def test_a_removed_root_refuses_who_could_resume(mesh: Mesh, tmp_path: Path, side: str) -> None:
    """Old and new root side by side, then without the old one: the peer is of the old one."""

    async def main() -> None:
        new = Mesh(tmp_path)
        roots = (*parse_bundle(mesh.ca.bundle_pem), *parse_bundle(new.ca.bundle_pem))
        pair = Pair(mesh)
        pair.web = replace(pair.web, bundle_pem=bundle_pem(roots))
        pair.reviews = replace(pair.reviews, bundle_pem=bundle_pem(roots))
        assert [await pair.call(), await pair.call()] == [False, True]
        setattr(pair, side, replace(getattr(pair, side), bundle_pem=new.ca.bundle_pem))
        with pytest.raises(IdentityError, match=r"unable to get local issuer|unknown ca|self.signed"):
            await pair.open()
        node, label = (pair.client, "client/failed") if side == "web" else (pair.server, "server/failed")
        assert node.counted[label] == 1

    both(main)


def test_a_ticket_of_another_server_identity_is_worth_nothing(mesh: Mesh) -> None:
    """Another workload has the address now: it can't read the ticket, and shows who it is."""

    async def main() -> None:
        pair = Pair(mesh)
        await pair.call()
        pair.reviews = mesh.svid(WEB)
        low = await tcp_pair()
        made = await asyncio.gather(
            pair.client.contexts.connect(low[0], pair.key(), 10),
            pair.server.contexts.accept(low[1], pair.reviews, pair.verifier, 10),
            return_exceptions=True,
        )
        assert isinstance(made[0], IdentityError)
        assert f"the peer is {WEB}, not {REVIEWS}" in str(made[0])
        for stream in low:
            stream.abort()
        # Nor is the session offered again.
        pair.reviews = mesh.svid(REVIEWS)
        assert not await pair.call()

    both(main)


def test_a_session_of_another_client_identity_is_not_offered(mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        await pair.call()
        client, server, peer = await pair.open(pair.key(svid=mesh.svid(REVIEWS)))
        assert (client.resumed, server.resumed, peer) == (False, False, REVIEWS)
        client.abort()
        server.abort()

    both(main)


def test_of_another_trust_domain_is_refused_also_when_resumed(mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        await pair.call()
        pair.verifier = SpiffeVerifier("example.org")
        with pytest.raises(IdentityError, match="not in the trust domain"):
            await pair.open()
        assert pair.client.counted["client/resumed"] == 1
        assert pair.server.counted["server/failed"] == 1

    both(main)


def test_a_client_ends_its_sessions_with_ticket_and_certificates(mesh: Mesh) -> None:
    async def main() -> None:
        # 2 h are OpenSSL's own bound of a ticket.
        for lives_s, side in ((HOUR_S, "web"), (HOUR_S, "reviews"), (2 * HOUR_S, "")):
            pair = Pair(mesh)
            if side:
                setattr(pair, side, mesh.svid(getattr(pair, side).identity, ttl_s=lives_s))
            await pair.call()
            pair.client.ahead_s = lives_s - 60
            assert await pair.call()
            pair.client.ahead_s = lives_s + 60
            assert not await pair.call()
            # Nor is one kept that would be over at once.
            assert len(pair.client.contexts._sessions) == 0

    both(main)


def test_a_server_refuses_what_has_ended_and_the_next_one_is_full(mesh: Mesh) -> None:
    """The client's clock is behind: it offers what it should not."""

    async def main() -> None:
        pair = Pair(mesh)
        pair.web = mesh.svid(WEB, ttl_s=HOUR_S)
        await pair.call()
        pair.server.ahead_s = HOUR_S + 60
        with pytest.raises(IdentityError, match="not valid any more"):
            await pair.open()
        assert pair.server.counted == {"server/full": 1, "server/failed": 1}
        # OpenSSL looks at the real clock, by which the certificate is valid.
        assert not await pair.call()

    both(main)


def test_a_session_is_not_prolonged_by_using_it(mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        await pair.call()
        context = pair.client.contexts.client(pair.web)
        first = pair.client.contexts._sessions.offer(pair.key(), context)
        assert await pair.call()
        assert first is not None
        assert pair.client.contexts._sessions.offer(pair.key(), context) is first

    both(main)


def test_off(mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh)
        await pair.call()
        pair.server.contexts.allow_resumption(False)
        assert [await pair.call(), await pair.call()] == [False, False]
        pair.server.contexts.allow_resumption(True)
        assert [await pair.call(), await pair.call()] == [False, True]
        pair.client.contexts.allow_resumption(False)
        assert [await pair.call(), await pair.call()] == [False, False]

    both(main)


def test_sessions_are_bounded_and_do_not_keep_contexts(mesh: Mesh) -> None:
    async def main() -> None:
        pair = Pair(mesh, sessions=2)
        keys = [pair.key(endpoint=EndpointAddr("10.0.0.1", port)) for port in (1, 2, 3)]
        for key in keys:
            assert not await pair.call(key)
        assert len(pair.client.contexts._sessions) == 2
        assert [await pair.call(keys[1]), await pair.call(keys[2]), await pair.call(keys[0])] == [True, True, False]
        pair = Pair(mesh, limit=1)
        await pair.call()
        pair.client.contexts.client(pair.web, (ALPN_TCP,))
        assert len(pair.client.contexts._sessions) == 0
        assert not await pair.call()

    both(main)


def test_proven_until(mesh: Mesh, tmp_path: Path) -> None:
    svid, other = mesh.svid(WEB), Mesh(tmp_path)
    (der,) = ders(svid)
    assert proven_until(der, mesh.ca.bundle_pem) == pytest.approx(mesh.now + DAY_S, abs=1)
    assert proven_until(der, other.ca.bundle_pem) == 0.0
    assert proven_until(der, bundle_pem([other.ca.certificate, mesh.ca.certificate])) > mesh.now
    assert proven_until(b"", mesh.ca.bundle_pem) == proven_until(der, "") == 0.0
    assert own_until(svid) == pytest.approx(mesh.now + DAY_S, abs=1)
    assert own_until(replace(svid, not_after=5.0)) == 5.0
    assert own_until(replace(svid, chain_pem=svid.chain_pem + mesh.ca.bundle_pem)) == 0.0
    assert own_until(replace(svid, chain_pem="")) == 0.0
    assert issue_svid(mesh.ca, WEB, now=mesh.now) != svid
