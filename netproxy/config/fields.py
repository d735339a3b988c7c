"""The types of single fields, and what all models share.

A check that concerns one field is on that field's type; one that compares fields is a model validator that names the
guilty fields through `problems`. PURE.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from ..addr import canonical_ip
from ..errors import REASONS
from ..pattern import compile_pattern

FieldPath = tuple[str | int, ...]
"""``("spec", "rules", 0)``, by the names in the file."""

NOT_YET = "not supported yet"

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"

FLAGS = tuple(sorted({info.flag for info in REASONS.values()} - {"-"}))
"""What `errors.REASONS` puts into logs for requests that failed."""


def matcher(pattern: str, longest: int, what: str) -> AfterValidator:
    find = re.compile(pattern).fullmatch

    def check(value: str) -> str:
        if len(value) > longest:
            raise ValueError(f"must be at most {longest} characters long")
        if find(value) is None:
            raise ValueError(what)
        return value

    return AfterValidator(check)


def one_ip(text: str) -> str:
    if "%" in text:
        raise ValueError("must not have a zone")
    try:
        host = canonical_ip(text)
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 address") from None
    address = ipaddress.ip_address(host)
    if address.is_unspecified or address.is_multicast:
        raise ValueError("must be the address of one host")
    return host


_DURATION = re.compile(r"(?:[0-9]{1,5}(?:h|m|s|ms)){1,4}")
_DURATION_PART = re.compile(r"([0-9]+)(ms|h|m|s)")
_UNIT_MS = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


def _duration(text: object) -> float:
    """Seconds. The syntax is GEP-2257's: no fractions, no sign, at most four parts."""
    if not isinstance(text, str) or _DURATION.fullmatch(text) is None:
        raise ValueError('must be a duration such as "500ms", "10s" or "1h30m"')
    return sum(int(number) * _UNIT_MS[unit] for number, unit in _DURATION_PART.findall(text)) / 1000


def _timestamp(value: object) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError('must be a time such as "2025-01-31T12:00:00Z"')
    return value


_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _port_name(value: str) -> str:
    if value and _PORT_NAME.fullmatch(value) is None:
        hint = " (for a number leave out the quotes)" if value.isdecimal() else ""
        raise ValueError(f'must be a port name: lower case letters, digits and "-"{hint}')
    return value


def _target_port(value: object) -> int | str:
    if isinstance(value, str):
        if not value:
            raise ValueError("must be a port number or name")
        return _port_name(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a port number or name")
    if not 1 <= value <= 65535:
        raise ValueError("must be between 1 and 65535")
    return value


def _port_key(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 65535:
        return int(value)
    raise ValueError("must be a port number between 1 and 65535")


_LOOPBACK = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))
_MULTICAST = tuple(map(ipaddress.ip_network, ("224.0.0.0/4", "ff00::/8")))


def _external_ip(text: str) -> str:
    host = one_ip(text)
    if ipaddress.ip_address(host).is_loopback:
        raise ValueError("must not be a loopback address")
    return host


def _external_cidr(text: str) -> str:
    network = ipaddress.ip_network(_cidr(text))
    for never in (*_LOOPBACK, *_MULTICAST):
        if network.version == never.version and network.subnet_of(never):  # type: ignore[arg-type]
            raise ValueError("must not be a loopback or multicast network: those are never steered")
    return str(network)


_find_hostname = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*").fullmatch


def _external_name(value: str) -> str:
    if len(value) > 253 or _find_hostname(value) is None or any(len(label) > 63 for label in value.split(".")):
        raise ValueError('must be a host name in lower case, or "*." and a host name')
    if value.rpartition(".")[2].isdecimal():
        raise ValueError("must be a name: an address belongs to addresses")
    return value


def pattern(value: str) -> str:
    """`value` if it is a regular expression; ValueError if not."""
    if not value:
        raise ValueError("must not be empty")
    try:
        compile_pattern(value)
    except ValueError as exc:
        raise ValueError(f"is no regular expression (RE2): {exc}") from None
    return value


def _refuse_yet(value: Any) -> Any:
    if value is None or value in ([], {}):
        return None
    raise ValueError(NOT_YET)


def _network(version: int, longest: int) -> AfterValidator:
    example = "240.240.0.0/16" if version == 4 else "fd00:240::/32"

    def check(value: str) -> str:
        try:
            network = ipaddress.ip_network(value)
        except ValueError:
            network = None
        if network is None or network.version != version:
            raise ValueError(f"must be an IPv{version} network such as {example}")
        if network.prefixlen > longest:
            raise ValueError(f"must be /{longest} or larger")
        return str(network)

    return AfterValidator(check)


def _cidr(text: str) -> str:
    try:
        network = ipaddress.ip_network(canonical_ip(text) if "/" not in text else text)
    except ValueError:
        raise ValueError("must be an address or a network such as 10.0.0.0/8 or fd00::/8") from None
    if network.version == 6 and network.network_address.ipv4_mapped is not None:
        raise ValueError("must be written as an IPv4 network")
    return str(network)


def _flag(value: str) -> str:
    if value not in FLAGS:
        raise ValueError(f"must be one of {', '.join(FLAGS)}")
    return value


