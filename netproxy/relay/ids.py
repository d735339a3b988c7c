# cython: annotation_typing=False
"""Texts with digits at random: request ids, trace ids. PURE: octets at random are an argument."""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Callable

UUID = b"xxxxxxxx-xxxx-4xxx-yxxx-xxxxxxxxxxxx"
"""Of version 4 (RFC 9562 section 5.4)."""

_VARIANTS = bytes.maketrans(b"0123456789abcdef", b"89ab" * 4)


class Ids:
    """Texts of one form. Many are made at a time, so that each costs a slice.

    An ``x`` of `form` is any hexadecimal digit, a ``y`` is 8, 9, a or b, all else is itself. `entropy` gives that many
    octets at random. One per process: a fork would repeat them. No 16 digits in a row are 0, which are no id of a span.
    """

    def __init__(self, form: bytes, entropy: Callable[[int], bytes], count: int = 64) -> None:
        self._form = form
        self._entropy = entropy
        self._count = count
        self._size = len(form)
        self._texts = b""
        self._at = 0
        self._end = 0

    def take(self) -> bytes:
        if self._at >= self._end:
            self._fill()
        texts = self._texts  # a slice of C's is an object less
        at = self._at
        self._at = at + self._size
        return texts[at : at + self._size]

    def _fill(self) -> None:
        places = [place for place, octet in enumerate(self._form) if octet in b"xy"]
        digits = b"0" * 16
        while b"0" * 16 in digits:
            digits = hexlify(self._entropy((len(places) * self._count + 1) // 2))
        texts = bytearray(self._form * self._count)
        view = memoryview(texts)
        for number, place in enumerate(places):
            column = digits[number :: len(places)][: self._count]
            view[place :: self._size] = column.translate(_VARIANTS) if self._form[place] == 0x79 else column
        self._texts = bytes(texts)
        self._at, self._end = 0, len(texts)
