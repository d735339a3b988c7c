"""Mesh TLS: a `Stream` over a `Stream`, and the contexts it runs with.

Owns an OpenSSL engine between two memory buffers, not the loop's TLS: that one can't half-close, and uvloop's holds
197 KiB per connection.

    lower data      -> shaking: handshake | open: decrypt, deliver | ended, failed: dropped
    close_notify    -> the sink hears the end; writing goes on (RFC 8446 section 6.1)
    FIN without it  -> `closed` with an error, never an end: someone may have cut the stream
    write_eof       -> close_notify, then the lower stream's end; reading goes on

Threats: no certificate, another mesh's, an expired one (OpenSSL refuses, TLS 1.3 only); a ticket that outlives the
certificate that earned it (`resume`); a certificate of this mesh but of another workload (`require_identity`);
truncation (above); a peer that stalls (`wait_handshake` has a timeout, what is queued has the lower stream's bound).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Literal

from ..addr import SpiffeId
from ..config.shard import SvidShard
from ..delivery import Delivery
from ..errors import IdentityError, LocalProtocolError
from ..stream import Sink, Stream
from .resume import SessionKey, Sessions, own_until, proven_until
from .spiffe import SpiffeVerifier, identity_of_der

ALPN_HTTP1 = "netproxy/http/1.1"
ALPN_H2 = "netproxy/h2"
"""Requests in HTTP/2, for an application that is to get them in HTTP/2."""
ALPN_H2_HTTP1 = "netproxy/h2/http/1.1"
"""Requests in HTTP/2, for an application that is to get them in HTTP/1.1."""
ALPN_TCP = "netproxy/tcp"
MESH_ALPN = (ALPN_H2, ALPN_H2_HTTP1, ALPN_HTTP1, ALPN_TCP)
"""What a server takes, the first of them that is offered."""

_RECORD = 16 * 1024
"""Plaintext of one record at most (RFC 8446 section 5.1): a read never leaves a rest. Written in the same steps."""
_HEADER = 5
_APPLICATION_DATA = 23
"""Type of a record, and of all that are encrypted."""
_ALERT_FLUSH_S = 1.0
"""How long a failed connection may take to get its alert out."""
_TICKET_CHUNKS = 3
"""A server's ticket comes right after its handshake: if these don't bring it, there is none."""


class TlsStream(Stream):
    """TLS over `lower`, whose sink it becomes. The handshake starts at once.

    `handshaken` is called when it is done, before any data is delivered. A failure is told by `closed` (or raised by
    `wait_handshake`) with an IdentityError. Without a sink nothing is lost: reading is paused until there is one.
    """

    __slots__ = (
        "__weakref__", "_closing", "_delivery", "_ended", "_error", "_handshaken", "_header", "_incoming", "_missing",
        "_on_ticket", "_outgoing", "_shaken", "_ssl", "_ticket_chunks", "_timer", "_told_shaken", "_waiters",
        "_wrote_eof", "lower",
    )  # fmt: skip

    def __init__(
        self,
        lower: Stream,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        sink: Sink | None = None,
        handshaken: Callable[[TlsStream], None] | None = None,
    ) -> None:
        self.lower = lower
        self._delivery = Delivery(sink, lower.resume_reading)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname, session=session
        )
        self._on_ticket: Callable[[ssl.SSLSession], None] | None = None
        self._ticket_chunks = 0
        self._handshaken = handshaken
        self._waiters: list[asyncio.Future[None]] = []
        self._shaken = self._told_shaken = False
        self._header = b""  # the beginning of a record's
        self._missing = 0  # octets of the record that has begun
        self._ended = False  # close_notify received
        self._wrote_eof = False
        self._closing = False
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        lower.sink = self
        lower.resume_reading()
        self._shake()

    def __repr__(self) -> str:
        state = "open" if self._shaken else "shaking"
        ends = " eof" * self._ended + " wrote-eof" * self._wrote_eof + " closing" * self.closing
        return f"<TlsStream {state}{ends} held={self._delivery.held()} error={self._error!r} over {self.lower!r}>"

    # What the peer has shown. Nothing before the handshake is done.

    @property
    def alpn(self) -> str | None:
        """None: the peer offered, or chose, nothing that we know."""
        return self._ssl.selected_alpn_protocol() if self._shaken else None

    def peer_certificate_der(self) -> bytes | None:
        return self._ssl.getpeercert(True) if self._shaken else None

    def peer_sha256(self) -> str | None:
        """Of the certificate, hexadecimal."""
        der = self.peer_certificate_der()
        return None if der is None else hashlib.sha256(der).hexdigest()

    @property
    def resumed(self) -> bool:
        """The certificate was shown in an earlier connection, not in this one."""
        return self._shaken and bool(self._ssl.session_reused)

    def on_ticket(self, keep: Callable[[ssl.SSLSession], None]) -> None:
        """`keep` gets the session once the server's ticket has come. Once, or never."""
        self._on_ticket, self._ticket_chunks = keep, _TICKET_CHUNKS

    async def wait_handshake(self, timeout_s: float) -> None:
        """Raises IdentityError when it fails or takes longer; the stream is closed then, as when this is cancelled."""
        if self._error is not None:
            raise self._error
        if self._shaken:
            return
        if self._closing:
            raise IdentityError("closed before the TLS handshake was done")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError as exc:
            self._error = IdentityError(f"the TLS handshake was not done in {timeout_s:g} s")
            self.abort()
            raise self._error from exc
        except asyncio.CancelledError:
            self.abort()
            raise

    # Stream.

    @property
    def sink(self) -> Sink:
        return self._delivery.sink

    @sink.setter
    def sink(self, sink: Sink) -> None:
        self._delivery.replace(sink)

    @property
    def closing(self) -> bool:
        return self._closing or self._error is not None or self.lower.closing

    def write(self, data: bytes) -> None:
        """Dropped when the stream is closing. Raises LocalProtocolError before the handshake and after `write_eof`."""
        if self._closing or self._error is not None:
            return
        if not self._shaken or self._wrote_eof:
            raise LocalProtocolError("write after write_eof" if self._shaken else "write before the handshake is done")
        try:
            if len(data) <= _RECORD:
                if data:
                    self._ssl.write(data)
                    self.lower.write(self._outgoing.read())
                return
            view = memoryview(data)
            records = []
            for start in range(0, len(data), _RECORD):
                self._ssl.write(view[start : start + _RECORD])
                records.append(self._outgoing.read())
        except ssl.SSLError as exc:
            self._fail(_readable(exc), exc)
            return
        self.lower.write(b"".join(records))

    def write_eof(self) -> None:
        """Raises LocalProtocolError before the handshake is done."""
        if self._wrote_eof or self.closing:
            return
        if not self._shaken:
            raise LocalProtocolError("write_eof before the handshake is done")
        self._notify_close()
        self.lower.write_eof()

    def pause_reading(self) -> None:
        self._delivery.pause()
        if self._told_shaken:
            self.lower.pause_reading()

    def resume_reading(self) -> None:
        self._delivery.resume()

    def close(self) -> None:
        if self._closing:
            return
        if self._shaken and not self._wrote_eof and self._error is None:
            self._notify_close()
        self._closing = True
        self._delivery.stop()
        self.lower.close()

    def abort(self) -> None:
        self._closing = True
        self._delivery.stop()
        self.lower.abort()

    def buffered(self) -> int:
        """Ciphertext: nothing is kept in plaintext."""
        return self.lower.buffered()

    # Sink of the lower stream.

    def data_received(self, data: bytes) -> None:
        if self._closing or self._ended or self._error is not None:
            return
        delivery = self._delivery
        plain: list[bytes] = []
        whole: bytes | None = None
        failure: ssl.SSLError | None = None
        try:
            # Most chunks are one record of application data and nothing else: read, delivered, done.
            if (
                self._told_shaken
                and not self._missing
                and len(data) > _HEADER
                and data[0] == _APPLICATION_DATA
                and (data[3] << 8 | data[4]) == len(data) - _HEADER
                and not self._header
            ):
                self._incoming.write(data)
                text = self._ssl.read(_RECORD)
                if text and delivery.ready and self._on_ticket is None and not self._incoming.pending:
                    whole = text
                elif text:
                    plain.append(text)
                    self._decrypt(plain)
                else:
                    self._ended = True
            else:
                self._feed(data, plain)
            if not self._shaken:
                if not self._shake():
                    return
                self._decrypt(plain)
        except ssl.SSLWantReadError:  # a key update, a ticket
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as exc:
            failure = exc
        if whole is not None:
            delivery.target.data_received(whole)  # type: ignore[union-attr]  # ready implies a target
            return
        self._flush()  # a key update is answered, a failure is told the peer
        if self._shaken and not self._told_shaken:
            self._tell_shaken()
        elif self._on_ticket is not None and failure is None:
            self._look_for_ticket(self._on_ticket)
        # The owner is called with nothing left to decrypt, so that it may `write_eof` at any place (see _notify_close).
        if plain and not self._closing:
            text = plain[0] if len(plain) == 1 else b"".join(plain)
            if delivery.ready:
                delivery.target.data_received(text)  # type: ignore[union-attr]  # ready implies a target
            else:
                delivery.hold(text)
                self.lower.pause_reading()
        if failure is not None:
            self._fail(_readable(failure), failure)
        elif self._ended:
            delivery.eof()

    def eof_received(self) -> None:
        if self._ended or self.closing:
            return
        if self._shaken:
            self._error = ConnectionAbortedError(
                "the peer ended the connection without ending TLS: data may be missing"
            )
        else:
            self._error = IdentityError("the peer closed the connection during the TLS handshake")
        self._release(self._error)
        self.abort()

    def writable(self, ok: bool) -> None:
        self._delivery.writable(ok)

    def closed(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        error = self._error or exc
        if not self._shaken and self._error is None and not (self._closing and exc is None):
            error = IdentityError(f"the connection was lost during the TLS handshake: {exc}")
            error.__cause__ = exc
        self._error = error
        self._closing = True
        self._release(error or IdentityError("closed before the TLS handshake was done"))
        self._handshaken = self._on_ticket = None
        self._delivery.lost(error)

    # The engine.

    def _shake(self) -> bool:
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as exc:
            self._flush()
            self._fail(_readable(exc), exc)
            return False
        self._shaken = True
        return True

    def _tell_shaken(self) -> None:
        self._told_shaken = True
        if not self._delivery.ready:
            self.lower.pause_reading()
        self._release(None)
        if self._handshaken is not None:
            handshaken, self._handshaken = self._handshaken, None
            handshaken(self)

    def _look_for_ticket(self, keep: Callable[[ssl.SSLSession], None]) -> None:
        session = self._ssl.session
        self._ticket_chunks -= 1
        found = session is not None and session.has_ticket
        if found or not self._ticket_chunks:
            self._on_ticket = None
        if found and session is not None:
            keep(session)

    def _release(self, error: Exception | None) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    def _feed(self, data: bytes, plain: list[bytes]) -> None:
        """Record by record (RFC 8446 section 5.1), decrypting each once it is whole.

        OpenSSL's buffer never shrinks: fed with a whole read of uvloop, each connection would keep up to 340 KiB. And
        reading half a record costs an SSLWantReadError, which is dearer than decrypting a small one.
        """
        if self._header:
            data, self._header = self._header + data, b""
        incoming, read, size, view, at = self._incoming, self._ssl.read, len(data), memoryview(data), 0
        missing, shaken = self._missing, self._shaken
        while at < size:
            if not missing:
                if size - at < _HEADER:
                    self._header = data[at:]
                    break
                missing = _HEADER + (data[at + 3] << 8 | data[at + 4])
                if not 20 <= data[at] <= 23 or data[at + 1] != 3:
                    missing = size - at  # no record: OpenSSL says at once what it is
            end = min(at + missing, size)
            incoming.write(view[at:end])
            missing -= end - at
            at = end
            if missing or not shaken:
                continue
            try:
                text = read(_RECORD)
            except ssl.SSLWantReadError:  # a key update, a ticket
                continue
            except ssl.SSLZeroReturnError:  # instead of b"" when we have sent ours
                text = b""
            if not text:
                self._ended = True
                break
            plain.append(text)
        self._missing = missing

    def _decrypt(self, plain: list[bytes]) -> None:
        """What has been fed, up to close_notify."""
        read, incoming = self._ssl.read, self._incoming
        try:
            while incoming.pending:
                data = read(_RECORD)
                if not data:
                    self._ended = True
                    return
                plain.append(data)
        except ssl.SSLWantReadError:  # a key update, a ticket
            pass
        except ssl.SSLZeroReturnError:  # instead of b"" when we have sent ours
            self._ended = True

    def _flush(self) -> None:
        if self._outgoing.pending and not self._wrote_eof:
            self.lower.write(self._outgoing.read())

    def _notify_close(self) -> None:
        # unwrap() writes close_notify and then looks for the peer's: application data still in the buffer would be an
        # error for it. All that arrives is decrypted at once, so it finds nothing and wants to read; reading goes on
        # after it.
        try:
            self._ssl.unwrap()
        except ssl.SSLError:
            pass
        self._flush()
        self._wrote_eof = True

    def _fail(self, detail: str, cause: Exception) -> None:
        if self._error is not None or self._closing:
            return
        error = IdentityError(detail)
        error.__cause__ = cause
        self._error = error
        self._delivery.stop()
        self._release(error)
        self._flush()
        # A peer that does not read would keep the alert, and so the connection, for ever.
        self._timer = asyncio.get_running_loop().call_later(_ALERT_FLUSH_S, self.lower.abort)
        self.lower.close()


def _readable(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not accepted: {exc.verify_message}"
    reason = (exc.reason or str(exc)).lower().replace("_", " ")
    if "alert" in reason:
        return f"the peer refused the TLS connection: {reason}"
    return f"TLS failed: {reason}"


def require_identity(stream: TlsStream, allowed: Collection[SpiffeId]) -> SpiffeId:
    """The peer's identity, one of `allowed`. Raises IdentityError; closing the stream is the caller's part."""
    der = stream.peer_certificate_der()
    if der is None:
        raise IdentityError("the peer has no certificate")
    identity = identity_of_der(der)
    if identity not in allowed:
        raise IdentityError(f"the peer is {identity}, not {' or '.join(sorted(allowed)) or 'anyone allowed'}")
    return identity


def server_context(svid: SvidShard, alpn: tuple[str, ...] = MESH_ALPN, *, tickets: bool = False) -> ssl.SSLContext:
    """Refuses clients without a certificate of the mesh. 2 ms: see `ContextCache`. Raises IdentityError.

    A client that offers no ALPN of ours is let through by OpenSSL: look at `TlsStream.alpn`. With `tickets` a client
    may resume its session for 2 h, whatever became of its certificate: look at `TlsStream.resumed`.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, svid, alpn)
    context.num_tickets = int(tickets)
    return context


def client_context(svid: SvidShard, alpn: tuple[str, ...] = (ALPN_HTTP1,)) -> ssl.SSLContext:
    """Accepts any server of the mesh: `require_identity` must follow. Raises IdentityError."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, svid, alpn)


def _context(protocol: int, svid: SvidShard, alpn: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    # The name is the SPIFFE ID, which OpenSSL does not compare.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=svid.bundle_pem)
        _load_chain(context, svid)
    except (ssl.SSLError, ValueError) as exc:
        raise IdentityError(f"the SVID of {svid.identity} can't be used: {exc}") from exc
    except OSError as exc:
        raise IdentityError(f"the SVID of {svid.identity} can't be loaded through /proc/self/fd: {exc}") from exc
    context.set_alpn_protocols(list(alpn))
    return context


def _load_chain(context: ssl.SSLContext, svid: SvidShard) -> None:
    """`ssl` loads keys from a path only; a memfd has one and never touches a disk.

    This also works in a process that has dropped root and is therefore not dumpable: /proc/self/fd then belongs to
    root, but a process may always look into its own (proc_fd_permission() in fs/proc/fd.c). It needs /proc.
    """
    fd = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(svid.chain_pem.encode() + svid.key_pem.encode())
        # An encrypted key must fail, not ask on the terminal.
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=b"")
    finally:
        os.close(fd)


_Role = Literal["server", "client"]
_ContextKey = tuple[_Role, tuple[str, ...], SvidShard]


def _uncounted(_name: str, _n: int, _detail: str) -> None:
    pass


class ContextCache:
    """The contexts in use, least recently used dropped: each is 24 KiB and 2 ms. Built at first use.

    The key is the whole SVID: one that was renewed, or whose bundle changed, is never served by an old context, nor
    does it resume a session of one. `connect` and `accept` are the handshakes that look at the peer's identity; they
    count how they ended, by `count`. Ticket keys belong to a context, so to one worker: Python's `ssl` can't share
    them, and a session that meets another worker of the node costs what it would have cost without.
    """

    def __init__(
        self,
        limit: int = 256,
        *,
        sessions: int = 1024,
        now: Callable[[], float] = time.time,
        count: Callable[[str, int, str], None] = _uncounted,
    ) -> None:
        self._limit = limit
        self._now = now
        self._count = count
        self._resume = True
        self._contexts: OrderedDict[_ContextKey, ssl.SSLContext] = OrderedDict()
        self._sessions = Sessions(sessions, now)

    async def connect(self, lower: Stream, key: SessionKey, timeout_s: float, *, sink: Sink | None = None) -> TlsStream:
        """The handshake as `key.svid`, with who must be `key.peer`. Raises IdentityError; `lower` is the caller's to
        abort then."""
        context = self.client(key.svid, key.alpn)
        session = self._sessions.offer(key, context)
        stream = TlsStream(lower, context, server_side=False, session=session, sink=sink)
        try:
            await stream.wait_handshake(timeout_s)
            require_identity(stream, (key.peer,))
            if stream.resumed:
                self._check_resumed(stream, key.svid)
        except (IdentityError, OSError):
            self._sessions.forget(key)
            self._count("tls_handshakes", 1, "client/failed")
            raise
        self._count("tls_handshakes", 1, "client/resumed" if stream.resumed else "client/full")
        if self._resume and not stream.resumed:
            peer_der = stream.peer_certificate_der() or b""
            stream.on_ticket(lambda session: self._keep(key, context, session, peer_der))
        return stream

    async def accept(
        self, lower: Stream, svid: SvidShard, verifier: SpiffeVerifier, timeout_s: float
    ) -> tuple[TlsStream, SpiffeId]:
        """The handshake as `svid`, and who the client is. Raises IdentityError; `lower` is the caller's to abort
        then."""
        stream = TlsStream(lower, self.server(svid), server_side=True)
        try:
            await stream.wait_handshake(timeout_s)
            peer = verifier.identity(stream.peer_certificate_der())
            if stream.resumed:
                self._check_resumed(stream, svid)
        except (IdentityError, OSError):
            self._count("tls_handshakes", 1, "server/failed")
            raise
        self._count("tls_handshakes", 1, "server/resumed" if stream.resumed else "server/full")
        return stream, peer

    def _check_resumed(self, stream: TlsStream, svid: SvidShard) -> None:
        der = stream.peer_certificate_der()
        until = min(proven_until(der or b"", svid.bundle_pem), own_until(svid))
        if until <= self._now():
            # The peer may not know it: with new ticket keys its next handshake is a full one, which will tell.
            self.drop(svid.identity)
            raise IdentityError("the certificate of the session that was resumed is not valid any more")

    def _keep(self, key: SessionKey, context: ssl.SSLContext, session: ssl.SSLSession, peer_der: bytes) -> None:
        # The certificate may have been renewed, or the context dropped, since the handshake.
        if self._resume and self._contexts.get(("client", key.alpn, key.svid)) is context:
            self._sessions.keep(key, context, session, peer_der)

    def allow_resumption(self, allowed: bool) -> None:
        if allowed is not self._resume:
            self._resume = allowed
            # Tickets that are out are worth nothing without the keys.
            self._contexts.clear()
            self._sessions.drop(lambda _key, _context: True)

    def server(self, svid: SvidShard, alpn: tuple[str, ...] = MESH_ALPN) -> ssl.SSLContext:
        return self._get("server", svid, alpn)

    def client(self, svid: SvidShard, alpn: tuple[str, ...] = (ALPN_HTTP1,)) -> ssl.SSLContext:
        return self._get("client", svid, alpn)

    def drop(self, identity: SpiffeId) -> None:
        """Renewed or gone, and its sessions with it. Connections made with the contexts go on."""
        for key in [key for key in self._contexts if key[2].identity == identity]:
            del self._contexts[key]
        self._sessions.drop(lambda key, _context: key.svid.identity == identity)

    def _get(self, role: _Role, svid: SvidShard, alpn: tuple[str, ...]) -> ssl.SSLContext:
        key = (role, alpn, svid)
        context = self._contexts.get(key)
        if context is None:
            if role == "server":
                context = server_context(svid, alpn, tickets=self._resume and own_until(svid) > 0)
            else:
                context = client_context(svid, alpn)
            self._contexts[key] = context
            if len(self._contexts) > self._limit:
                _, gone = self._contexts.popitem(last=False)
                # A session keeps its context alive.
                self._sessions.drop(lambda _key, context: context is gone)
        else:
            self._contexts.move_to_end(key)
        return context
