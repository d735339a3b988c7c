"""Does a request match a rule? PURE. What needs preparation is prepared when the shard arrives.

What is compared with what:

* path: as it was received, without the query. Nothing is decoded or removed: ``/a%2Fb``, ``/a//b`` and ``/a/./b`` are
  themselves, not ``/a/b``, and go on as they are (so does Envoy unless it is told to normalize, as Istio tells it).
  An application may take them for ``/a/b`` all the same, so a rule is good for choosing a backend and not for keeping
  anybody away from one. An authorization by path must refuse what a server may read in two ways.
* of CONNECT the path is "", which only the prefix ``/`` and regular expressions that match an empty text match, and
  there is no query.
* a header: the values of all fields of that name, joined by ``,``. Absent is not the same as empty.
* a query parameter: as decoded from a form (``+`` is a blank, ``%XX`` an octet of UTF-8), the first of its name among
  the first `MAX_PARAMETERS`. Those behind are not seen.
* exact values are compared octet by octet, those of the configuration as UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from ..config.shard import Match, Rule
from ..pattern import Matcher, compile_pattern

MAX_PARAMETERS = 256

Comparison = Callable[[str], bool]
"""Of a text whose characters are octets (Latin-1)."""


class Request(NamedTuple):
    """What rules look at. All texts are octets as Latin-1; `headers` as `headers_for_match` makes them."""

    path: str
    headers: dict[str, str]
    query: str = ""
    """Without its ``?``, not decoded."""
    method: str = "GET"


def prefix_matches(prefix: str, path: str) -> bool:
    """By path element, a trailing ``/`` of the prefix is ignored: /abc matches /abc, /abc/, /abc/d, not /abcd."""
    prefix = prefix.rstrip("/")
    return path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == "/" or not prefix)


def first_values(query: str) -> dict[str, str]:
    """The parameters of a form by name, the first of each. Names and values are octets as Latin-1."""
    found: dict[str, str] = {}
    for part in query.split("&", MAX_PARAMETERS)[:MAX_PARAMETERS]:
        if part:
            name, _, value = part.partition("=")
            found.setdefault(_decoded(name), _decoded(value))
    return found


def _decoded(text: str) -> str:
    if "%" not in text and "+" not in text:
        return text
    return unquote_to_bytes(text.replace("+", " ").encode("latin-1")).decode("latin-1")


class PreparedMatch:
    """One `Match`. `broken` says what is wrong when a regular expression of it can't be used: it matches nothing."""

    __slots__ = ("_headers", "_method", "_path", "_query", "broken")

    def __init__(self, match: Match) -> None:
        self.broken = ""
        self._method = match.method
        self._path = self._of_path(match)
        self._headers = [(wanted.name, self._comparison(wanted.kind, wanted.value)) for wanted in match.headers]
        self._query = [(_octets(wanted.name), self._comparison(wanted.kind, wanted.value)) for wanted in match.query]

    def _of_path(self, match: Match) -> Comparison | None:
        if match.path_kind != "prefix":
            return self._comparison(match.path_kind, match.path)
        if not match.path.rstrip("/"):
            return None
        prefix = _octets(match.path)
        return lambda path: prefix_matches(prefix, path)

    def _comparison(self, kind: str, value: str) -> Comparison:
        if kind == "regex":
            try:
                pattern = compile_pattern(value)
            except ValueError as exc:
                self.broken = f"{value[:100]!r}: {exc}"
                return _never
            return lambda text, pattern=pattern: _search(pattern, text)  # type: ignore[misc]
        return _octets(value).__eq__

    def matches(self, request: Request, parameters: Callable[[], dict[str, str]]) -> bool:
        if self.broken or (self._method and self._method != request.method):
            return False
        if self._path is not None and not self._path(request.path):
            return False
        headers = request.headers
        for name, compare in self._headers:
            value = headers.get(name)
            if value is None or not compare(value):
                return False
        if self._query:
            found = parameters()
            for name, compare in self._query:
                value = found.get(name)
                if value is None or not compare(value):
                    return False
        return True


def _octets(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def _never(_text: str) -> bool:
    return False


def _search(pattern: Matcher, text: str) -> bool:
    return pattern(text.encode("latin-1"))


class PreparedRule:
    """One `Rule`. Without matches it matches everything."""

    __slots__ = ("matches", "rule")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.matches = [PreparedMatch(match) for match in rule.matches]


class Prepared:
    """The rules of one port, in order of precedence."""

    __slots__ = ("rules",)

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = [PreparedRule(rule) for rule in rules]

    @property
    def broken(self) -> list[str]:
        """The regular expressions that can't be used, and why. They were valid where the shard was made."""
        return [
            f"{prepared.rule.name}: {match.broken}"
            for prepared in self.rules
            for match in prepared.matches
            if match.broken
        ]

    def first(self, request: Request) -> Rule | None:
        """The first rule that the request matches."""
        found: dict[str, str] | None = None

        def parameters() -> dict[str, str]:
            nonlocal found
            if found is None:
                found = first_values(request.query)
            return found

        for prepared in self.rules:
            if not prepared.matches or any(match.matches(request, parameters) for match in prepared.matches):
                return prepared.rule
        return None
