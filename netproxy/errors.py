"""The error tree, and the one table that says what each end of a request means.

A request or connection ends with exactly one `Reason`. Its row gives the HTTP status that we
answer with (0: nothing can be answered any more), the status of gRPC, the flag in logs and in ``x-netproxy-reason``
(Envoy's response flags where Envoy has one), the sentence for people, and the details in the access log.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class NetproxyError(Exception):
    """Root of everything netproxy raises on purpose."""


class ProtocolError(NetproxyError):
    """Bytes that a protocol does not allow."""


class LocalProtocolError(ProtocolError):
    """We were about to send something illegal: our bug."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal.

    `status` is the HTTP status a server should answer with: 400, 408, 431, 501 or 505.
    """

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status


class Refused(NetproxyError):
    """A decision against a request, not a fault."""

    def __init__(self, reason: Reason, detail: str = "", decided_by: str = "") -> None:
        super().__init__(detail or reason.info.title)
        self.reason = reason
        self.detail = detail
        self.decided_by = decided_by


class UpstreamError(NetproxyError):
    """An upstream could not be reached or failed; `reason` says how."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail or reason.info.title)
        self.reason = reason
        self.detail = detail


class IdentityError(NetproxyError):
    """A certificate, key or peer identity is missing, wrong or not trusted."""


class ConfigError(NetproxyError):
    """One object that can't be used. `str()` is one line: ``file:line: Kind ns/name: field: message``."""

    def __init__(self, message: str, *, file: str = "", line: int = 0, obj: str = "", field: str = "") -> None:
        self.message, self.file, self.line, self.obj, self.field = message, file, line, obj, field
        where = f"{file}:{line}" if line else file
        super().__init__(": ".join(part for part in (where, obj, field, message) if part))


class Grpc(enum.IntEnum):
    """Status codes of gRPC, as in its ``statuscodes.md``."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    DEADLINE_EXCEEDED = 4
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class ReasonInfo(NamedTuple):
    status: int
    grpc: Grpc
    """What a gRPC client is told: UNAVAILABLE where another try may help, and never where it can't. Gateway API has
    UNIMPLEMENTED without a route and UNAVAILABLE without a valid backend."""
    flag: str
    title: str
    details: str = ""
    """Envoy's RESPONSE_CODE_DETAILS, in its words where it has some. One with ``_before_response_started`` is that of
    an end before the answer began."""


class Reason(enum.IntEnum):
    """Why a request or connection ended. The order is part of the arena's layout: append only."""

    OK = 0
    NO_ROUTE = 1
    BACKEND_INVALID = 2
    NO_HEALTHY_ENDPOINT = 3
    CONNECT_FAILED = 4
    CONNECT_TIMEOUT = 5
    UPSTREAM_TIMEOUT = 6
    UPSTREAM_CLOSED = 7
    UPSTREAM_PROTOCOL = 8
    DOWNSTREAM_CLOSED = 9
    DOWNSTREAM_PROTOCOL = 10
    HEAD_TOO_LARGE = 11
    HEAD_TIMEOUT = 12
    IDLE_TIMEOUT = 13
    MTLS_REQUIRED = 14
    IDENTITY_MISMATCH = 15
    OVERLOADED = 16
    DRAINING = 17
    PROTOCOL_MISMATCH = 18
    NOT_IMPLEMENTED = 19
    EGRESS_DENIED = 20
    LOOP = 21
    INTERNAL = 22
    DNS_FAILED = 23

    @property
    def info(self) -> ReasonInfo:
        return REASONS[self]


