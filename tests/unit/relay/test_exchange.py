"""Edits of heads, octet by octet."""

from __future__ import annotations

import json

import pytest

from netproxy.codec.events import Headers, RequestHead, ResponseHead
from netproxy.decide.match import headers_for_match
from netproxy.errors import Reason
from netproxy.relay.exchange import (
    RequestEdits,
    ResponseEdits,
    authority_of,
    origin_form,
    problem,
    request_for_match,
    request_for_upstream,
    response_for_downstream,
    xfcc_value,
)


def request(headers: Headers, target: bytes = b"/", xfcc: bytes = b"", method: bytes = b"GET") -> RequestHead:
    return request_for_upstream(RequestHead(7, method, target, headers), RequestEdits(xfcc))


HOST = (b"host", b"a")
LENGTH, CHUNKED, TRAILER = (b"content-length", b"3"), (b"transfer-encoding", b"chunked"), (b"trailer", b"x")


def test_what_reads_as_a_forwarded_field_is_not_left_behind_ours() -> None:
    """A gateway that joins them would find it where the reader looks for what we say: last."""
    given = [HOST, (b"x-forwarded-for", b"b"), (b"x_forwarded_for", b"evil"), (b"x-forwarded_proto", b"evil")]
    edits = RequestEdits(client=b"c", forwarded="append")
    made = request_for_upstream(RequestHead(1, b"GET", b"/", given), edits)
    assert made.headers == [HOST, (b"x-forwarded-for", b"b, c"), (b"x-forwarded-proto", b"http")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(b"x-a", b"1"), (b"x-a", b"2")], [(b"x-a", b"1"), (b"x-a", b"2")]),
        ([(b"connection", b"keep-alive"), (b"keep-alive", b"5")], []),
        ([(b"connection", b"X-A , x-b,,"), (b"x-a", b"1"), (b"x-b", b"2")], []),
        ([(b"connection", b"x-a"), (b"connection", b"x-b"), (b"x-b", b"2")], []),
        ([(b"upgrade", b"h2c"), (b"connection", b"upgrade")], []),
        ([(b"proxy-connection", b"close")], []),
        ([(b"x-forwarded-client-cert", b"URI=evil")], []),
        ([(b"x_forwarded_client_cert", b"URI=evil"), (b"x-forwarded_client.cert", b"URI=evil")], []),
        (
            [(b"x-forwarded-client-certs", b"1"), (b"xx_forwarded_client_cer", b"2")],
            [(b"x-forwarded-client-certs", b"1"), (b"xx_forwarded_client_cer", b"2")],
        ),
        ([(b"te", b"gzip")], []),
        ([(b"te", b"xtrailers")], []),
        (
            [(b"te", b"gzip, Trailers;q=1"), (b"x", b"1")],
            [(b"x", b"1"), (b"te", b"trailers"), (b"connection", b"te")],
        ),
        # What follows depends on these, so nobody can have them removed.
        ([(b"connection", b"host, content-length, trailer"), LENGTH, TRAILER], [LENGTH, TRAILER]),
        ([(b"connection", b"transfer-encoding"), CHUNKED], [CHUNKED]),
        ([(b"x-forwarded-client-cert", b"By=me"), (b"x-forwarded-client-cert", b"too")], []),
        ([(b"authorization", b"b"), (b"cookie", b"c")], [(b"authorization", b"b"), (b"cookie", b"c")]),
        ([(b"x-netproxy-reason", b"UF")], [(b"x-netproxy-reason", b"UF")]),
    ],
)
def test_request_headers(before: Headers, after: Headers) -> None:
    assert request([HOST, *before]) == RequestHead(1, b"GET", b"/", [HOST, *after], b"1.1")


def test_the_certificate_header_is_ours_alone() -> None:
    value = xfcc_value("spiffe://a/own", "spiffe://a/peer", "ab" * 32)
    assert value == b"By=spiffe://a/own;Hash=" + b"ab" * 32 + b";URI=spiffe://a/peer"
    headers = [
        (b"host", b"a"),
        (b"x-forwarded-client-cert", b"forged"),
        (b"connection", b"x-forwarded-client-cert"),
    ]
    assert request(headers, xfcc=value).headers == [(b"host", b"a"), (b"x-forwarded-client-cert", value)]


@pytest.mark.parametrize(
    ("target", "origin", "authority"),
    [
        (b"/", b"/", b""),
        (b"/a?b=http://c/", b"/a?b=http://c/", b""),
        (b"*", b"*", b""),
        (b"http://h", b"/", b"h"),
        (b"HTTP://h:80/", b"/", b"h:80"),
        (b"http://h/a/b?c", b"/a/b?c", b"h"),
        (b"http://h?c", b"/?c", b"h"),
        (b"https://[::1]:8/x", b"/x", b"[::1]:8"),
        (b"h:80", b"h:80", b""),
        (b"ftp://h/x", b"ftp://h/x", b""),
    ],
)
def test_origin_form(target: bytes, origin: bytes, authority: bytes) -> None:
    assert origin_form(target) == (origin, authority)


def test_the_authority_of_an_absolute_target_replaces_host() -> None:
    headers = [(b"x", b"1"), (b"host", b"other"), (b"y", b"2")]
    got = request(headers, b"http://web:80/a?b")
    assert got == RequestHead(1, b"GET", b"/a?b", [(b"x", b"1"), (b"host", b"web:80"), (b"y", b"2")])


