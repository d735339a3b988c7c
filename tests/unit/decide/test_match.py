from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.config.shard import HeaderMatch, Match, QueryMatch, Rule
from netproxy.decide.match import MAX_PARAMETERS, MAX_WORK, Prepared, Request, first_values
from netproxy.errors import Reason, Refused
from netproxy.pattern import compile_pattern


def fits(match: Match, path: str = "/", query: str = "", method: str = "GET", **headers: str) -> bool:
    request = Request(path, {name.replace("_", "-"): value for name, value in headers.items()}, query, method)
    return Prepared((Rule("r", (match,), ()),)).first(request) is not None


# --- paths


@pytest.mark.parametrize(
    ("prefix", "path", "matches"),
    [
        # The table of the Gateway API (HTTPPathMatch, PathPrefix).
        ("/", "/", True),
        ("/", "/abc", True),
        ("/foo", "/foo", True),
        ("/foo", "/foo/", True),
        ("/foo/", "/foo", True),
        ("/foo/", "/foo/", True),
        ("/aaa/bb", "/aaa/bbb", False),
        ("/aaa/bbb", "/aaa/bbb", True),
        ("/aaa/bbb/", "/aaa/bbb", True),
        ("/aaa/bbb", "/aaa/bbb/", True),
        ("/aaa/bbb", "/aaa/bbb/ccc", True),
        ("/aaa/bbb", "/aaa/bbbxyz", False),
        ("/abc", "/abcd", False),
        ("/abc", "/ab", False),
        ("/abc", "/ABC", False),
        ("/abc", "abc", False),
        ("/abc", "", False),
        ("/", "", True),
        ("/", "*", True),
        ("/a", "//a", False),
    ],
)
def test_prefixes(prefix: str, path: str, matches: bool) -> None:
    assert fits(Match("prefix", prefix), path) is matches


@given(st.text("/ab", max_size=6).map("/".__add__), st.text("/ab", max_size=8).map("/".__add__))
def test_prefix_is_by_element(prefix: str, path: str) -> None:
    trimmed = prefix.rstrip("/")
    assert fits(Match("prefix", prefix), path) is (path + "/").startswith(trimmed + "/")
    assert fits(Match("prefix", path), path)


@given(st.text("/ab", max_size=6).map("/".__add__), st.text("/ab", max_size=8).map("/".__add__))
def test_a_prefix_is_a_regular_expression(prefix: str, path: str) -> None:
    expression = Match("regex", f"{prefix.rstrip('/')}(/.*)?")
    assert fits(Match("prefix", prefix), path) is fits(expression, path)
    assert fits(Match("exact", prefix), path) is (prefix == path)


@pytest.mark.parametrize(
    ("expression", "path", "matched"),
    [
        ("/v[0-9]+", "/v12", True),
        ("/v[0-9]+", "/v12/", False),
        ("/v[0-9]+", "x/v12", False),
        ("/a|/ab", "/ab", True),
        ("(?i)/A", "/a", True),
        ("/a.b", "/a/b", True),
        ("/a.b", "/a%2Fb", False),
        (".*", "", True),
        ("/.*", "", False),
        ("/.", "/\xff", True),
        ("/\u00e9", "/\xc3\xa9", True),
        ("/[\u00e0-\u00ef]", "/\xc3\xa9", True),
    ],
)
def test_expressions_match_the_whole_path(expression: str, path: str, matched: bool) -> None:
    assert fits(Match("regex", expression), path) is matched


@pytest.mark.parametrize("path", ["//a", "/./a", "/b/../a", "/%61", "/A", "/a%2F", "/a;x"])
def test_nothing_of_a_path_is_normalized(path: str) -> None:
    assert not fits(Match("exact", "/a"), path)
    assert not fits(Match("prefix", "/a"), path)
    assert fits(Match("exact", path), path)


def test_connect_has_no_path() -> None:
    assert fits(Match(method="CONNECT"), "", method="CONNECT")
    assert fits(Match(), "", method="CONNECT")
    assert not fits(Match("prefix", "/a"), "", method="CONNECT")
    assert not fits(Match("exact", "/"), "", method="CONNECT")


# --- the other parts


def test_methods_are_case_sensitive() -> None:
    assert fits(Match(method="GET"))
    assert not fits(Match(method="GET"), method="get")
    assert not fits(Match(method="GET"), method="HEAD")


def test_headers() -> None:
    exact = Match(headers=(HeaderMatch("x-a", "1"), HeaderMatch("x-b", "")))
    assert fits(exact, x_a="1", x_b="")
    assert not fits(exact, x_a="1")
    assert not fits(exact, x_a="1,1", x_b="")
    expression = Match(headers=(HeaderMatch("x-a", "(v[12])?", "regex"),))
    assert fits(expression, x_a="v1")
    assert fits(expression, x_a="")
    assert not fits(expression)
    assert not fits(expression, x_a="v1,v2")
    name = Match(headers=(HeaderMatch("x-a", "\u00e9"),))
    assert fits(name, x_a="\xc3\xa9")
    assert not fits(name, x_a="\xe9")
    assert fits(Match(headers=(HeaderMatch("x-a", ".", "regex"),)), x_a="\xe9")


