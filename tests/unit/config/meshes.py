"""Meshes as YAML text, for the tests of this folder."""

from __future__ import annotations

import textwrap
from typing import Any

from netproxy.config import source
from netproxy.config.snapshot import Context, Snapshot, build_snapshot
from netproxy.config.validate import validate

FILE = "mesh.yaml"


def build(*texts: str, node: str = "node-a", **context: Any) -> Snapshot:
    """Each text is one file's worth of documents; lines count from the first text's first line."""
    documents, errors = source.parse("\n---\n".join(textwrap.dedent(t).strip("\n") for t in texts).encode(), FILE)
    valid = validate(documents)
    return build_snapshot(valid.objects, Context(node, **context), (*errors, *valid.errors))


def errors(text: str) -> list[tuple[int, str, str]]:
    """(line, field, message) of everything that is rejected. The first line of `text` is line 1."""
    return [(e.line, e.field, e.message) for e in build(text).rejected]


def service(
    name: str, ports: str = "{name: http, port: 80, targetPort: 8080}", spec: str = "", ns: str = "shop"
) -> str:
    selector = "" if "selector" in spec else f"selector: {{app: {name}}}, "
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {ns}}}
spec: {{{selector}ports: [{ports}]{", " if spec else ""}{spec}}}
"""


def workload(name: str, address: str, spec: str = "", app: str = "", ns: str = "shop") -> str:
    return f"""
apiVersion: netproxy.mesh/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: {ns}, labels: {{app: {app or name}}}}}
spec: {{addresses: [{address}]{", " if spec else ""}{spec}}}
"""


def attached(name: str, address: str, app: str = "", spec: str = "") -> str:
    more = f", {spec}" if spec else ""
    return workload(name, address, f"serviceAccount: {name}-sa, attach: {{netns: /run/netns/{name}}}{more}", app)


def route(name: str, rules: str, parents: str = "", meta: str = "", ns: str = "shop") -> str:
    parents = parents or '{group: "", kind: Service, name: web}'
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: {ns}{", " if meta else ""}{meta}}}
spec: {{parentRefs: [{parents}], rules: [{rules}]}}
"""


def tcp_route(name: str, refs: str, parents: str = "", meta: str = "", ns: str = "shop") -> str:
    parents = parents or '{group: "", kind: Service, name: db}'
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {{name: {name}, namespace: {ns}{", " if meta else ""}{meta}}}
spec: {{parentRefs: [{parents}], rules: [{{backendRefs: [{refs}]}}]}}
"""


def external(name: str, spec: str, ports: str = "{port: 443, protocol: TLS}", ns: str = "shop") -> str:
    return f"""
apiVersion: netproxy.mesh/v1alpha1
kind: ExternalService
metadata: {{name: {name}, namespace: {ns}}}
spec: {{{spec}, ports: [{ports}]}}
"""


def to(name: str, port: int = 80, more: str = "") -> str:
    return f"{{name: {name}, port: {port}{more}}}"


def slice_of(name: str, endpoints: str, ports: str = "{name: http, port: 8080}", suffix: str = "1") -> str:
    return f"""
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-{suffix}, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{ports}]
endpoints: [{endpoints}]
"""


def mtls(name: str, spec: str, ns: str = "shop", meta: str = "") -> str:
    return f"""
apiVersion: netproxy.mesh/v1alpha1
kind: PeerAuthentication
metadata: {{name: {name}, namespace: {ns}{meta}}}
spec: {{{spec}}}
"""
