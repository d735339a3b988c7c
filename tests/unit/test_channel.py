from __future__ import annotations

import gc
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from netproxy import channel as module
from netproxy.channel import MAX_BODY, MAX_FDS, Channel, ChannelBroken, Message, memfd_with, read_memfd, socket_pair


def open_fds() -> int:
    gc.collect()  # what tests before this one left to the collector is not ours to count
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Whatever a test does, no descriptor is left."""
    before = open_fds()
    a, b = (Channel(sock) for sock in socket_pair())
    yield a, b
    a.close()
    b.close()
    assert open_fds() == before


Ends = tuple[Channel, Channel]


def receive_all(channel: Channel) -> list[Message]:
    out = []
    while (message := channel.receive()) is not None:
        out.append(message)
    return out


def fill(channel: Channel, op: str = "fill") -> int:
    """Send until the socket takes no more; the last one is queued."""
    n = 0
    while not channel.wants_write:
        channel.send(op, n=n, pad="x" * 1000)
        n += 1
    return n


def test_fields_and_order(ends: Ends) -> None:
    a, b = ends
    assert b.receive() is None
    a.send("hello", v=1, role="worker", nested=[["é", None]])
    a.send("empty")
    b.send("back")
    assert b.receive() == Message("hello", {"v": 1, "role": "worker", "nested": [["é", None]]}, [], b"")
    assert b.receive() == Message("empty", {}, [], b"")
    assert b.receive() is None
    assert a.receive() == Message("back", {}, [], b"")


@pytest.mark.parametrize("body", [b"", b"x", os.urandom(3 << 20)], ids=len)
def test_bodies(ends: Ends, body: bytes) -> None:
    a, b = ends
    for _ in range(3):
        a.send("shard", body=body, key="k")
    assert receive_all(b) == [Message("shard", {"key": "k"}, [], body)] * 3


def test_descriptors_arrive_in_order_and_stay_the_callers(ends: Ends) -> None:
    a, b = ends
    sent = [memfd_with("x", str(number).encode()) for number in range(MAX_FDS - 1)]
    a.send("listen", sent, body=b"body", n=1)
    message = b.receive()
    assert message is not None
    assert [read_memfd(fd) for fd in message.fds] == [str(n).encode() for n in range(MAX_FDS - 1)]
    assert message.body == b"body"
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    for fd in sent + message.fds:
        os.close(fd)


def test_too_much_is_refused_and_nothing_is_left(ends: Ends) -> None:
    a, b = ends
    fds = [a.fileno()] * MAX_FDS
    before = open_fds()
    with pytest.raises(ValueError, match="65 descriptors"):
        a.send("listen", fds, body=b"x")
    with pytest.raises(ValueError, match="use a body"):
        a.send("listen", body=b"x", pad="x" * 70_000)
    with pytest.raises(TypeError):
        a.send("listen", body=b"x", field=object())
    assert open_fds() == before
    assert b.receive() is None


def test_a_peer_that_does_not_read_is_waited_for(ends: Ends) -> None:
    a, b = ends
    n = fill(a)
    gone = memfd_with("x", b"later")
    a.send("fd", [gone])
    a.send("body", body=b"much later")
    os.close(gone)  # it was duplicated
    a.flush()
    assert a.wants_write
    got: list[Message] = []
    while a.wants_write:
        got += receive_all(b)
        a.flush()
    got += receive_all(b)
    assert [message.fields.get("n") for message in got] == [*range(n), None, None]
    assert read_memfd(got[-2].fds[0]) == b"later"
    assert got[-1].body == b"much later"
    os.close(got[-2].fds[0])


def test_what_is_sent_later_does_not_overtake(ends: Ends) -> None:
    a, b = ends
    n = fill(a)
    receive_all(b)
    a.send("late")  # the socket has room, the queue goes first
    assert b.receive() is None
    a.flush()
    assert [(message.op, message.fields.get("n")) for message in receive_all(b)] == [("fill", n - 1), ("late", None)]


def test_the_queue_is_bounded(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = ends
    monkeypatch.setattr(module, "MAX_QUEUED", 3)
    fill(a)
    a.send("two", [a.fileno()])
    a.send("three", body=b"x")
    with pytest.raises(ChannelBroken, match="does not read"):
        a.send("four", [a.fileno()], body=b"x")


def test_the_end_of_the_peer(ends: Ends) -> None:
    a, b = ends
    b.send("last", body=b"words")
    b.close()
    message = a.receive()
    assert message is not None
    assert message.body == b"words"
    with pytest.raises(ChannelBroken, match="end of stream"):
        a.receive()
    with pytest.raises(ChannelBroken):
        a.send("hello", body=b"x")


def test_the_end_of_the_peer_while_something_is_queued(ends: Ends) -> None:
    a, b = ends
    fill(a)
    a.send("fd", [a.fileno()])
    b.close()
    with pytest.raises(ChannelBroken):
        a.flush()
    assert a.wants_write


def test_unread_descriptors_go_with_the_channel(ends: Ends) -> None:
    a, _ = ends
    before = open_fds()
    for _ in range(10):
        a.send("fd", [a.fileno()], body=b"x")
    assert open_fds() == before


def test_without_descriptors_left_the_message_is_lost_and_says_so(ends: Ends) -> None:
    a, b = ends
    a.send("fds", [a.fileno()] * 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
    try:
        fillers = []
        try:
            while True:
                fillers.append(os.dup(0))
        except OSError:
            os.close(fillers.pop())
        with pytest.raises(ChannelBroken, match="cut short"):
            b.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)


def test_reading_a_memfd_does_not_move_it() -> None:
    fd = memfd_with("x", b"body")
    assert [read_memfd(fd), read_memfd(fd), os.read(fd, 10)] in ([b"body", b"body", b""], [b"body"] * 3)
    os.close(fd)


def test_datagrams_keep_their_bounds() -> None:
    ours, theirs = socket_pair()
    with ours, theirs:
        assert ours.type & 0xF == socket.SOCK_SEQPACKET


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"[]",
        b"{}",
        b'{"op":"a"}',
        b'{"body":false}',
        b'{"op":1,"body":false}',
        b'{"op":"a","body":true}',
        b"\xff",
    ],
)
def test_a_malformed_message_breaks_the_channel_and_nothing_else(data: bytes) -> None:
    ours, theirs = socket_pair()
    with theirs:
        channel = Channel(ours)
        theirs.send(data)
        with pytest.raises(ChannelBroken):
            channel.receive()
        channel.close()


def test_a_body_has_a_bound() -> None:
    ours, theirs = socket_pair()
    with theirs:
        channel = Channel(ours)
        fd = os.memfd_create("large")
        os.ftruncate(fd, MAX_BODY + 1)
        socket.send_fds(theirs, [b'{"op":"a","body":true}'], [fd])
        os.close(fd)
        before = open_fds()
        with pytest.raises(ChannelBroken, match="limit"):
            channel.receive()
        assert open_fds() == before
        channel.close()


def test_queued_bodies_hold_no_descriptors() -> None:
    ours, theirs = socket_pair()
    channel, peer = Channel(ours), Channel(theirs)
    before = open_fds()
    sent = 0
    while sent < 5000 or not channel.wants_write:
        channel.send("shard", key=str(sent), body=b"x" * 100)
        sent += 1
    # What waits in the socket holds its own (not in this table); what waits here holds none.
    assert open_fds() == before
    got = 0
    while got < sent:
        message = peer.receive()
        if message is None:
            channel.flush()
            continue
        assert (message.fields["key"], message.body) == (str(got), b"x" * 100)
        got += 1
    channel.close()
    peer.close()
