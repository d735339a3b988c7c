"""Regular expressions of configuration: RE2's syntax, which matches in linear time. PURE.

A pattern is matched against the whole text. Both are Unicode: the octets of the text are taken as UTF-8, and what
is none counts as U+FFFD, so that ``.`` stands for it. ``.`` is no line feed unless the pattern says ``(?s)``.

Threat: whoever may write a pattern must not be able to slow a worker down or to fill its memory. RE2 has no
backtracking, `MAX_MEMORY` bounds the program and its automaton (a pattern past it is refused), `MAX_LENGTH` is the
limit of the Gateway API. Linear is not yet fast: an automaton that does not fit is simulated, which costs about 2.5 ns
for each octet of the text and each instruction of the program (1.3 s for 64 KiB and ``.*[ab].{999}b``). So who matches
texts of strangers has to bound `Pattern.work`.
"""

from __future__ import annotations

from typing import Any

import re2

MAX_LENGTH = 1024
"""Characters of a pattern."""
MAX_MEMORY = 1024 * 1024
"""Octets per pattern. ``.{0,1000}``, the largest repetition there is, takes about 300 KiB."""


class Pattern:
    """Does the pattern match all of a text?"""

    __slots__ = ("_fullmatch", "instructions")

    def __init__(self, compiled: Any) -> None:
        self._fullmatch = compiled.fullmatch
        self.instructions: int = compiled.programsize

    def __call__(self, text: bytes) -> bool:
        if not text.isascii():
            text = text.decode(errors="replace").encode()
        return self._fullmatch(text) is not None

    def work(self, size: int) -> int:
        """What a text of `size` octets may cost, in octets times instructions."""
        return size * self.instructions


def _options() -> Any:
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.log_errors = False
    options.never_capture = True
    return options


_OPTIONS = _options()


def compile_pattern(pattern: str) -> Pattern:
    """Raises ValueError that says what is wrong with it."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {len(pattern)} characters, at most {MAX_LENGTH} are allowed")
    try:
        return Pattern(re2.compile(pattern, _OPTIONS))  # type: ignore[no-untyped-call]
    except re2.error as exc:
        text = exc.args[0] if exc.args else exc
        raise ValueError(text.decode(errors="replace") if isinstance(text, bytes) else str(text)) from None
    except UnicodeEncodeError:
        raise ValueError("is no valid Unicode") from None