@pytest.mark.parametrize(
    ("target", "sent"), [(b"*", b"*"), (b"http://h", b"*"), (b"http://h/", b"/"), (b"http://h?x", b"/?x"), (b"/", b"/")]
)
def test_options_about_the_server_stay_so(target: bytes, sent: bytes) -> None:
    """RFC 9112 section 3.2.4: an absolute form without path and query is ``*`` for the last proxy."""
    assert request([(b"host", b"h")], target, method=b"OPTIONS").target == sent


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(b"server", b"x"), (b"set-cookie", b"a"), (b"set-cookie", b"b")], None),
        ([(b"connection", b"close, x-a"), (b"x-a", b"1"), (b"x-b", b"2")], [(b"x-b", b"2")]),
        ([(b"keep-alive", b"timeout=5"), (b"upgrade", b"h2"), (b"proxy-connection", b"x")], []),
        ([(b"x-netproxy-reason", b"NR")], []),
        ([(b"connection", b"content-length"), (b"content-length", b"3")], [(b"content-length", b"3")]),
        ([(b"transfer-encoding", b"chunked"), (b"trailer", b"x")], None),
        ([(b"x-forwarded-client-cert", b"x")], None),
    ],
)
def test_response_headers(before: Headers, after: Headers | None) -> None:
    got = response_for_downstream(ResponseHead(3, 200, before, b"1.0"))
    assert got == ResponseHead(1, 200, before if after is None else after, b"1.1")


def test_what_routes_are_matched_with() -> None:
    def asked(target: bytes, method: bytes = b"GET") -> tuple[str, str, str]:
        request = request_for_match(RequestHead(1, method, target, [(b"a", b"1")]))
        assert request.headers.pop("a") == "1"
        return request.method, request.path, request.query

    assert asked(b"/a/b?c=/d?e") == ("GET", "/a/b", "c=/d?e")
    assert asked(b"http://h/a?b") == ("GET", "/a", "b")
    assert asked(b"http://h") == ("GET", "/", "")
    assert asked(b"/\xe9") == ("GET", "/\xe9", "")
    assert asked(b"*", b"OPTIONS") == ("OPTIONS", "*", "")
    assert asked(b"host:443", b"CONNECT") == ("CONNECT", "", "")
    assert headers_for_match([(b"a", b"1"), (b"b", b"\xe9"), (b"a", b"2")]) == {"a": "1,2", "b": "\xe9"}
    assert headers_for_match([]) == {}


def test_rules_look_at_the_host_that_goes_on() -> None:
    """RFC 9112 section 3.2.2: what is in the field beside an absolute-form target is nobody's word."""
    for target, method, host in (
        (b"/", b"GET", b"other"),
        (b"http://web:80/", b"GET", b"web:80"),
        (b"web:443", b"CONNECT", b"web:443"),
    ):
        head = RequestHead(1, method, target, [(b"host", b"other")])
        assert request_for_match(head).headers == {"host": host.decode()}
        assert request_for_upstream(head).headers == [(b"host", host)]


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.info.status])
def test_problem(reason: Reason) -> None:
    head, body = problem(reason, "why", "HTTPRoute a/b", [f"10.0.0.{n}:80" for n in range(20)])
    fields = json.loads(body)
    assert body.endswith(b"}\n")
    assert fields == {
        "type": "about:blank",
        "title": reason.info.title,
        "status": reason.info.status,
        "reason": reason.name,
        "detail": "why",
        "decided_by": "HTTPRoute a/b",
        "endpoints_tried": [f"10.0.0.{n}:80" for n in range(8)],
    }
    assert head == ResponseHead(
        1,
        reason.info.status,
        [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-netproxy-reason", reason.info.flag.encode()),
        ],
    )


def test_problem_says_no_more_than_it_knows() -> None:
    head, body = problem(Reason.DOWNSTREAM_PROTOCOL, "", "", (), status=505)
    assert head.status == 505
    assert set(json.loads(body)) == {"type", "title", "status", "reason"}
    _, body = problem(Reason.NO_ROUTE, 'é\n"' * 5000, "", ())
    assert body.isascii()
    assert body.count(b"\n") == 1
    assert len(json.loads(body)["detail"]) == 1000


def test_a_missing_host_is_what_was_dialled() -> None:
    """HTTP/1.0 may leave it out, the HTTP/1.1 that goes on may not."""
    head = RequestHead(1, b"GET", b"/", [(b"x", b"1")], b"1.0")
    assert request_for_upstream(head, RequestEdits(dialled=b"web:81")).headers == [(b"host", b"web:81"), (b"x", b"1")]
    named = head.replace(headers=[HOST])
    assert request_for_upstream(named, RequestEdits(dialled=b"web:81")).headers == [HOST]
    absolute = head.replace(target=b"http://h/")
    assert request_for_upstream(absolute, RequestEdits(dialled=b"web:81")).headers == [(b"host", b"h"), (b"x", b"1")]


@pytest.mark.parametrize(
    ("host", "port", "authority"),
    [("10.0.0.1", 80, b"10.0.0.1"), ("10.0.0.1", 81, b"10.0.0.1:81"), ("::1", 80, b"[::1]"), ("::1", 81, b"[::1]:81")],
)
def test_authority_of(host: str, port: int, authority: bytes) -> None:
    assert authority_of(host, port) == authority


def test_the_reason_of_another_agent_stays() -> None:
    head = ResponseHead(1, 503, [(b"x-netproxy-reason", b"UF"), (b"connection", b"x"), (b"x", b"1")])
    assert response_for_downstream(head, ResponseEdits(from_agent=True)).headers == [(b"x-netproxy-reason", b"UF")]
