# cython: annotation_typing=False
"""Texts with digits at random: request ids, trace ids. PURE: octets at random are an argument."""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Callable

UUID = b"xxxxxxxx-xxxx-4xxx-yxxx-xxxxxxxxxxxx"
"""Of version 4 (RFC 9562 section 5.4)."""

_VARIANTS = b"89ab"


class Ids:
    """Texts of one form. Many are made at a time, so that each costs a slice.

    An ``x`` of `form` is any hexadecimal digit, a ``y`` is 8, 9, a or b, all else is itself. `entropy` gives that many
    octets at random. One per process: a fork would repeat them. No 16 digits in a row are 0, which are no id of a span.
    """

    def __init__(self, form: bytes, entropy: Callable[[int], bytes], count: int = 256) -> None:
        self._form = form
        self._entropy = entropy
        self._count = count
        self._size = len(form)
        self._digits = form.count(b"x") + form.count(b"y")
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
        found = b"0" * 16
        while b"0" * 16 in found:
            found = hexlify(self._entropy((self._digits * self._count + 1) // 2))
        room = bytearray(self._form * self._count)
        # These three are C's pointers where this is compiled.
        form, digits, texts = self._form, found, room
        size, number = self._size, 0
        for start in range(0, size * self._count, size):
            for at in range(size):
                if form[at] == 0x78:
                    texts[start + at] = digits[number]
                    number += 1
                elif form[at] == 0x79:
                    digit = digits[number]
                    texts[start + at] = _VARIANTS[digit & 3 if digit < 0x3A else (digit + 1) & 3]
                    number += 1
        self._texts = bytes(room)
        self._at, self._end = 0, len(room)