REASONS: dict[Reason, ReasonInfo] = {
    Reason.OK: ReasonInfo(200, Grpc.OK, "-", "done", "via_upstream"),
    Reason.NO_ROUTE: ReasonInfo(404, Grpc.UNIMPLEMENTED, "NR", "no route rule matches the request", "route_not_found"),
    Reason.BACKEND_INVALID: ReasonInfo(
        500, Grpc.UNAVAILABLE, "NC", "the chosen backend does not exist or is invalid", "cluster_not_found"
    ),
    Reason.NO_HEALTHY_ENDPOINT: ReasonInfo(
        503, Grpc.UNAVAILABLE, "UH", "the backend has no ready endpoint", "no_healthy_upstream"
    ),
    Reason.CONNECT_FAILED: ReasonInfo(
        503,
        Grpc.UNAVAILABLE,
        "UF",
        "the endpoint could not be connected",
        "upstream_reset_before_response_started{connection_failure}",
    ),
    Reason.CONNECT_TIMEOUT: ReasonInfo(
        503,
        Grpc.UNAVAILABLE,
        "UF",
        "the endpoint did not accept in time",
        "upstream_reset_before_response_started{connection_timeout}",
    ),
    Reason.UPSTREAM_TIMEOUT: ReasonInfo(
        504, Grpc.DEADLINE_EXCEEDED, "UT", "the upstream did not answer in time", "upstream_response_timeout"
    ),
    Reason.UPSTREAM_CLOSED: ReasonInfo(
        502,
        Grpc.UNAVAILABLE,
        "UC",
        "the upstream closed before its answer was complete",
        "upstream_reset_before_response_started{connection_termination}",
    ),
    Reason.UPSTREAM_PROTOCOL: ReasonInfo(
        502,
        Grpc.INTERNAL,
        "UPE",
        "the upstream sent a malformed answer",
        "upstream_reset_before_response_started{protocol_error}",
    ),
    Reason.DOWNSTREAM_CLOSED: ReasonInfo(
        0, Grpc.CANCELLED, "DC", "the client closed before the answer was complete", "downstream_remote_disconnect"
    ),
    Reason.DOWNSTREAM_PROTOCOL: ReasonInfo(400, Grpc.INTERNAL, "DPE", "the request is malformed", "http1.codec_error"),
    Reason.HEAD_TOO_LARGE: ReasonInfo(
        431, Grpc.RESOURCE_EXHAUSTED, "DPE", "the request head is larger than the limit", "http1.headers_too_large"
    ),
    Reason.HEAD_TIMEOUT: ReasonInfo(
        408, Grpc.DEADLINE_EXCEEDED, "DT", "the request head did not arrive in time", "request_header_timeout"
    ),
    Reason.IDLE_TIMEOUT: ReasonInfo(
        0, Grpc.UNAVAILABLE, "SI", "nothing moved for the idle timeout", "stream_idle_timeout"
    ),
    Reason.MTLS_REQUIRED: ReasonInfo(
        403,
        Grpc.PERMISSION_DENIED,
        "UAEX",
        "the workload accepts mesh TLS only",
        "rbac_access_denied_matched_policy[mtls_strict]",
    ),
    Reason.IDENTITY_MISMATCH: ReasonInfo(
        503,
        Grpc.UNAVAILABLE,
        "UF",
        "the endpoint has not the identity it should have",
        "upstream_reset_before_response_started{tls_error}",
    ),
    Reason.OVERLOADED: ReasonInfo(
        503, Grpc.UNAVAILABLE, "UO", "a limit on connections or requests is reached", "overload"
    ),
    Reason.DRAINING: ReasonInfo(
        503, Grpc.UNAVAILABLE, "OM", "the proxy is shutting down", "downstream_local_disconnect"
    ),
    Reason.PROTOCOL_MISMATCH: ReasonInfo(
        0, Grpc.INTERNAL, "DPE", "the port carries HTTP, the bytes are something else", "filter_chain_not_found"
    ),
    Reason.NOT_IMPLEMENTED: ReasonInfo(
        501, Grpc.UNIMPLEMENTED, "DPE", "the request needs something that is not supported", "upgrade_failed"
    ),
    Reason.EGRESS_DENIED: ReasonInfo(
        502, Grpc.PERMISSION_DENIED, "NR", "the outbound policy denies unknown destinations", "route_not_found"
    ),
    Reason.LOOP: ReasonInfo(502, Grpc.INTERNAL, "NR", "the destination is the proxy itself", "filter_chain_not_found"),
    Reason.INTERNAL: ReasonInfo(500, Grpc.INTERNAL, "LR", "an internal error", "internal_error"),
    Reason.DNS_FAILED: ReasonInfo(
        503, Grpc.UNAVAILABLE, "DF", "the name of the endpoint could not be resolved", "dns_resolution_failure"
    ),
}
assert set(REASONS) == set(Reason)