_SAY_DNS = 'must be lower case letters, digits and "-", and begin and end with a letter or digit'
DnsLabel = Annotated[str, matcher(_LABEL, 63, _SAY_DNS)]
DnsName = Annotated[str, matcher(rf"{_LABEL}(\.{_LABEL})*", 253, _SAY_DNS + ' ("." between parts)')]
_QUALIFIED = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
LabelKey = Annotated[
    str,
    matcher(rf"({_LABEL}(\.{_LABEL})*/)?{_QUALIFIED}", 317, 'must be a label key such as "app" or "example.com/app"'),
]
LabelValue = Annotated[
    str,
    matcher(
        rf"{_QUALIFIED}?", 63, 'must be at most 63 letters, digits, "-", "_" and ".", and end with a letter or digit'
    ),
]
Hostname = Annotated[
    str, matcher(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", 253, 'must be a host name in lower case, or "*." and a host name')
]
HeaderName = Annotated[str, matcher(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+", 256, "must be the name of an HTTP header")]
NodeName = Annotated[
    str, matcher(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", 253, 'must be letters, digits, "-", "_" and "."')
]
TrustDomain = Annotated[str, matcher(r"[a-z0-9._-]+", 255, 'must be lower case letters, digits, ".", "_" and "-"')]
PortName = Annotated[str, AfterValidator(_port_name)]
TargetPort = Annotated[int | str, PlainValidator(_target_port)]
Port = Annotated[int, Field(ge=1, le=65535)]
PortKey = Annotated[int, BeforeValidator(_port_key)]
Ip = Annotated[str, AfterValidator(one_ip)]
Cidr = Annotated[str, AfterValidator(_cidr)]
ExternalIp = Annotated[str, AfterValidator(_external_ip)]
ExternalCidr = Annotated[str, AfterValidator(_external_cidr)]
ExternalName = Annotated[str, AfterValidator(_external_name)]
Vip4Network = Annotated[str, _network(4, 24)]
Vip6Network = Annotated[str, _network(6, 112)]
Uid = Annotated[int, Field(ge=0, le=2**32 - 2)]
Duration = Annotated[float, BeforeValidator(_duration)]
PositiveDuration = Annotated[float, BeforeValidator(_duration), Field(gt=0)]
Timestamp = Annotated[datetime, BeforeValidator(_timestamp)]
Labels = dict[LabelKey, LabelValue]
Flag = Annotated[str, AfterValidator(_flag)]
Token = Annotated[
    str, matcher(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]*", 64, "must be a token (RFC 9110) of letters and digits, or empty")
]
NotYet = Annotated[Any, AfterValidator(_refuse_yet)]
"""A field of the Gateway API whose use is refused."""
Ignored = Annotated[Any, "ignored"]
"""A field of Kubernetes that may be there and means nothing here."""

T = TypeVar("T")
Items = Annotated[tuple[T, ...], Field(strict=False)]

Protocol = Literal["TCP", "UDP", "SCTP"]
MtlsMode = Literal["DISABLE", "PERMISSIVE", "STRICT"]
FailurePolicy = Literal["open", "closed"]
SteeringPreference = Literal["auto", "ebpf", "nftables", "iptables"]


def problems(*found: tuple[FieldPath, str]) -> PydanticCustomError:
    """Several problems of one model, each at a path below it."""
    return PydanticCustomError("problems", "invalid", {"problems": found})


def twice(values: list[Any], *field: str) -> list[tuple[FieldPath, str]]:
    """A problem for every value that an earlier item has already (None never counts)."""
    first: dict[Any, int] = {}
    found: list[tuple[FieldPath, str]] = []
    for index, value in enumerate(values):
        if value is None:
            continue
        if value in first:
            found.append(((index, *field), f"is the same as in item {first[value]}"))
        else:
            first[value] = index
    return found


def below(field: str, found: list[tuple[FieldPath, str]]) -> list[tuple[FieldPath, str]]:
    return [((field, *path), message) for path, message in found]


class Model(BaseModel):
    """A mapping in a file. Names are camelCase there, and null for a known field is the same as leaving it out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=to_camel)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            known = {field.alias for field in cls.model_fields.values()}
            return {key: value for key, value in data.items() if value is not None or key not in known}
        return data


class ObjectMeta(Model):
    """Name and labels of an object, as in Kubernetes."""

    name: DnsName
    """Unique among the objects of its kind in its namespace."""
    namespace: DnsLabel = "default"
    """The namespace of the object. References without a namespace mean objects of the same one."""
    labels: Labels = Field(default_factory=dict)
    """What selectors match."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Free text for people and tools."""
    creation_timestamp: Timestamp | None = None
    """Of routes and policies that compete, the older wins; one without a time is younger than any with one."""
    generation: int = 0
    """The version of the spec, told back in the status."""
    deletion_grace_period_seconds: Ignored = None
    deletion_timestamp: Ignored = None
    finalizers: Ignored = None
    generate_name: Ignored = None
    managed_fields: Ignored = None
    owner_references: Ignored = None
    resource_version: Ignored = None
    self_link: Ignored = None
    uid: Ignored = None
