"""Regular expressions of configuration: RE2's syntax, which matches in linear time. PURE.

A pattern is matched against the whole text. Both are Unicode: the octets of the text are taken as UTF-8, and what
is none counts as U+FFFD, so that ``.`` stands for it. ``.`` is no line feed unless the pattern says ``(?s)``.

Threat: whoever may write a pattern must not be able to slow a worker down or to fill its memory. RE2 has no
backtracking, `MAX_MEMORY` bounds the program and its automaton (a pattern past it is refused, an automaton past it is
made anew), `MAX_LENGTH` is the limit of the Gateway API.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import re2

MAX_LENGTH = 1024
"""Characters of a pattern."""
MAX_MEMORY = 1024 * 1024
"""Octets per pattern. ``.{0,1000}``, the largest repetition there is, takes about 300 KiB."""

Matcher = Callable[[bytes], bool]
"""Does the pattern match all of it?"""


def _options() -> Any:
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.log_errors = False
    options.never_capture = True
    return options


_OPTIONS = _options()


def compile_pattern(pattern: str) -> Matcher:
    """Raises ValueError that says what is wrong with it."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {len(pattern)} characters, at most {MAX_LENGTH} are allowed")
    try:
        fullmatch = re2.compile(pattern, _OPTIONS).fullmatch  # type: ignore[no-untyped-call]
    except re2.error as exc:
        text = exc.args[0] if exc.args else exc
        raise ValueError(text.decode(errors="replace") if isinstance(text, bytes) else str(text)) from None
    except UnicodeEncodeError:
        raise ValueError("is no valid Unicode") from None

    def matches(text: bytes) -> bool:
        if not text.isascii():
            text = text.decode(errors="replace").encode()
        return fullmatch(text) is not None

    return matches
