# cython: annotation_typing=False
"""What HTTP is to gRPC: its requests, deadlines, statuses and errors. PURE.

After gRPC's ``PROTOCOL-HTTP2.md``. A request is gRPC by its content-type, whatever version of HTTP it came in; gRPC-Web
is not, its clients read other errors. What is its own passes like any other: frames are not looked at.

An error of ours is a Trailers-Only response, so that libraries tell applications a status and a sentence. When the
response has begun, trailers say it, where trailers are possible (`may_end_early`): a reset has no word for UNAVAILABLE,
and no sentence. A message that stops half-way before them is no message to any library, and the status is never OK.
"""

from __future__ import annotations

from ..codec.events import Headers, RequestHead, ResponseHead
from ..errors import Grpc, Reason

TIMEOUT = b"grpc-timeout"
NO_STATUS = -1
_MAX_MESSAGE = 1000
_STATUS, _MESSAGE = b"grpc-status", b"grpc-message"
_TYPE = b"application/grpc"
_UNITS_NS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 10**3, b"n": 1}
_MAX_DIGITS = 8
_LARGEST = 16
"""Status code; what is above is UNKNOWN to libraries, too."""
# Of a RST_STREAM that the endpoint sent, as its client would have seen it without us. Others: INTERNAL.
_OF_RESET = {
    7: Grpc.UNAVAILABLE,  # REFUSED_STREAM
    8: Grpc.CANCELLED,  # CANCEL
    11: Grpc.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    12: Grpc.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}


def is_grpc(head: RequestHead) -> bool:
    """By the first content-type of a POST."""
    if head.method != b"POST":
        return False
    for name, value in head.headers:
        if name == b"content-type":
            return _is_type(value)
    return False


def _is_type(value: bytes) -> bool:
    """``application/grpc``, alone or with ``+`` or ``;`` behind it."""
    size = len(_TYPE)
    return value[:size].lower() == _TYPE and value[size : size + 1] in (b"", b"+", b";", b" ", b"\t")


# -- deadlines ------------------------------------------------------------------------------------------------


def timeout_s(headers: Headers) -> float:
    """Seconds of grpc-timeout, -1.0 without one. Raises ValueError for what is none, or twice there."""
    found = -1.0
    for name, value in headers:
        if name == TIMEOUT:
            digits, unit = value[:-1], _UNITS_NS.get(value[-1:])
            if unit is None or not digits.isdigit() or len(digits) > _MAX_DIGITS:
                raise ValueError("malformed grpc-timeout")
            if found >= 0:
                raise ValueError("more than one grpc-timeout")
            found = int(digits) * unit / 1e9
    return found


def timeout_value(seconds: float) -> bytes:
    """As a field: never more than `seconds`, as precise as eight digits are, and at least 1 ns (0 is not allowed)."""
    nanoseconds = max(1, int(seconds * 1e9))
    for unit, unit_ns in reversed(_UNITS_NS.items()):
        amount = nanoseconds // unit_ns
        if amount < 10**_MAX_DIGITS:
            return b"%d%b" % (amount, unit)
    return b"99999999H"


def with_timeout(head: RequestHead, seconds: float) -> RequestHead:
    """The head with so much left for its answer."""
    value = timeout_value(seconds)
    return head.replace(headers=[(name, value if name == TIMEOUT else old) for name, old in head.headers])


# -- statuses -------------------------------------------------------------------------------------------------


def status_of(headers: Headers) -> int:
    """grpc-status of a response's head or trailers, NO_STATUS without one. What is no status is UNKNOWN."""
    for name, value in headers:
        if name == _STATUS:
            status = int(value) if value.isdigit() and len(value) <= 2 else _LARGEST + 1
            return status if status <= _LARGEST else int(Grpc.UNKNOWN)
    return NO_STATUS


def status_of_reset(code: int) -> Grpc:
    """Of a stream that the endpoint reset with this HTTP/2 code."""
    return _OF_RESET.get(code, Grpc.INTERNAL)


# -- errors of ours -------------------------------------------------------------------------------------------


def message_of(text: str) -> bytes:
    """Percent-encoded: octets of UTF-8 outside of printable ASCII, and ``%``."""
    raw = text.encode("utf-8", "replace")[:_MAX_MESSAGE]
    return b"".join([_OCTETS[octet] for octet in raw])


_OCTETS = [bytes((octet,)) if 0x20 <= octet <= 0x7E and octet != 0x25 else b"%%%02X" % octet for octet in range(256)]


def error_fields(status: Grpc, text: str) -> Headers:
    return [(_STATUS, b"%d" % status), (_MESSAGE, message_of(text))]


def sentence(reason: Reason, detail: str, decided_by: str) -> str:
    """What a person reads of it."""
    text = f"{reason.info.title}: {detail}" if detail else reason.info.title
    return f"{text} ({decided_by})" if decided_by else text


def may_end_early(head: ResponseHead) -> bool:
    """Can trailers of ours end this response? Not where its length was told, or it is not of gRPC."""
    if head.status != 200:
        return False
    is_ours = False
    for name, value in head.headers:
        if name == b"content-length":
            return False
        if name == b"content-type":
            is_ours = _is_type(value)
    return is_ours
