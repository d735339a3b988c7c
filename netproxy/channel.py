"""Messages with file descriptors between the supervisor and its children. Standard library only.

A channel is one end of an AF_UNIX SOCK_SEQPACKET pair. A message is one datagram: a JSON object
``{"op": ..., ...}`` and up to `MAX_FDS` descriptors. A `body` (bytes of any length) travels as a memfd of its
own, which is always the last descriptor. The takeover protocol, version `VERSION`:

==============  =======================  ==========================================================
op              who -> whom              meaning (fields; descriptors)
==============  =======================  ==========================================================
hello           child -> supervisor      v, role, slot: I am up, tell me everything
welcome         supervisor -> child      v, settings...; arena
shard/unshard   supervisor -> worker     key, version; body: one piece of the snapshot came or went
listen          supervisor -> worker     workload, sockets [[kind, family]...], dial (families); the listeners
                                         (kinds outbound, inbound, dns, dns-tcp): these and no others
unlisten        supervisor -> worker     workload: give its listeners (and connections) up
synced          supervisor -> child      everything known so far was sent
ready           child -> supervisor      it is in effect
listening       worker -> supervisor     workload: accepting there
access_log      supervisor -> worker     the descriptor that lines go to from now on
log_level       brain -> supervisor      level: of all our own messages from now on
                supervisor -> worker
sockets         worker <-> supervisor    id, workload, family, kind (stream, dgram), n: unconnected, marked
                                         sockets please
put/drop        brain -> supervisor      key, version; body: store a shard and pass it on
attach          brain <-> supervisor     id, workload, families (of listeners), dial_families (that the pod has),
                                         dns_port (0: no names), ...; netns: listeners please / they are there
listeners       brain <-> supervisor     id, workload, family, slots: inbound listeners, for eBPF; who asks is told
                                         by `resteer` when there are others
own             brain -> supervisor      workload; keep this steering alive (may be none)
detach          brain -> supervisor      workload: rules are gone, close what is open there
state           brain <-> supervisor     id: who runs, what is attached, which shards are stored
resteer         supervisor -> brain      body, workloads; released (just now): steering is not there, put it back
stop            supervisor -> brain      take all steering off
unsteered       brain -> supervisor      body, workloads: those whose rules are off while their hooks stay
leave           supervisor -> brain      exit now, touch nothing: a newer one takes over
drain           supervisor -> worker     deadline_s: finish what is under way and exit
finish          supervisor -> brain      workers are gone, remove the rest and exit
==============  =======================  ==========================================================

Sending never blocks: what the socket does not take waits in a queue of at most `MAX_QUEUED` messages;
a peer that lets it overflow is broken, `ChannelBroken` is raised and the owner ends the peer.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

VERSION = 1
MAX_FDS = 64
MAX_QUEUED = 100_000
MAX_BODY = 256 * 1024 * 1024
_MAX_HEADER = 64 * 1024
_SNDBUF = 4 * 1024 * 1024


class ChannelBroken(Exception):
    """The peer is gone, or does not read."""


class Message(NamedTuple):
    op: str
    fields: dict[str, Any]
    fds: list[int]
    """Owned by the receiver; the body's descriptor is not among them."""
    body: bytes


def socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        # The default (about 200 KiB) would queue a start-up with many workloads in user space.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF)
    return ours, theirs


def memfd_with(name: str, body: bytes) -> int:
    """A descriptor holding `body`, offset at its start. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(body)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def read_memfd(fd: int) -> bytes:
    """All of a memfd, without moving its (shared) offset. ValueError when it is larger than `MAX_BODY`."""
    size = os.fstat(fd).st_size
    if size > MAX_BODY:
        raise ValueError(f"a body of {size} octets, the limit is {MAX_BODY}")
    return os.pread(fd, size, 0)


def _message(data: bytes, received: list[int]) -> Message:
    """Takes the body's descriptor out of `received`. Raises whatever malformed input makes it raise."""
    fields = json.loads(data)
    body = b""
    if fields.pop("body"):
        body_fd = received.pop()
        try:
            body = read_memfd(body_fd)
        finally:
            os.close(body_fd)
    op = fields.pop("op")
    if not isinstance(op, str):
        raise TypeError("op is no text")
    return Message(op, fields, received, body)


class Channel:
    """One end. The owner watches `fileno()` for reading, and for writing while `wants_write`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._queue: deque[tuple[bytes, list[int], bytes | None]] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._queue)

    def send(self, op: str, fds: tuple[int, ...] | list[int] = (), body: bytes | None = None, **fields: Any) -> None:
        """Queue or send one message. `fds` stay the caller's; they are duplicated if need be.

        Raises ChannelBroken, ValueError when there are more than `MAX_FDS` descriptors.
        """
        count = len(fds) + (body is not None)
        if count > MAX_FDS:
            raise ValueError(f"{count} descriptors in one message, the limit is {MAX_FDS}")
        data = json.dumps({"op": op, "body": body is not None, **fields}, separators=(",", ":")).encode()
        if len(data) > _MAX_HEADER:
            raise ValueError(f"message {op!r} of {len(data)} octets, the limit is {_MAX_HEADER}: use a body")
        if not self._queue and self._send_now(data, fds, body):
            return
        if len(self._queue) >= MAX_QUEUED:
            raise ChannelBroken("the peer does not read")
        kept: list[int] = []
        try:
            kept.extend(os.dup(fd) for fd in fds)
        except OSError as exc:
            for fd in kept:
                os.close(fd)
            raise ChannelBroken(str(exc)) from exc
        self._queue.append((data, kept, body))

    def _send_now(self, data: bytes, fds: Sequence[int], body: bytes | None) -> bool:
        """The body becomes a descriptor only now, so that a queue of a thousand shards needs none."""
        made = -1
        try:
            if body is not None:
                made = memfd_with("netproxy-body", body)
            out = array.array("i", [*fds, made] if made >= 0 else fds)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, out)] if out else []
            self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise ChannelBroken(str(exc)) from exc
        finally:
            if made >= 0:
                os.close(made)
        return True

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        while self._queue and self._send_now(*self._queue[0]):
            for fd in self._queue.popleft()[1]:
                os.close(fd)

    def receive(self) -> Message | None:
        """The next message, None when there is none yet. Raises ChannelBroken at the peer's end."""
        fds = array.array("i")
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                _MAX_HEADER, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as exc:
            raise ChannelBroken(str(exc)) from exc
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        received = list(fds)
        if not data:
            raise ChannelBroken("end of stream")
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            for fd in received:
                os.close(fd)
            raise ChannelBroken("a message was cut short (descriptor limit reached?)")
        try:
            return _message(data, received)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as exc:
            for fd in received:
                os.close(fd)
            raise ChannelBroken(f"a malformed message: {exc!r}") from exc

    def close(self) -> None:
        for _, fds, _ in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        self.sock.close()
