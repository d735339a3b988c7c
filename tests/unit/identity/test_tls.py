"""Mesh TLS: who is refused and how it is told, truncation, interop with OpenSSL's own tools."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from netproxy.addr import spiffe_id
from netproxy.errors import IdentityError, LocalProtocolError
from netproxy.identity.spiffe import SpiffeVerifier
from netproxy.identity.tls import (
    ALPN_HTTP1,
    ALPN_TCP,
    ContextCache,
    TlsStream,
    client_context,
    require_identity,
    server_context,
)
from netproxy.stream import Sink
from netproxy.tcp import accepted

from .ends import DAY_S, LOOPS, REVIEWS, WEB, Mesh, Recorder, mesh_contexts, run, tcp_pair, tls_ends

loops = pytest.mark.parametrize("loop", list(LOOPS))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    return Mesh(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    """Another mesh that calls itself the same."""
    return Mesh(tmp_path_factory.mktemp("other"))


class Shaken:
    """Both ends after a handshake that may have failed."""

    def __init__(self) -> None:
        self.client_sink, self.server_sink = Recorder(), Recorder()
        self.client: TlsStream
        self.server: TlsStream

    async def shake(self, client_tls: ssl.SSLContext, server_tls: ssl.SSLContext) -> None:
        client, server = await tcp_pair()
        self.client = TlsStream(client, client_tls, server_side=False, sink=self.client_sink)
        self.server = TlsStream(server, server_tls, server_side=True, sink=self.server_sink)

    async def both_closed(self) -> tuple[str, str]:
        """What client and server were told, for a handshake that must fail."""
        told = await self.client_sink.until_closed(), await self.server_sink.until_closed()
        assert all(isinstance(exc, IdentityError) for exc in told)
        assert not self.client_sink.data
        assert not self.server_sink.data
        return str(told[0]), str(told[1])


def plain_context(server_side: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@loops
def test_what_the_peer_has_shown(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        ends = Shaken()
        seen: list[tuple[TlsStream, bool]] = []
        client, server = await tcp_pair()
        web, reviews = mesh.svid(WEB), mesh.svid(REVIEWS)
        ends.server = TlsStream(
            server,
            server_context(reviews),
            server_side=True,
            sink=ends.server_sink,
            handshaken=lambda stream: seen.append((stream, bool(ends.server_sink.data))),
        )
        assert ends.server.alpn is None
        assert ends.server.peer_certificate_der() is None
        assert ends.server.peer_sha256() is None
        assert ends.server.peer_certificate_der() is None
        with pytest.raises(IdentityError, match="no certificate"):
            require_identity(ends.server, {WEB})
        ends.client = TlsStream(client, client_context(web, (ALPN_TCP,)), server_side=False, sink=ends.client_sink)
        await ends.client.wait_handshake(10)
        ends.client.write(b"first")
        await ends.server_sink.until(lambda r: r.data)
        assert seen == [(ends.server, False)]
        await ends.server.wait_handshake(10)
        assert ends.client.alpn == ends.server.alpn == ALPN_TCP
        assert require_identity(ends.client, [REVIEWS]) == REVIEWS
        assert require_identity(ends.server, {WEB, REVIEWS}) == WEB
        assert SpiffeVerifier("cluster.local").identity(ends.server.peer_certificate_der()) == WEB
        der = ssl.PEM_cert_to_DER_cert(web.chain_pem)
        assert ends.server.peer_certificate_der() == der
        assert re.fullmatch("[0-9a-f]{64}", ends.server.peer_sha256() or "")
        with pytest.raises(IdentityError, match=re.escape(f"{REVIEWS}, not {WEB}")):
            require_identity(ends.client, {WEB})
        with pytest.raises(IdentityError, match="not anyone"):
            require_identity(ends.client, ())
        assert "open" in repr(ends.server)
        ends.client.close()
        ends.server.close()
        await ends.client_sink.until_closed()

    run(loop, main)


@loops
def test_writing_before_the_handshake_is_refused(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        stream = TlsStream(client, client_context(mesh.svid()), server_side=False, sink=(sink := Recorder()))
        with pytest.raises(LocalProtocolError):
            stream.write(b"early")
        with pytest.raises(LocalProtocolError):
            stream.write_eof()
        stream.close()
        with pytest.raises(IdentityError):
            await stream.wait_handshake(10)
        assert await sink.until_closed() is None
        server.abort()

    run(loop, main)


def _wrong_ca(mesh: Mesh, other: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return client_context(replace(other.svid(), bundle_pem=mesh.ca.bundle_pem)), server_context(mesh.svid(REVIEWS))


def _wrong_server_ca(mesh: Mesh, other: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return client_context(mesh.svid()), server_context(other.svid(REVIEWS))


def _expired(mesh: Mesh, other: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return client_context(mesh.svid(now=mesh.now - 2 * DAY_S)), server_context(mesh.svid(REVIEWS))


def _not_yet(mesh: Mesh, other: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return client_context(mesh.svid(now=mesh.now + DAY_S)), server_context(mesh.svid(REVIEWS))


def _no_certificate(mesh: Mesh, other: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return plain_context(), server_context(mesh.svid(REVIEWS))


def _tls12_client(mesh: Mesh, other: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    client = client_context(mesh.svid())
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    return client, server_context(mesh.svid(REVIEWS))


Negative = Callable[[Mesh, Mesh], tuple[ssl.SSLContext, ssl.SSLContext]]


@loops
@pytest.mark.parametrize(
    ("contexts", "client_hears", "server_hears"),
    [
        (_wrong_ca, "alert unknown ca", "unable to get local issuer certificate|self.signed"),
        (_wrong_server_ca, "unable to get local issuer certificate|self.signed", "alert unknown ca"),
        (_expired, "alert certificate expired", "certificate has expired"),
        (_not_yet, "alert bad certificate", "not yet valid"),
        (_no_certificate, "alert certificate required", "peer did not return a certificate"),
        (_tls12_client, "alert protocol version", "unsupported protocol"),
    ],
)
def test_refused_and_both_know_why(
    loop: str, mesh: Mesh, other: Mesh, contexts: Negative, client_hears: str, server_hears: str
) -> None:
    async def main() -> None:
        ends = Shaken()
        await ends.shake(*contexts(mesh, other))
        with pytest.raises(IdentityError):
            await ends.server.wait_handshake(10)
        assert ends.server.closing
        client, server = await ends.both_closed()
        assert re.search(client_hears, client)
        assert re.search(server_hears, server)
        ends.server.write(b"dropped")
        with pytest.raises(IdentityError):
            await ends.client.wait_handshake(10)

    run(loop, main)


@loops
def test_client_that_offers_none_of_our_alpn_is_visible(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        ends = Shaken()
        await ends.shake(client_context(mesh.svid(), ("h2",)), server_context(mesh.svid(REVIEWS)))
        await ends.server.wait_handshake(10)
        assert ends.server.alpn is None
        ends.server.abort()
        await ends.client_sink.until_closed()

    run(loop, main)


@loops
def test_plaintext_into_a_tls_server(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        client.sink = client_sink = Recorder()
        stream = TlsStream(server, server_context(mesh.svid()), server_side=True, sink=(sink := Recorder()))
        client.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        exc = await sink.until_closed()
        assert isinstance(exc, IdentityError)
        assert re.search("http request|wrong version number", str(exc))
        assert stream.peer_certificate_der() is None
        client.close()
        await client_sink.until_closed()

    run(loop, main)


@loops
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("octets", [0, 3, 100])
def test_peer_gone_during_the_handshake(loop: str, mesh: Mesh, how: str, octets: int) -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        client.sink = client_sink = Recorder()
        TlsStream(hello := _Collect(), client_context(mesh.svid()), server_side=False)
        stream = TlsStream(server, server_context(mesh.svid()), server_side=True, sink=(sink := Recorder()))
        client.write(bytes(hello.written[:octets]))
        getattr(client, how)()
        with pytest.raises(IdentityError, match="during the TLS handshake"):
            await stream.wait_handshake(10)
        assert isinstance(await sink.until_closed(), IdentityError)
        assert not sink.eof
        await client_sink.until_closed()

    run(loop, main)


class _Collect:
    """A stream that goes nowhere: what is written is collected."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.log: list[str] = []
        self.sink: Sink
        self.closing = False

    def write(self, data: bytes) -> None:
        self.written += data
        self.log.append("write")

    def buffered(self) -> int:
        return 0

    def write_eof(self) -> None:
        self.log.append("write_eof")

    def pause_reading(self) -> None:
        self.log.append("pause")

    def resume_reading(self) -> None:
        self.log.append("resume")

    def close(self) -> None:
        self.closing = True
        self.log.append("close")

    def abort(self) -> None:
        self.closing = True
        self.log.append("abort")

    def take(self) -> bytes:
        data, self.written = bytes(self.written), bytearray()
        return data


