from __future__ import annotations

import pytest

from netproxy.pattern import MAX_LENGTH, compile_pattern


def test_the_whole_text_matches() -> None:
    matches = compile_pattern("a+b")
    assert matches(b"aab")
    assert not matches(b"xaab")
    assert not matches(b"aabx")
    assert not matches(b"aab\n")


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("(", "missing )"),
        ("[z-a]", "invalid character class range"),
        (r"(a)\1", "invalid escape sequence"),
        ("(?=a)", "invalid perl operator"),
        ("a**", "bad repetition operator"),
        ("x{1001}", "invalid repetition size"),
        (r"(\pL{1,100}){1,10}", "too large"),
        ("a" * (MAX_LENGTH + 1), "at most 1024"),
        ("\ud800", "Unicode"),
    ],
)
def test_what_is_refused(pattern: str, error: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=error.replace(")", r"\)")):
        compile_pattern(pattern)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "pattern", ["(x+x+)+y", "(x*)*y", "(.*x){20}y", "(x|xx|xxx)*y", ".{0,1000}y", ".*" * 300 + "y"]
)
def test_no_pattern_goes_back(pattern: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A backtracking engine would not come to an end."""
    assert not compile_pattern(pattern)(b"x" * 60_000)
    assert capfd.readouterr().err == ""


def test_what_is_no_utf8_is_one_character() -> None:
    assert compile_pattern("a.b")(b"a\xffb")
    assert compile_pattern("a\u00e9b")("a\u00e9b".encode())
    assert not compile_pattern("a\u00e9b")(b"a\xe9b")
