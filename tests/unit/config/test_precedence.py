"""Which rule decides about a request: from the files to the decision, row by row.

The first tables are those of the Gateway API's conformance tests (httproute-matching, -matching-across-routes,
-exact-path-matching, -header-matching, -method-matching, -query-param-matching, -path-match-order) as far as they hold
in a mesh, where host names have no part in it. Backends are named after what the rows expect; "" is 404.
"""

from __future__ import annotations

import functools
import re

import pytest

from netproxy.addr import ServiceKey
from netproxy.decide.match import Request
from netproxy.decide.route import Tables
from netproxy.errors import Reason, Refused

from .meshes import build, route, service, to, workload

OLD, YOUNG = "creationTimestamp: 2025-01-01T00:00:00Z", "creationTimestamp: 2025-02-01T00:00:00Z"


def prefix(path: str) -> str:
    return f"path: {{value: {path}}}"


def exact(path: str) -> str:
    return f"path: {{type: Exact, value: {path}}}"


def regex(pattern: str) -> str:
    return f"path: {{type: RegularExpression, value: '{pattern}'}}"


def headers(**values: str) -> str:
    return "headers: [" + ", ".join(f"{{name: {name}, value: {value}}}" for name, value in values.items()) + "]"


def query(**values: str) -> str:
    return "queryParams: [" + ", ".join(f"{{name: {name}, value: {value}}}" for name, value in values.items()) + "]"


def rule(backend: str, *matches: str) -> str:
    return f"{{matches: [{', '.join(f'{{{match}}}' for match in matches)}], backendRefs: [{to(backend)}]}}"


MATCHING = (
    rule("v1", prefix("/"), headers(version="one")),
    rule("v2", prefix("/v2"), headers(version="two")),
)
EXACT = (rule("v1", exact("/one")), rule("v2", exact("/two")))
HEADERS = (
    rule("v1", headers(version="one")),
    rule("v2", headers(version="two")),
    rule("v1", headers(version="two", color="orange")),
    rule("v1", headers(color="blue"), headers(color="green")),
    rule("v2", headers(color="red"), headers(color="yellow")),
)
METHODS = (
    rule("v1", "method: POST"),
    rule("v2", "method: GET"),
    rule("v1", f"{prefix('/path1')}, method: GET"),
    rule("v2", f"{headers(version='one')}, method: PUT"),
    rule("v3", f"{prefix('/path2')}, {headers(version='two')}, method: POST"),
    rule("v1", f"{prefix('/path3')}, method: PATCH", f"{prefix('/path4')}, {headers(version='three')}, method: DELETE"),
    rule("v1", prefix("/path5")),
    rule("v2", "method: PATCH"),
    rule("v3", headers(version="four")),
)
QUERIES = (
    rule("v1", query(animal="whale")),
    rule("v2", query(animal="dolphin")),
    rule("v3", query(animal="dolphin", color="blue")),
    rule("v3", query(ANIMAL="Whale")),
    rule("v1", f"{prefix('/path1')}, {query(animal='whale')}"),
    rule("v2", f"{headers(version='one')}, {query(animal='whale')}"),
    rule("v3", f"{prefix('/path2')}, {headers(version='two')}, {query(animal='whale')}"),
    rule(
        "v1",
        f"{prefix('/path3')}, {query(animal='shark')}",
        f"{prefix('/path4')}, {headers(version='three')}, {query(animal='kraken')}",
    ),
    rule("v1", prefix("/path5")),
    rule("v2", query(animal="hydra")),
    rule("v3", headers(version="four")),
)
PATHS = (
    rule("v3", prefix("/match")),
    rule("v1", prefix("/match/prefix")),
    rule("v2", prefix("/match/prefix/one")),
    rule("v1", exact("/match")),
    rule("v2", exact("/match/exact")),
    rule("v3", exact("/match/exact/one")),
)
# What the API leaves to us, and each step of its order that the tables above do not show by itself.
ORDER = (
    rule("all", prefix("/")),
    rule("long", prefix("/a/bcdef")),
    rule("regex", regex("/a/.*")),
    rule("longregex", regex("/a/[b-z]+x")),
    rule("exact", exact("/a/bx")),
    rule("methodregex", f"{regex('/a/.*')}, method: PUT"),
    rule("query", f"{prefix('/q')}, {query(a='x')}"),
    rule("queries", f"{prefix('/q')}, {query(a='x', b='y')}"),
    rule("header", f"{prefix('/q')}, {headers(h='z')}"),
    rule("method", f"{prefix('/q')}, method: POST"),
    rule("first", exact("/same")),
    rule("second", exact("/same")),
)
EXPRESSIONS = (
    rule("version", regex("/v[0-9]+(/.*)?")),
    rule("header", "headers: [{type: RegularExpression, name: X-Tester, value: '(?i)yes|true'}]"),
    rule("query", "queryParams: [{type: RegularExpression, name: id, value: '[0-9]{3}'}]"),
)