@pytest.mark.parametrize(
    ("query", "matched"),
    [
        ("animal=whale", True),
        ("x&animal=whale&y=", True),
        ("animal=whale&animal=dog", True),
        ("animal=dog&animal=whale", False),
        ("Animal=whale", False),
        ("animal=Whale", False),
        ("animal=%77hale", True),
        ("%61nimal=whale", True),
        ("animal=whale+", False),
        ("animal=whale;x=1", False),
        ("animal", False),
        ("", False),
    ],
)
def test_query(query: str, matched: bool) -> None:
    assert fits(Match(query=(QueryMatch("animal", "whale"),)), query=query) is matched
    assert fits(Match(query=(QueryMatch("animal", "wh[a]le", "regex"),)), query=query) is matched


def test_values_of_a_query_are_utf8() -> None:
    assert fits(Match(query=(QueryMatch("\u00fc", "\u00e9 "),)), query="%C3%BC=%c3%a9+")
    assert not fits(Match(query=(QueryMatch("a", "\u00e9"),)), query="a=%e9")
    assert not fits(Match(query=(QueryMatch("a", "\ufffd"),)), query="a=%e9")
    assert fits(Match(query=(QueryMatch("a", ".", "regex"),)), query="a=%e9")
    assert not fits(Match(query=(QueryMatch("a", ".*", "regex"),)), query="a=b%0A")
    assert fits(Match(query=(QueryMatch("a", "(?s).*", "regex"),)), query="a=b%0A")


parts = st.text("ab=&+%20cC3\x00;#\xff", max_size=12)


@given(st.one_of(parts, st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=4).map(urlencode)))
def test_a_query_is_read_as_a_form_is(query: str) -> None:
    expected: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, encoding="latin-1"):
        expected.setdefault(name, value)
    assert first_values(query) == expected


def test_parameters_have_a_limit() -> None:
    query = "&".join(f"p{number}=1" for number in range(MAX_PARAMETERS + 2))
    assert len(first_values(query)) == MAX_PARAMETERS
    assert not fits(Match(query=(QueryMatch(f"p{MAX_PARAMETERS}", "1"),)), query=query)
    assert fits(Match(query=(QueryMatch(f"p{MAX_PARAMETERS - 1}", "1"),)), query=query)


# --- rules


def test_all_parts_of_a_match_and_any_match_of_a_rule() -> None:
    one, two = Match("exact", "/one"), Match("prefix", "/two", (HeaderMatch("a", "1"),), (QueryMatch("q", "1"),), "PUT")
    prepared = Prepared((Rule("r", (one, two), ()), Rule("all", (Match("prefix", "/two"),), ())))

    def chosen(path: str, headers: dict[str, str], query: str = "", method: str = "GET") -> str:
        ruling = prepared.first(Request(path, headers, query, method))
        return ruling.rule.name if ruling else ""

    assert chosen("/one", {}) == "r"
    assert chosen("/one/", {}) == ""
    assert chosen("/two/x", {"a": "1"}, "q=1", "PUT") == "r"
    assert chosen("/two", {"a": "1"}, "q=1") == "all"
    assert chosen("/two", {}, "q=1", "PUT") == "all"
    assert chosen("/two", {"a": "1"}, "q=2", "PUT") == "all"
    assert Prepared((Rule("any", (), ()),)).first(Request("/", {})) is not None
    assert Prepared(()).first(Request("/", {})) is None


def test_an_expression_that_can_t_be_used_matches_nothing() -> None:
    for broken in (
        Match("regex", "("),
        Match(headers=(HeaderMatch("a", "[z-a]", "regex"),)),
        Match(query=(QueryMatch("a", r"(\pL{1,100}){1,10}", "regex"),)),
    ):
        prepared = Prepared((Rule("r", (broken,), ()),))
        assert len(prepared.broken) == 1
        assert prepared.broken[0].startswith("r: ")
        assert prepared.first(Request("/", {"a": "z"}, "a=b")) is None


# --- bounds


def test_expressions_have_a_bound_of_work_per_request() -> None:
    """Unbounded, one request with 60,000 octets of x and 64 such expressions stopped the worker for 50 s."""
    slow = tuple(HeaderMatch("x", f".*[ab].{{900}}{last}", "regex") for last in "cd")
    rules = Prepared(tuple(Rule(f"rule {header.value}", (Match(headers=(header,)),), ()) for header in slow))
    each = compile_pattern(slow[1].value).instructions
    most = MAX_WORK // each // 2
    assert rules.first(Request("/", {"x": "x" * most})) is None
    for text in ("x" * (most + 1), "\xff" * (most // 3 + 1)):
        with pytest.raises(Refused, match="too long for the regular expressions") as caught:
            rules.first(Request("/", {"x": text}))
        assert (caught.value.reason, caught.value.decided_by) == (Reason.HEAD_TOO_LARGE, f"rule {slow[1].value}")
    assert rules.first(Request("/", {"x": "a" * 901 + "d"})) is not None
