"""The reference of all resources, made from the models: ``python -m netproxy.config.reference FILE`` (``make docs``).

Types, defaults and bounds are those that validation uses. The sentence for a field is the text under it in the model's
source; a field without one is an error, as is a type that has no words here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..errors import REASONS
from . import fields
from .validate import KINDS, OLD_VERSIONS

_HEAD = """# Resources

<!-- Made by `make docs` from the models in netproxy/config. Edits here are lost. -->

What netproxy reads with `-f FILE` or `-f FOLDER`: YAML or JSON, several documents per file, `kind: List` too. A folder
is read with its subfolders (`*.yaml`, `*.yml`), and again whenever something in it changes.

* Each object is accepted or rejected by itself. One that is wrong never keeps another from working, and while it is
  wrong its last good version stays in force. `netproxy validate -f PATH` tells every error with file, line and field.
* A field that is not listed here is an error, so that a typo is never a setting that does nothing. `null` is the same
  as leaving a field out.
* Values have types: a port is a number, a label is text (`version: "1"`).
* A **duration** is text such as `500ms`, `10s` or `1h30m`: up to four whole numbers, each with `h`, `m`, `s` or `ms`.
* A **network** is written as `10.0.0.0/8` or `fd00::/8`, one address may be written without its length.
* What two objects claim, the first has: objects are taken in the order of the files' paths, and within a file from top
  to bottom. Of routes and policies, the one with the older `metadata.creationTimestamp` comes first.
"""

EXAMPLES = {
    "Service": """
# "reviews" in namespace shop: port 80 of its virtual addresses leads to port 8080 of the workloads with app=reviews.
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec:
  selector: {app: reviews}
  ports:
  - {name: http, port: 80, targetPort: 8080}
""",
    "EndpointSlice": """
# A database that no Workload describes: a Service without selector, and its addresses by hand.
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports:
- {name: mysql, port: 3306}
endpoints:
- addresses: ["192.0.2.10"]
- addresses: ["192.0.2.11"]
  conditions: {ready: false}
""",
    "HTTPRoute": """
# Testers and the new API get version 2, everyone else one time in ten.
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: reviews, namespace: shop}
spec:
  parentRefs:
  - {group: "", kind: Service, name: reviews, port: 80}
  rules:
  - matches:
    - headers: [{name: x-tester, value: "yes"}]
    - path: {type: RegularExpression, value: "/v[2-9]/.*"}
      method: GET
    - queryParams: [{name: version, value: "2"}]
    backendRefs:
    - {name: reviews-v2, port: 80}
  - backendRefs:
    - {name: reviews-v1, port: 80, weight: 90}
    - {name: reviews-v2, port: 80, weight: 10}
    timeouts: {request: 2s}
""",
    "TCPRoute": """
# One connection in ten goes to the new database.
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: db, namespace: shop}
spec:
  parentRefs:
  - {group: "", kind: Service, name: db, port: 3306}
  rules:
  - backendRefs:
    - {name: db, port: 3306, weight: 9}
    - {name: db-new, port: 3306, weight: 1}
""",
    "Workload": """
# A pod on this node, by its network namespace. A resolver of its own answers what is no name of the mesh, and what goes
# to the backup server is left alone.
apiVersion: netproxy.mesh/v1alpha1
kind: Workload
metadata: {name: reviews-1, namespace: shop, labels: {app: reviews, version: v1}}
spec:
  addresses: ["10.80.1.3", "fd00:80::3"]
  serviceAccount: reviews
  attach: {netns: /run/netns/reviews-1}
  dns: {nameservers: ["192.0.2.53"]}
  traffic:
    outbound: {excludeCidrs: ["192.0.2.200"], excludePorts: [873]}
""",
    "ExternalService": """
# The bank, by name: TLS to port 443, wherever its names lead.
apiVersion: netproxy.mesh/v1alpha1
kind: ExternalService
metadata: {name: bank, namespace: shop}
spec:
  hosts: [api.bank.example, "*.cdn.bank.example"]
  ports:
  - {name: https, port: 443, protocol: TLS}
""",
    "MeshConfig": """
# Nothing leaves the mesh that no ExternalService allows; failed and slow requests are logged, and one in a hundred.
apiVersion: netproxy.mesh/v1alpha1
kind: MeshConfig
metadata: {name: mesh, namespace: netproxy-system}
spec:
  outboundPolicy: deny
  connectTimeout: 2s
  accessLog: {percent: 1, minStatus: 500, minDuration: 1s, flags: [UF, UH]}