ROWS = [
    (MATCHING, "/", "v1"),
    (MATCHING, "/example", "v1"),
    (MATCHING, "/ version=one", "v1"),
    (MATCHING, "/v2", "v2"),
    (MATCHING, "/v2/", "v2"),
    (MATCHING, "/v2/example", "v2"),
    (MATCHING, "/ version=two", "v2"),
    (MATCHING, "/v2example", "v1"),
    (MATCHING, "/foo/v2/example", "v1"),
    (EXACT, "/one", "v1"),
    (EXACT, "/two", "v2"),
    (EXACT, "/", ""),
    (EXACT, "/one/example", ""),
    (EXACT, "/two/", ""),
    (EXACT, "/Two", ""),
    (HEADERS, "/ version=one", "v1"),
    (HEADERS, "/ version=two", "v2"),
    (HEADERS, "/ version=two color=orange", "v1"),
    (HEADERS, "/ version=two color=blue", "v2"),
    (HEADERS, "/ color=orange", ""),
    (HEADERS, "/ some-other-header=one", ""),
    (HEADERS, "/ color=blue", "v1"),
    (HEADERS, "/ color=green", "v1"),
    (HEADERS, "/ color=red", "v2"),
    (HEADERS, "/ color=yellow", "v2"),
    (HEADERS, "/ color=purple", ""),
    (METHODS, "POST /", "v1"),
    (METHODS, "GET /", "v2"),
    (METHODS, "HEAD /", ""),
    (METHODS, "GET /path1", "v1"),
    (METHODS, "PUT / version=one", "v2"),
    (METHODS, "POST /path2 version=two", "v3"),
    (METHODS, "PATCH /path3", "v1"),
    (METHODS, "DELETE /path4 version=three", "v1"),
    (METHODS, "PUT /", ""),
    (METHODS, "DELETE /path4", ""),
    (METHODS, "PATCH /path5", "v1"),
    (METHODS, "PATCH / version=four", "v2"),
    (QUERIES, "/?animal=whale", "v1"),
    (QUERIES, "/?animal=dolphin", "v2"),
    (QUERIES, "/?animal=dolphin&color=blue", "v3"),
    (QUERIES, "/?ANIMAL=Whale", "v3"),
    (QUERIES, "/?animal=whale&otherparam=irrelevant", "v1"),
    (QUERIES, "/?animal=dolphin&color=yellow", "v2"),
    (QUERIES, "/?color=blue", ""),
    (QUERIES, "/?animal=dog", ""),
    (QUERIES, "/?animal=whaledolphin", ""),
    (QUERIES, "/", ""),
    (QUERIES, "/path1?animal=whale", "v1"),
    (QUERIES, "/?animal=whale version=one", "v2"),
    (QUERIES, "/path2?animal=whale version=two", "v3"),
    (QUERIES, "/path3?animal=shark", "v1"),
    (QUERIES, "/path4?animal=kraken version=three", "v1"),
    (QUERIES, "/?animal=shark", ""),
    (QUERIES, "/path4?animal=kraken", ""),
    (QUERIES, "/path5?animal=hydra", "v1"),
    (QUERIES, "/?animal=hydra version=four", "v3"),
    (QUERIES, "/?animal=dog&animal=whale", ""),  # the first of a repeated parameter counts
    (PATHS, "/match/exact/one", "v3"),
    (PATHS, "/match/exact", "v2"),
    (PATHS, "/match", "v1"),
    (PATHS, "/match/prefix/one/any", "v2"),
    (PATHS, "/match/prefix/any", "v1"),
    (PATHS, "/match/any", "v3"),
    (ORDER, "/a/bx", "exact"),
    (ORDER, "/a/bcx", "longregex"),
    (ORDER, "/a/bcdef", "regex"),  # however long a prefix is
    (ORDER, "PUT /a/bcx", "longregex"),  # length before method
    (ORDER, "PUT /a/bcdef", "methodregex"),
    (ORDER, "/q?a=x", "query"),
    (ORDER, "/q?a=x&b=y", "queries"),
    (ORDER, "/q?a=x&b=y h=z", "header"),
    (ORDER, "POST /q?a=x&b=y h=z", "method"),
    (ORDER, "/same", "first"),
    (ORDER, "/a", "all"),
    (EXPRESSIONS, "/v2", "version"),
    (EXPRESSIONS, "/v12/x", "version"),
    (EXPRESSIONS, "/v12x", ""),  # the whole path
    (EXPRESSIONS, "/x/v2", ""),
    (EXPRESSIONS, "/ x-tester=TRUE", "header"),
    (EXPRESSIONS, "/ x-tester=yes!", ""),
    (EXPRESSIONS, "/?id=123", "query"),
    (EXPRESSIONS, "/?id=1234", ""),
    (EXPRESSIONS, "/?ID=123", ""),
]


