from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netproxy.accept.sniff import NO_NAME, PEEK, ClientHello, Protocol, client_hello, missing, sniff

from .hellos import client_hello as make_hello
from .hellos import in_records

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
OURS = ("netproxy/http/1.1", "netproxy/tcp")


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (b"", None),
        # HTTP/1
        (b"G", None),
        (b"GET", None),
        (b"GET ", Protocol.HTTP1),
        (b"PUT\t", Protocol.HTTP1),
        (b"CONNECT ", None),
        (b"CONNECT web:80 HTTP/1.1\r\n", Protocol.HTTP1),
        (b'CONNECT {"verbose":false}\r\n', Protocol.OPAQUE),
        (b"PATCH /", Protocol.HTTP1),
        (b"GETX /", Protocol.HTTP1),
        (b"M-SEARCH * HTTP/1.1", Protocol.HTTP1),
        (b"PROPFIND /", Protocol.HTTP1),
        (b"PROPFIND http://h/", Protocol.HTTP1),
        (b"PROPFIND https://h/", Protocol.HTTP1),
        (b"PROPFIND htt", None),
        (b"PROPFIND *", None),
        (b"PROPFIND x", None),
        (b"PROPFIND x\r\n", Protocol.OPAQUE),
        (b"PROPFIND x HTTP/1.1", None),
        (b"PROPFIND x HTTP/1.1\r\n", Protocol.HTTP1),
        (b"propfind x http/1.1\n", Protocol.HTTP1),
        (b"PROPFIND\t/", Protocol.HTTP1),
        (b"PROPFIND\x1c\xa0/", Protocol.HTTP1),
        (b"a" * 24 + b" /", Protocol.HTTP1),
        (b"a" * 24, None),
        (b"a" * 25, None),
        (b"a" * 25 + b" /", Protocol.HTTP1),
        (b"a" * 9000 + b" /", Protocol.HTTP1),
        (b"a" * PEEK, Protocol.HTTP1),
        (b"a" * PEEK + b" /", Protocol.HTTP1),
        (b"a" * 25 + b"\r\n", Protocol.OPAQUE),
        (b"\r", None),
        (b"\r\n", None),
        (b"\r\nGET /", Protocol.HTTP1),
        (b"\nGET /", Protocol.HTTP1),
        (b"\r\n\r\nGET /", Protocol.HTTP1),
        (b"\r\n" * 32 + b"GET /", Protocol.HTTP1),
        (b"\r\n" * 32, None),
        (b"\r\n" * 32 + b"\r", Protocol.HTTP1),
        (b"\r\n\0", Protocol.OPAQUE),
        (b"\r\nhello\r\n", Protocol.OPAQUE),
        (b" GET /", Protocol.HTTP1),
        (b"get /", Protocol.HTTP1),
        # HTTP/2
        (b"P", None),
        (b"PRI * HTTP/2.0\r\n", None),
        (PREFACE[:-1], None),
        (PREFACE, Protocol.HTTP2),
        (PREFACE + b"\0\0\0", Protocol.HTTP2),
        (b"PRI * HTTP/2.0\r\nX", Protocol.HTTP2),
        (b"PRI * HTTP/1.1", Protocol.HTTP1),
        # TLS
        (b"\x16", None),
        (b"\x16\x03", None),
        (b"\x16\x03\x01", None),
        (b"\x16\x03\x01\x00\x05\x01", None),
        (b"\x16\x02\x01", Protocol.OPAQUE),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", Protocol.TLS),
        (b"\x15\x03\x01\x00\x02\x02\x28", Protocol.OPAQUE),
        # others
        (b"SSH-2.0-OpenSSH_9.2\r\n", Protocol.OPAQUE),
        (b"*1\r\n$4\r\nPING\r\n", Protocol.OPAQUE),
        (b"\x00", Protocol.OPAQUE),
        (b"\x10\x1a\x00\x04MQTT", Protocol.OPAQUE),
        (b"EHLO mail\r\n", Protocol.OPAQUE),
        (b"\xff\xfe", Protocol.OPAQUE),
    ],
)
def test_verdicts(data: bytes, verdict: Protocol | None) -> None:
    assert sniff(data) is verdict


@pytest.mark.parametrize("sni", ["", "web.shop.svc", "a" * 63 + ".example"])
@pytest.mark.parametrize("alpn", [(), ("h2", "http/1.1"), OURS, ("h2", OURS[0])], ids=str)
@pytest.mark.parametrize("record", [16384, 100, 3, 1])
def test_real_hellos_split_at_every_octet(sni: str, alpn: tuple[str, ...], record: int) -> None:
    hello = in_records(make_hello(sni, alpn), record)
    expected = Protocol.MESH_TLS if set(alpn) & set(OURS) else Protocol.TLS
    step = 1 if record > 50 else 13
    for cut in range(0, len(hello), step):
        assert sniff(hello[:cut]) is None
    assert sniff(hello) is expected
    assert sniff(hello + b"\x17\x03\x03\x00\x01\x00") is expected
    assert client_hello(hello) == ClientHello(sni, tuple(name.encode() for name in alpn))