@loops
def test_silent_peer(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        client.sink = client_sink = Recorder()
        stream = TlsStream(server, server_context(mesh.svid()), server_side=True, sink=(sink := Recorder()))
        with pytest.raises(IdentityError, match=r"was not done in 0\.01 s"):
            await stream.wait_handshake(0.01)
        assert "was not done" in str(await sink.until_closed())
        assert isinstance(await client_sink.until_closed(), ConnectionResetError)

    run(loop, main)


@loops
def test_cancelled_wait_closes_the_stream(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        client.sink = client_sink = Recorder()
        stream = TlsStream(server, server_context(mesh.svid()), server_side=True)
        task = asyncio.ensure_future(stream.wait_handshake(10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.closing
        await client_sink.until_closed()

    run(loop, main)


@loops
@pytest.mark.parametrize("wrote_eof", [False, True])
def test_fin_without_close_notify_is_truncation(loop: str, mesh: Mesh, wrote_eof: bool) -> None:
    async def main() -> None:
        client_sink, server_sink = Recorder(), Recorder()
        ends = await tls_ends(client_sink, server_sink, *mesh_contexts(mesh))
        client, server = ends.client, ends.server
        assert isinstance(client, TlsStream)
        if wrote_eof:
            server.write_eof()
        client.write(b"half of a bo")
        client.lower.write_eof()
        exc = await server_sink.until_closed()
        assert isinstance(exc, ConnectionAbortedError)
        assert server_sink.data == b"half of a bo"
        assert not server_sink.eof
        # Without an end of its own, the truncated side resets; with one, TCP is closed both ways already.
        if wrote_eof:
            await client_sink.until(lambda r: r.eof)
            client.abort()
        await client_sink.until_closed()

    run(loop, main)


@loops
def test_tampered_record(loop: str, mesh: Mesh) -> None:
    async def main() -> None:
        client_sink, server_sink = Recorder(), Recorder()
        ends = await tls_ends(client_sink, server_sink, *mesh_contexts(mesh))
        assert isinstance(ends.client, TlsStream)
        ends.client.write(b"good")
        ends.client.lower.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        exc = await server_sink.until_closed()
        assert isinstance(exc, IdentityError)
        assert "bad record mac" in str(exc)
        assert server_sink.data == b"good"
        assert "alert bad record mac" in str(await client_sink.until_closed())

    run(loop, main)


# In memory: what the network can't be made to do.


def memory_pair(mesh: Mesh) -> tuple[TlsStream, _Collect, Recorder, TlsStream, _Collect, Recorder]:
    client_tls, server_tls = mesh_contexts(mesh)
    a_lower, b_lower, a_sink, b_sink = _Collect(), _Collect(), Recorder(), Recorder()
    a = TlsStream(a_lower, client_tls, server_side=False, sink=a_sink)
    b = TlsStream(b_lower, server_tls, server_side=True, sink=b_sink)
    for _ in range(3):
        for stream, source in ((b, a_lower), (a, b_lower)):
            if data := source.take():
                stream.data_received(data)
    assert require_identity(a, {REVIEWS}) == REVIEWS
    assert require_identity(b, {WEB}) == WEB
    return a, a_lower, a_sink, b, b_lower, b_sink


def in_loop(check: Callable[[], None]) -> None:
    async def main() -> None:
        check()

    run("asyncio", main)


def test_every_split_of_the_bytes(mesh: Mesh) -> None:
    def check() -> None:
        a, a_lower, _, b, _, b_sink = memory_pair(mesh)
        a.write(b"one")
        a.write(b"two")
        a.write_eof()
        for octet in a_lower.take():
            b.data_received(bytes([octet]))
        assert b_sink.data == b"onetwo"
        assert b_sink.eof

    in_loop(check)


def test_whatever_chunks_records_come_in(mesh: Mesh) -> None:
    """One record in a chunk is read by a way of its own, as long as nothing is left of the chunk before."""

    def check() -> None:
        a, a_lower, _, b, _, b_sink = memory_pair(mesh)
        expected = b""
        for cut in range(60):
            a.write(b"one")
            a.write(b"other")
            data = a_lower.take()
            assert len(data) == 52
            for chunk in (data[:cut], data[cut:]):
                if chunk:
                    b.data_received(chunk)
            expected += b"oneother"
            assert b_sink.data == expected
            a.write(b"single")
            b.data_received(a_lower.take())
            expected += b"single"
            assert b_sink.data == expected

    in_loop(check)


@pytest.mark.parametrize("records", [1, 3])
def test_what_came_before_a_tampered_record_is_delivered(mesh: Mesh, records: int) -> None:
    def check() -> None:
        a, a_lower, _, b, b_lower, b_sink = memory_pair(mesh)
        for _ in range(records):
            a.write(b"sound")
        data = bytearray(a_lower.take())
        data[-1] ^= 1
        b.data_received(bytes(data))
        assert b_sink.data == b"sound" * (records - 1)
        assert b.closing
        assert not b_sink.eof
        b.data_received(bytes(data))
        assert b_lower.log[-1] == "close"

    in_loop(check)


def test_handshake_byte_by_byte(mesh: Mesh) -> None:
    def check() -> None:
        client_tls, server_tls = mesh_contexts(mesh)
        a_lower, b_lower = _Collect(), _Collect()
        a = TlsStream(a_lower, client_tls, server_side=False)
        b = TlsStream(b_lower, server_tls, server_side=True)
        for _ in range(3):
            for stream, source in ((b, a_lower), (a, b_lower)):
                for octet in source.take():
                    stream.data_received(bytes([octet]))
        assert a.alpn == b.alpn == ALPN_HTTP1

    in_loop(check)


def test_write_eof_in_the_handshaken_callback_with_data_right_behind(mesh: Mesh) -> None:
    """The client's last flight, its data and its end in one read: close_notify must not trip over the data."""

    def check() -> None:
        client_tls, server_tls = mesh_contexts(mesh)
        a_lower, b_lower, a_sink, b_sink = _Collect(), _Collect(), Recorder(), Recorder()
        a = TlsStream(a_lower, client_tls, server_side=False, sink=a_sink)
        b = TlsStream(b_lower, server_tls, server_side=True, sink=b_sink, handshaken=TlsStream.write_eof)
        b.data_received(a_lower.take())
        a.data_received(b_lower.take())
        a.write(b"d" * 100_000)
        a.write_eof()
        b.data_received(a_lower.take())
        assert b_sink.eof
        assert len(b_sink.data) == 100_000
        a.data_received(b_lower.take())
        assert a_sink.eof
        assert not a_sink.closes

    in_loop(check)


def test_one_lower_write_per_write_and_bounded_records(mesh: Mesh) -> None:
    def check() -> None:
        a, a_lower, _, b, _, b_sink = memory_pair(mesh)
        a_lower.log.clear()
        a.write(bytes(1_000_000))
        assert a_lower.log == ["write"]
        assert len(a_lower.written) < 1_000_000 * 1.01
        b.data_received(a_lower.take())
        assert len(b_sink.data) == 1_000_000

    in_loop(check)


def test_decrypted_while_paused_is_held_and_the_lower_stream_paused(mesh: Mesh) -> None:
    async def main() -> None:
        a, a_lower, _, b, b_lower, b_sink = memory_pair(mesh)
        b.pause_reading()
        assert b_lower.log[-1] == "pause"
        a.write(b"x" * 50_000)
        a.write_eof()
        b.data_received(a_lower.take())
        assert not b_sink.data
        assert "held=50000" in repr(b)
        b.resume_reading()
        await b_sink.until(lambda r: r.eof)
        assert len(b_sink.data) == 50_000
        assert b_lower.log[-1] == "resume"

    run("asyncio", main)


def test_aborting_in_the_handshaken_callback_delivers_nothing(mesh: Mesh) -> None:
    def check() -> None:
        client_tls, server_tls = mesh_contexts(mesh)
        a_lower, b_lower, b_sink = _Collect(), _Collect(), Recorder()
        a = TlsStream(a_lower, client_tls, server_side=False)
        b = TlsStream(b_lower, server_tls, server_side=True, sink=b_sink, handshaken=TlsStream.abort)
        b.data_received(a_lower.take())
        a.data_received(b_lower.take())
        a.write(b"secret")
        a.write_eof()
        b.data_received(a_lower.take())
        assert b_lower.log[-1] == "abort"
        assert not b_sink.data
        assert not b_sink.eof

    in_loop(check)


def test_lost_below(mesh: Mesh) -> None:
    def check() -> None:
        a, _, a_sink, _, _, _ = memory_pair(mesh)
        a.closed(ConnectionResetError())
        assert isinstance(a_sink.closes[0], ConnectionResetError)
        a.write(b"dropped")

    in_loop(check)


# Contexts.


def test_broken_svids(mesh: Mesh) -> None:
    svid, second = mesh.svid(), mesh.svid()
    for broken in (
        replace(svid, key_pem=second.key_pem),
        replace(svid, chain_pem=""),
        replace(svid, key_pem="nonsense"),
        replace(svid, bundle_pem=""),
        replace(svid, bundle_pem="nonsense"),
    ):
        with pytest.raises(IdentityError, match=re.escape(WEB)):
            server_context(broken)


def test_no_descriptor_is_left(mesh: Mesh) -> None:
    svid = mesh.svid()
    before = os.listdir("/proc/self/fd")
    server_context(svid)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop root")
@pytest.mark.parametrize("dumpable", [False, True])
def test_after_dropping_root(mesh: Mesh, dumpable: bool) -> None:
    svid = mesh.svid()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        code = 3
        try:
            os.setresuid(65534, 65534, 65534)
            if dumpable:
                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
            server_context(svid)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_context_cache(mesh: Mesh) -> None:
    cache = ContextCache(limit=3)
    web, reviews = mesh.svid(WEB), mesh.svid(REVIEWS)
    server = cache.server(web)
    assert cache.server(web) is server
    assert cache.client(web) is not server
    opaque = cache.client(web, (ALPN_TCP,))
    client = cache.client(web)
    assert opaque is not client
    cache.server(web)
    assert cache.server(reviews) is not server
    # The one used longest ago made room for the fourth.
    assert (cache.server(web) is server, cache.client(web) is client) == (True, True)
    assert cache.client(web, (ALPN_TCP,)) is not opaque
    cache.drop(WEB)
    assert cache.server(web) is not server
    # Renewed, or another bundle: never served by the old context, even if nobody called drop.
    assert cache.server(replace(web, bundle_pem=web.bundle_pem + "\n")) is not cache.server(web)


# Interop.


@pytest.fixture
def pems(mesh: Mesh, tmp_path: Path) -> Iterator[list[str]]:
    """openssl's options for the identity of web."""
    svid = mesh.svid(spiffe_id("cluster.local", "shop", "openssl"))
    for name, text in (("c", svid.chain_pem), ("k", svid.key_pem), ("b", svid.bundle_pem)):
        (tmp_path / name).write_text(text)
    yield ["-cert", f"{tmp_path}/c", "-key", f"{tmp_path}/k", "-CAfile", f"{tmp_path}/b", "-verify_return_error"]


openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl binary")


async def spawn(*argv: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        "openssl", *argv, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT
    )


@openssl
@loops
def test_openssl_s_client_with_key_updates(loop: str, mesh: Mesh, pems: list[str]) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            event_loop = asyncio.get_running_loop()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            process = await spawn("s_client", "-connect", address, *pems, "-alpn", ALPN_TCP, "-verify", "3")
            sock, _ = await event_loop.sock_accept(listener)
        sink = Recorder()
        stream = TlsStream(
            await accepted(event_loop, sock), server_context(mesh.svid(REVIEWS)), server_side=True, sink=sink
        )
        await stream.wait_handshake(10)
        assert require_identity(stream, {spiffe_id("cluster.local", "shop", "openssl")})
        assert stream.alpn == ALPN_TCP
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        await sink.until(lambda r: r.data == b"hello\n")
        process.stdin.write(b"K\n")  # s_client: update the keys, and ask for ours
        await process.stdout.readuntil(b"KEYUPDATE")
        process.stdin.write(b"again\n")
        await sink.until(lambda r: r.data == b"hello\nagain\n")
        stream.write(b"answer\n")
        await process.stdout.readuntil(b"answer")
        stream.close()
        assert await sink.until_closed() is None
        out, _ = await process.communicate()
        assert b"close notify" in out or b"closed" in out or b"DONE" in out

    run(loop, main)


@openssl
@loops
def test_openssl_s_server(loop: str, mesh: Mesh, pems: list[str]) -> None:
    async def main() -> None:
        process = await spawn("s_server", "-accept", "127.0.0.1:0", *pems, "-Verify", "3", "-rev", "-alpn", ALPN_HTTP1)
        assert process.stdout is not None
        line = b""
        while not line.startswith(b"ACCEPT"):
            line = await process.stdout.readline()
            assert line
        event_loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        await event_loop.sock_connect(sock, ("127.0.0.1", int(line.rpartition(b":")[2])))
        sink = Recorder()
        stream = TlsStream(
            await accepted(event_loop, sock), client_context(mesh.svid(WEB)), server_side=False, sink=sink
        )
        await stream.wait_handshake(10)
        assert require_identity(stream, {spiffe_id("cluster.local", "shop", "openssl")})
        stream.write(b"hello\n")
        await sink.until(lambda r: r.data == b"olleh\n")
        stream.write_eof()
        await sink.until(lambda r: r.eof or r.closes)
        assert sink.eof
        stream.close()
        process.kill()
        await process.communicate()

    run(loop, main)