@functools.cache
def tables(*routes: str) -> Tables:
    names = sorted(set(re.findall(r"backendRefs: \[{name: (\w+)", " ".join(routes))))
    endpoints = [workload(name, f"10.0.0.{number}") for number, name in enumerate(names, 1)]
    snapshot = build(service("web"), *map(service, names), *endpoints, *routes)
    assert snapshot.rejected == ()
    made = Tables(lambda: 0.0)
    for shard in snapshot.shards.values():
        made.put(shard)
    assert made.broken_patterns == 0
    return made


def decide(made: Tables, text: str) -> str:
    """``[METHOD ]path[?query][ header=value]...``"""
    words = text.split()
    method = words.pop(0) if not words[0].startswith("/") else "GET"
    path, _, parameters = words[0].partition("?")
    fields = dict(word.split("=", 1) for word in words[1:])
    port = made.ports[ServiceKey("shop/web"), 80]
    try:
        choice = made.route(port, Request(path, fields, parameters, method), frozenset((4,)))
    except Refused as exc:
        assert exc.reason is Reason.NO_ROUTE
        return ""
    return choice.service.removeprefix("shop/")


@pytest.mark.parametrize(
    ("rules", "request_text", "expected"), ROWS, ids=[f"{n}-{row[1]}" for n, row in enumerate(ROWS)]
)
def test_one_route(rules: tuple[str, ...], request_text: str, expected: str) -> None:
    assert decide(tables(route("r", ", ".join(rules))), request_text) == expected


@pytest.mark.parametrize(
    ("rules", "request_text", "expected"),
    [row for row in ROWS if row[0] is not ORDER],
    ids=[f"{n}-{row[1]}" for n, row in enumerate(ROWS) if row[0] is not ORDER],
)
def test_the_same_over_a_route_for_each_rule(rules: tuple[str, ...], request_text: str, expected: str) -> None:
    # Names in the order of the rules, so that the tie of equals comes out the same; the files in the reverse order.
    routes = [route(f"r{number:02}", text) for number, text in enumerate(rules)]
    assert decide(tables(*reversed(routes)), request_text) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (("b", OLD), ("a", YOUNG), "first"),
        (("a", YOUNG), ("b", OLD), "second"),
        (("a", ""), ("b", OLD), "second"),  # without a time: younger than any with one
        (("a", ""), ("b", ""), "first"),
        (("b", ""), ("a", ""), "second"),
        (("b", OLD), ("a", OLD), "second"),
    ],
)
def test_ties_go_to_the_oldest_route_then_by_name(
    first: tuple[str, str], second: tuple[str, str], expected: str
) -> None:
    made = tables(
        route(first[0], rule("first", prefix("/")), meta=first[1]),
        route(second[0], rule("second", prefix("/")), meta=second[1]),
    )
    assert decide(made, "/") == expected


def test_an_invalid_winner_is_not_passed_over() -> None:
    snapshot = build(
        service("web"),
        service("v1"),
        workload("v1", "10.0.0.1"),
        route("r", f"{rule('v1', prefix('/'))}, {rule('gone', prefix('/gone'))}"),
    )
    made = Tables(lambda: 0.0)
    for shard in snapshot.shards.values():
        made.put(shard)
    with pytest.raises(Refused) as caught:
        made.route(made.ports[ServiceKey("shop/web"), 80], Request("/gone/x", {}), frozenset((4,)))
    assert caught.value.reason is Reason.BACKEND_INVALID