""",
    "PeerAuthentication": """
# ratings takes mesh TLS only, except on its metrics port.
apiVersion: netproxy.mesh/v1alpha1
kind: PeerAuthentication
metadata: {name: ratings, namespace: shop}
spec:
  selector: {matchLabels: {app: ratings}}
  mtls: {mode: STRICT}
  portLevelMtls:
    "9091": {mode: PERMISSIVE}
""",
}
"""A test validates them, together."""

_WORDS: tuple[tuple[Any, str], ...] = (
    (fields.Port, "port"),
    (fields.PortName, "port name"),
    (fields.TargetPort, "port or port name"),
    (fields.PortKey, "port, as text"),
    (fields.Ip, "address"),
    (fields.ExternalIp, "address"),
    (fields.Cidr, "network"),
    (fields.ExternalCidr, "network"),
    (fields.Vip4Network, "IPv4 network"),
    (fields.Vip6Network, "IPv6 network"),
    (fields.Hostname, "host name"),
    (fields.ExternalName, "host name"),
    (fields.DnsName, "DNS name"),
    (fields.DnsLabel, "DNS label"),
    (fields.NodeName, "node name"),
    (fields.TrustDomain, "trust domain"),
    (fields.HeaderName, "header name"),
    (fields.LabelKey, "label key"),
    (fields.LabelValue, "label value"),
    (fields.Labels, "labels"),
    (fields.Timestamp, "time (RFC 3339)"),
    (fields.Duration, "duration"),
    (fields.PositiveDuration, "duration > 0"),
    (fields.Flag, "response flag"),
    (fields.Token, "token"),
    (fields.Uid, "user number"),
    (bool, "true or false"),
    (int, "whole number"),
    (float, "number"),
    (str, "text"),
)
_SAID_ABOVE = ("api_version", "kind", "metadata", "status")
"""Said once, above all tables."""


def reference() -> str:
    """All of it, as Markdown."""
    parts = [_HEAD, _kinds(), "## metadata\n\nOf every kind.\n", *_table(fields.ObjectMeta, "metadata")]
    for kind, (version, model) in KINDS.items():
        also = f" (also {OLD_VERSIONS[kind]})" if kind in OLD_VERSIONS else ""
        parts += [f"## {kind}\n\n`apiVersion: {version}`{also}\n", _paragraphs(model.__doc__ or ""), ""]
        parts += [f"```yaml\n{EXAMPLES[kind].strip()}\n```\n", *_table(model, "")]
    parts += [_flags()]
    return "\n".join(parts)


def _kinds() -> str:
    lines = ["| Kind | apiVersion | |", "|---|---|---|"]
    for kind, (version, model) in KINDS.items():
        what = _plain(model.__doc__ or "").partition(". ")[0].rstrip(".")
        lines.append(f"| [{kind}](#{kind.lower()}) | `{version}` | {what}. |")
    return "\n".join(lines) + "\n"


def _flags() -> str:
    lines = ["## Response flags", "", "In access logs, metrics and the header `x-netproxy-reason`.", ""]
    lines += ["| Flag | HTTP status | |", "|---|---|---|"]
    for info in sorted(set(REASONS.values()), key=lambda info: (info.flag, info.status, info.title)):
        if info.flag in fields.FLAGS:
            lines.append(f"| `{info.flag}` | {info.status or ''} | {info.title} |")
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel], path: str) -> Iterator[str]:
    yield "| Field | Type | Default | |\n|---|---|---|---|"
    without: dict[str, list[str]] = {"accepted, without effect": [], "refused, not supported yet": []}
    ignored, refused = without.values()
    yield from _rows(model, path, ignored, refused)
    yield ""
    for what, names in without.items():
        if names:
            yield f"{what.capitalize()}: {', '.join(f'`{name}`' for name in names)}.\n"


def _rows(
    model: type[BaseModel], path: str, ignored: list[str], refused: list[str], only: Collection[str] = ()
) -> Iterator[str]:
    """`only`: names of the fields that are told; all of them when empty."""
    hints = typing.get_type_hints(model, include_extras=True)
    for name, info in model.model_fields.items():
        if name == "metadata" and hints[name] is not fields.ObjectMeta:
            # What is special about it.
            yield from _rows(hints[name], "metadata", [], [], only=hints[name].__annotations__)
        if (name in _SAID_ABOVE and not path) or (only and name not in only):
            continue
        here = f"{path}.{info.alias}" if path else str(info.alias)
        if hints[name] == fields.Ignored:
            ignored.append(here)
            continue
        if hints[name] == fields.NotYet:
            refused.append(here)
            continue
        words, inner, suffix = _type(hints[name])
        if name != "spec":
            text = _sentences(model).get(name, "").replace("|", "\\|")
            if not text:
                raise TypeError(f"{model.__name__}.{name} needs a sentence under it")
            yield f"| `{here}` | {words} | {_default(info, hints[name])} | {text} |"
        if inner is not None:
            yield from _rows(inner, here + suffix, ignored, refused)


def _type(hint: Any) -> tuple[str, type[BaseModel] | None, str]:
    """Words; the model inside if there is one, and what leads to it."""
    for known, words in _WORDS:
        if hint is known or hint == known:
            return _with_bounds(words, typing.get_args(hint)[1:]), None, ""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "object", hint, ""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        words, inner, suffix = _type(arguments[0])
        return _with_bounds(words, arguments[1:]), inner, suffix
    if origin in (typing.Union, types.UnionType):
        (one,) = (argument for argument in arguments if argument is not type(None))
        return _type(one)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments), None, ""
    if origin is tuple:
        words, inner, _ = _type(arguments[0])
        plural = "es" if words.endswith("s") else "" if words == "text" else "s"
        name, comma, bounds = words.partition(",")
        return f"list of {name}{plural}{comma}{bounds}", inner, "[]"
    if origin is dict:
        key, (words, inner, _) = _type(arguments[0])[0], _type(arguments[1])
        return f"map from {key} to {words}", inner, ".*"
    raise TypeError(f"no words for the type {hint}")


def _with_bounds(words: str, metadata: Iterable[Any]) -> str:
    found = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    low = next((part.ge for part in found if isinstance(part, annotated_types.Ge)), None)
    high = next((part.le for part in found if isinstance(part, annotated_types.Le)), None)
    least = next((part.min_length for part in found if isinstance(part, annotated_types.MinLen)), 0)
    most = next((part.max_length for part in found if isinstance(part, annotated_types.MaxLen)), None)
    if low is not None and high is not None:
        words += f", {low:,} to {high:,}" if words != "port" else ""
    unit = "" if words.startswith("list") else " characters"
    if least and most is not None:
        words += f", {least} to {most:,}{unit}" if least != most else f", exactly {most}"
    elif most is not None:
        words += f", at most {most:,}{unit}"
    return words


def _default(info: FieldInfo, hint: Any) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is PydanticUndefined or value is None or value in ("", ()) or isinstance(value, BaseModel):
        return ""
    if hint in (fields.Duration, fields.PositiveDuration):
        return f"`{duration_text(value)}`"
    if isinstance(value, tuple):
        return "" if isinstance(value[0], BaseModel) else ", ".join(f"`{item}`" for item in value)
    return (
        f"`{str(value).lower()}`"
        if isinstance(value, bool)
        else f"`{value:g}`"
        if isinstance(value, float)
        else f"`{value}`"
    )


def duration_text(seconds: float) -> str:
    """As it is written in a file: ``1h30m``."""
    left, parts = round(seconds * 1000), []
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        if left >= size:
            parts.append(f"{left // size}{unit}")
            left %= size
    return "".join(parts) or "0s"


@functools.cache
def _sentences(model: type[BaseModel]) -> dict[str, str]:
    """The text under each field, its own before those of the classes it comes from."""
    found: dict[str, str] = {}
    for owner in model.__mro__:
        if issubclass(owner, fields.Model):
            found = _in_source(owner.__module__).get(owner.__name__, {}) | found
    return found


@functools.cache
def _in_source(module: str) -> dict[str, dict[str, str]]:
    """By class and field."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            texts = found[node.name] = {}
            for field, text in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match text:
                        case ast.Expr(value=ast.Constant(value=str(said))):
                            texts[field.target.id] = _plain(said)
    return found


def _plain(docstring: str) -> str:
    """One line of a table."""
    return " ".join(docstring.split())


def _paragraphs(docstring: str) -> str:
    return "\n\n".join(
        textwrap.fill(_plain(part), 120, break_on_hyphens=False) for part in inspect.cleandoc(docstring).split("\n\n")
    )


def main() -> None:
    (path,) = sys.argv[1:]
    with open(path, "w") as file:
        file.write(reference())


if __name__ == "__main__":
    main()
