# cython: annotation_typing=False
"""Does a request match a rule? PURE. What needs preparation is prepared when the shard arrives.

What is compared with what:

* path: as it was received, without the query. Nothing is decoded or removed: ``/a%2Fb``, ``/a//b`` and ``/a/./b`` are
  themselves, not ``/a/b``, and go on as they are (so does Envoy unless it is told to normalize, as Istio tells it).
  An application may take them for ``/a/b`` all the same, so a rule is good for choosing a backend and not for keeping
  anybody away from one. An authorization by path must refuse what a server may read in two ways.
* of CONNECT the path is "", which only the prefix ``/`` and regular expressions that match an empty text match, and
  there is no query.
* a prefix is compared by element: ``/abc`` and ``/abc/`` match ``/abc``, ``/abc/`` and ``/abc/d``, not ``/abcd``.
* a header: the values of all fields of that name, joined by ``,``. Absent is not the same as empty.
* a query parameter: as decoded from a form (``+`` is a blank, ``%XX`` an octet of UTF-8), the first of its name among
  the first `MAX_PARAMETERS`. Those behind are not seen.
* exact values are compared octet by octet, those of the configuration as UTF-8.

Regular expressions may do `MAX_WORK` per request, else a client could stop a worker with long texts: what needs more is
refused, since "no match" might lead it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

from ..codec.events import Headers
from ..config.shard import Match, Rule
from ..errors import Reason, Refused
from ..pattern import compile_pattern

MAX_PARAMETERS = 256
MAX_WORK = 20_000_000
"""Octets of text times instructions, over all expressions that one request is compared with. 50 ms at the very worst, a
tenth of that or less with expressions whose automaton fits. A path of 2,000 octets may be compared with 64 expressions
of 150 instructions, which is five times what ``/v[0-9]+/.*`` has."""

Comparison = Callable[[str], bool]
"""Of a text whose characters are octets (Latin-1)."""


class Request:
    """What rules look at. All texts are octets as Latin-1."""

    def __init__(
        self,
        path: str,
        headers: dict[str, str] | None,
        query: str = "",
        method: str = "GET",
        *,
        fields: Headers = (),  # type: ignore[assignment]
        host: bytes = b"",
    ) -> None:
        """`query`: without its ``?``, not decoded. `headers` as `headers_for_match` makes them; without, `fields` are
        those that were received, and `host` replaces theirs if it is not empty: most requests meet no rule that looks.
        """
        self.path = path
        self.query = query
        self.method = method
        self._headers = headers
        self._fields = fields
        self._host = host
        self._parameters: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        found = self._headers
        if found is None:
            found = self._headers = headers_for_match(self._fields)
            if self._host:
                found["host"] = self._host.decode("latin-1")
        return found

    def parameters(self) -> dict[str, str]:
        """Of the query, by name."""
        if self._parameters is None:
            self._parameters = first_values(self.query)
        return self._parameters


def received(path: str, query: str, method: str, fields: Headers, host: bytes) -> Request:
    """As the constructor, which costs several times as much where this is compiled."""
    request = Request.__new__(Request)
    request.path = path
    request.query = query
    request.method = method
    request._headers = None
    request._fields = fields
    request._host = host
    request._parameters = None
    return request


def headers_for_match(headers: Headers) -> dict[str, str]:
    """Lower-case names; the values of a repeated field joined by ``,`` (RFC 9110 section 5.3)."""
    out: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        out[key] = f"{out[key]},{text}" if key in out else text
    return out


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


_ANY, _EXACT, _PREFIX, _REGEX = range(4)


class _Work:
    """What is left of it for the present request."""

    def __init__(self) -> None:
        self.left = 0

    def comparison(self, value: str, rule: str) -> Comparison:
        """With a regular expression. Raises Refused when nothing is left, ValueError for one that can't be used."""
        pattern = compile_pattern(value)

        def matches(text: str) -> bool:
            # What is no UTF-8 becomes three octets each.
            self.left -= pattern.work(len(text) if text.isascii() else 3 * len(text))
            if self.left < 0:
                detail = "its path, headers or parameters are too long for the regular expressions of the routes"
                raise Refused(Reason.HEAD_TOO_LARGE, detail, rule)
            return pattern(text.encode("latin-1"))

        return matches


class _Rest:
    """What else than the path a match asks for. Raises ValueError for an expression that can't be used."""

    def __init__(self, match: Match, compare: Callable[[str, str], Comparison]) -> None:
        self._method = match.method
        self._headers = [(wanted.name, compare(wanted.kind, wanted.value)) for wanted in match.headers]
        self._query = [(_octets(wanted.name), compare(wanted.kind, wanted.value)) for wanted in match.query]
        self.asks = bool(self._method or self._headers or self._query)

    def matches(self, request: Request) -> bool:
        if self._method and self._method != request.method:
            return False
        if self._headers:
            headers = request.headers
            for name, compare in self._headers:
                value = headers.get(name)
                if value is None or not compare(value):
                    return False
        if self._query:
            found = request.parameters()
            for name, compare in self._query:
                value = found.get(name)
                if value is None or not compare(value):
                    return False
        return True


def _octets(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


class Ruling:
    """A rule that may be chosen, and room for what the chooser keeps beside it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.way: Any = None


class Prepared:
    """The rules of one port, in order of precedence."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.broken: list[str] = []
        """The regular expressions that can't be used, and why: their matches match nothing. Where the shard was made
        they were valid.
        """
        self._work = _Work()
        self._matches: list[tuple[int, str, str, Comparison | None, _Rest | None, Ruling]] = []
        """Kind of the path, the path (without a ``/`` at the end of a prefix) and with a ``/``, or the expression."""
        for rule in rules:
            ruling = Ruling(rule)
            for match in rule.matches or (Match(),):
                self._add(ruling, match)

    def _add(self, ruling: Ruling, match: Match) -> None:
        rule = ruling.rule

        def compare(kind: str, value: str) -> Comparison:
            if kind != "regex":
                return _octets(value).__eq__
            return self._work.comparison(value, rule.name)

        expression = None
        try:
            rest = _Rest(match, compare)
            if match.path_kind == "regex":
                expression = compare("regex", match.path)
        except ValueError as exc:
            self.broken.append(f"{rule.name}: {exc}")
            return
        path = _octets(match.path)
        if match.path_kind == "exact":
            kind = _EXACT
        elif match.path_kind == "regex":
            kind = _REGEX
        else:
            path = path.rstrip("/")
            kind = _PREFIX if path else _ANY
        self._matches.append((kind, path, path + "/", expression, rest if rest.asks else None, ruling))

    def first(self, request: Request) -> Ruling | None:
        """Of the first rule that the request matches. Raises Refused with HEAD_TOO_LARGE, see `MAX_WORK`."""
        path = request.path
        self._work.left = MAX_WORK
        for kind, text, directory, expression, rest, ruling in self._matches:
            if kind == _PREFIX:
                if not path.startswith(directory) and path != text:
                    continue
            elif kind == _EXACT:
                if path != text:
                    continue
            elif expression is not None and not expression(path):
                continue
            if rest is None or rest.matches(request):
                return ruling
        return None
