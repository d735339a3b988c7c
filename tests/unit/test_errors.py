from __future__ import annotations

import http
import re

import pytest

from netproxy.errors import (
    REASONS,
    ConfigError,
    Grpc,
    IdentityError,
    LocalProtocolError,
    NetproxyError,
    ProtocolError,
    Reason,
    Refused,
    RemoteProtocolError,
    UpstreamError,
)


def test_the_table_is_complete() -> None:
    assert list(REASONS) == list(Reason)
    # The order is part of the arena's layout.
    assert [reason.value for reason in Reason] == list(range(len(Reason)))


@pytest.mark.parametrize("reason", Reason)
def test_every_row(reason: Reason) -> None:
    info = reason.info
    assert info.status == 0 or info.status in set(http.HTTPStatus)
    assert (info.status == 200) is (reason is Reason.OK)
    assert info.flag == "-" if reason is Reason.OK else info.flag.isalpha() and info.flag.isupper()
    assert info.title == info.title.strip()
    assert info.title[0].islower() and not info.title.endswith(".")
    assert re.fullmatch(r"[a-z0-9_.]+([{\[][a-z_]+[}\]])?", info.details)


def test_titles_are_distinct() -> None:
    assert len({info.title for info in REASONS.values()}) == len(REASONS)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.NO_ROUTE, 404),
        (Reason.BACKEND_INVALID, 500),
        (Reason.NO_HEALTHY_ENDPOINT, 503),
        (Reason.UPSTREAM_TIMEOUT, 504),
        (Reason.UPSTREAM_PROTOCOL, 502),
        (Reason.MTLS_REQUIRED, 403),
        (Reason.OVERLOADED, 503),
    ],
)
def test_statuses_that_were_promised(reason: Reason, status: int) -> None:
    assert reason.info.status == status


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.OK, Grpc.OK),
        # Gateway API, GRPCRoute.
        (Reason.NO_ROUTE, Grpc.UNIMPLEMENTED),
        (Reason.BACKEND_INVALID, Grpc.UNAVAILABLE),
        (Reason.NO_HEALTHY_ENDPOINT, Grpc.UNAVAILABLE),
        (Reason.UPSTREAM_TIMEOUT, Grpc.DEADLINE_EXCEEDED),
        (Reason.MTLS_REQUIRED, Grpc.PERMISSION_DENIED),
        (Reason.HEAD_TOO_LARGE, Grpc.RESOURCE_EXHAUSTED),
        (Reason.INTERNAL, Grpc.INTERNAL),
    ],
)
def test_grpc_statuses(reason: Reason, status: Grpc) -> None:
    assert reason.info.grpc is status


def test_only_what_is_done_is_ok_to_grpc() -> None:
    assert [reason for reason in Reason if reason.info.grpc is Grpc.OK] == [Reason.OK]


def test_the_tree() -> None:
    for kind in (ProtocolError, Refused, UpstreamError, IdentityError, ConfigError):
        assert issubclass(kind, NetproxyError)
    assert issubclass(LocalProtocolError, ProtocolError)
    assert issubclass(RemoteProtocolError, ProtocolError)
    # A decision is no fault, and our bug is not the peer's.
    assert not issubclass(Refused, UpstreamError | ProtocolError)
    assert not issubclass(LocalProtocolError, RemoteProtocolError)


def test_texts() -> None:
    assert str(Refused(Reason.NO_ROUTE)) == Reason.NO_ROUTE.info.title
    assert str(Refused(Reason.NO_ROUTE, "why")) == "why"
    assert str(UpstreamError(Reason.CONNECT_FAILED)) == Reason.CONNECT_FAILED.info.title
    assert (str(RemoteProtocolError("bad")), RemoteProtocolError("bad").status) == ("bad", 400)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({}, "m"),
        ({"file": "f"}, "f: m"),
        (
            {"file": "f", "line": 3, "obj": "Service a/b", "field": "spec.ports[0]"},
            "f:3: Service a/b: spec.ports[0]: m",
        ),
        ({"line": 3, "obj": "Service a/b"}, ":3: Service a/b: m"),
    ],
)
def test_a_config_error_is_one_line(where: dict[str, object], text: str) -> None:
    assert str(ConfigError("m", **where)) == text  # type: ignore[arg-type]