@pytest.mark.parametrize("record", [1, 3, 100, 10_000])
def test_a_hello_in_small_pieces_is_looked_through_seldom(record: int) -> None:
    """With every octet, one client with 250 segments a second took all of a worker's time."""
    hello = in_records(make_hello("web.example", tuple(f"protocol-{number}" for number in range(30))), record)
    at, looks = 1, 0
    while sniff(hello[:at]) is None:
        looks += 1
        step = missing(hello[:at])
        assert all(sniff(hello[:between]) is None for between in (at + 1, at + step // 2, at + step - 1) if step > 1)
        at += step
    assert at == len(hello)
    assert looks < 60


def test_a_name_that_only_contains_ours_is_not_ours() -> None:
    assert sniff(make_hello("", ("xnetproxy/tcp", "netproxy"))) is Protocol.TLS


def test_a_hello_larger_than_what_is_peeked_is_not_ours() -> None:
    hello = b"\x16\x03\x01\x40\x00\x01\x00\x50\x00" + bytes(PEEK)
    assert sniff(hello[: PEEK - 1]) is None
    assert sniff(hello[:PEEK]) is Protocol.TLS


@pytest.mark.parametrize("at", range(5, 200))
def test_a_damaged_hello_is_never_an_error(at: int) -> None:
    hello = bytearray(make_hello("web.shop.svc", OURS))
    for value in (0x00, 0x01, 0x7F, 0xFF):
        hello[at] = value
        assert sniff(bytes(hello)) in (None, Protocol.TLS, Protocol.MESH_TLS)


def test_a_name_that_can_t_be_read_is_not_the_same_as_none() -> None:
    hello = make_hello("web.shop.svc", OURS).replace(b"web.shop.svc", b"web.\xff\xfeop.svc")
    assert client_hello(hello) == ClientHello(NO_NAME, tuple(name.encode() for name in OURS))
    assert client_hello(b"\x16\x03\x01\x00\x04\x02\x00\x00\x00") == ClientHello(NO_NAME, ())


@pytest.mark.parametrize(
    ("extensions", "sni"),
    [
        ("", ""),
        ("0000 0006 0004 00 0001 61", "a"),
        # Twice, two names in one list, another type of name, lengths that do not fit, an empty name.
        ("0000 0006 0004 00 0001 61 0000 0006 0004 00 0001 62", NO_NAME),
        ("0000 000a 0008 00 0001 61 00 0001 62", NO_NAME),
        ("0000 0006 0004 01 0001 61", NO_NAME),
        ("0000 0006 0005 00 0001 61", NO_NAME),
        ("0000 0006 0004 00 0002 61", NO_NAME),
        ("0000 0005 0003 00 0000", NO_NAME),
        ("0000 0000", NO_NAME),
    ],
)
def test_one_name_once(extensions: str, sni: str) -> None:
    assert client_hello(_with_extensions(bytes.fromhex(extensions))) == ClientHello(sni, ())


first = st.sampled_from(
    (
        b"",
        b"\r\n",
        b"GET ",
        b"X y",
        b"\n" * 63,
        b"PRI * HTTP/2.0\r\n",
        b"\x16",
        b"\x16\x03\x01",
        b"\x16\x03\x01\x00\x40\x01\x00\x00\x3c",
    )
)
data = st.builds(bytes.__add__, first, st.binary(max_size=120)) | st.text("AGETPRI */:htps\r\n", max_size=40).map(
    str.encode
)


@given(data, st.binary(max_size=60))
@example(b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\x00\x04\x02\x00\x00\x00")
@example(b"a" * 24, b" /")
def test_a_verdict_never_changes(start: bytes, more: bytes) -> None:
    verdict = sniff(start)
    if verdict is not None:
        assert sniff(start + more) is verdict
    elif sniff(start + more) is not None:
        # And it had been open all the way before.
        decided = next(n for n in range(len(start), len(start + more) + 1) if sniff((start + more)[:n]) is not None)
        assert all(sniff((start + more)[:n]) is None for n in range(len(start), decided))


def _with_extensions(extensions: bytes) -> bytes:
    body = bytes(34) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00" + len(extensions).to_bytes(2, "big") + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


HOSTILE = {
    "records without octets": b"\x16\x03\x01\x00\x00" * (PEEK // 5),
    "records of one octet": b"\x16\x03\x01\x00\x01\x01" * (PEEK // 6),
    "extensions without octets": _with_extensions(bytes.fromhex("ffff0000") * 4000),
    "names without octets": _with_extensions(b"\x00\x10\x3e\x80\x3e\x7e" + bytes(0x3E7E)),
    "names of one octet": _with_extensions(b"\x00\x10\x3e\x80\x3e\x7e" + b"\x01a" * (0x3E7E // 2)),
    "a token without end": b"a" * PEEK,
    "spaces": b"GE" + b" " * PEEK,
    "line ends": b"\r\n" * (PEEK // 2),
    "a length that lies": b"\x16\x03\x01\xff\xff\x01\xff\xff\xff" + bytes(PEEK - 9),
}


@pytest.mark.parametrize("octets", HOSTILE.values(), ids=HOSTILE)
def test_hostile_openings_take_linear_time(octets: bytes) -> None:
    def cost(part: bytes) -> float:
        best = float("inf")
        for _ in range(5):
            begun = time.process_time()
            sniff(part)
            best = min(best, time.process_time() - begun)
        return best

    # 64 times as many octets; quadratic work would be 4096 times as much.
    assert cost(octets) <= 400 * max(cost(octets[: len(octets) // 64]), 20e-6)
