from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.config import source
from netproxy.config.kubernetes import EndpointSlice, HTTPRoute, Service, TCPRoute
from netproxy.config.mesh import ExternalService, MeshConfig, PeerAuthentication, Workload
from netproxy.config.model import Document
from netproxy.config.validate import KINDS, Validated, validate

from .meshes import errors


def check(text: str) -> Validated:
    documents, wrong = source.parse(text.encode(), "mesh.yaml")
    assert wrong == []
    return validate(documents)


def spec_of(kind: str, spec: str, meta: str = "name: x") -> Any:
    found = check(f"apiVersion: {KINDS[kind][0]}\nkind: {kind}\nmetadata: {{{meta}}}\n{spec}\n")
    assert [str(e) for e in found.errors] == []
    return found.objects[0].resource


def spec_errors(kind: str, spec: str) -> list[tuple[str, str]]:
    """(field below spec, message) for a spec given in flow style."""
    found = check(f"apiVersion: {KINDS[kind][0]}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {spec}\n")
    assert found.objects == ()
    return [(e.field.removeprefix("spec").removeprefix("."), e.message) for e in found.errors]


def test_all_errors_of_an_object_each_at_its_line() -> None:
    text = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: Reviews
  namespace: shop
spec:
  parentRefs:
  - {group: "", kind: Service, name: reviews, prot: 80}
  rules:
  - matches:
    - path:
        type: Prefix
        value: /a
    - path:
        value: a//b
    backendRefs:
    - name: a
      port: 80
    - name: b
      port: 80
      weight: -1
    - name: c
    filters:
    - type: RequestRedirect
    timeouts:
      request: 1.5s
"""
    assert errors(text) == [
        (4, "metadata.name", 'must be lower case letters, digits and "-", and begin and end with a letter or digit '
            '("." between parts), not "Reviews"'),
        (8, "spec.parentRefs[0].prot", 'unknown field; did you mean "port"?'),
        (12, "spec.rules[0].matches[0].path.type",
            'must be "Exact", "PathPrefix" or "RegularExpression", not "Prefix"'),
        (15, "spec.rules[0].matches[1].path.value", 'must start with "/"'),
        (21, "spec.rules[0].backendRefs[1].weight", "must be at least 0, not -1"),
        (22, "spec.rules[0].backendRefs[2].port", "required for a Service"),
        (23, "spec.rules[0].filters", "not supported yet"),
        (26, "spec.rules[0].timeouts.request", 'must be a duration such as "500ms", "10s" or "1h30m", not "1.5s"'),
    ]  # fmt: skip


def test_an_error_reads_as_one_line() -> None:
    found = check('apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: "80"\n')
    assert [str(e) for e in found.errors] == [
        'mesh.yaml:6: Service default/a: spec.ports[0].port: must be a whole number, not "80"'
    ]


def test_syntax_problems_are_reported_with_the_others() -> None:
    assert errors(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports: [{port: 80}]\n  typ: x\n  ports: []\n"
    ) == [
        (6, "spec.typ", 'unknown field; did you mean "type"?'),
        (7, "spec.ports", "is given twice"),
    ]


def test_one_bad_object_never_blocks_another_and_of_two_the_first_counts() -> None:
    def service(name: str, port: str) -> str:
        return f"apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports: [{{port: {port}}}]\n"

    found = check(
        "---\n".join([service("a", "0"), service("b", "1"), service("b", "2"), service("a", "3"), "kind: 3\n"])
    )
    assert [(o.name, o.resource.spec.ports[0].port) for o in found.objects if isinstance(o.resource, Service)] == [
        ("default/b", 1),
        ("default/a", 3),  # the invalid one claims nothing
    ]
    assert [str(e) for e in found.errors[:2]] == [
        "mesh.yaml:6: Service default/a: spec.ports[0].port: must be at least 1, not 0",
        "mesh.yaml:18: Service default/b: metadata.name: is defined already at mesh.yaml:8",
    ]
    assert len(found.errors) == 3


@pytest.mark.parametrize(
    ("head", "line", "field", "start"),
    [
        (
            "kind: Servce\napiVersion: v1",
            1,
            "kind",
            'unknown kind "Servce"; did you mean "Service"?; supported: Service (v1), ',
        ),
        ("apiVersion: v1\nkind: Deployment", 2, "kind", 'unknown kind "Deployment"; supported: '),
        ("apiVersion: v1\nkind: GRPCRoute", 2, "kind", "GRPCRoute is not supported yet; supported: "),
        (
            "kind: TCPRoute\napiVersion: gateway.networking.k8s.io/v1beta1",
            2,
            "apiVersion",
            'TCPRoute is supported as "gateway.networking.k8s.io/v1", not "gateway.networking.k8s.io/v1beta1"; ',
        ),
        ("kind: TCPRoute", 1, "apiVersion", 'TCPRoute is supported as "gateway.networking.k8s.io/v1", not nothing; '),
        ("apiVersion: v1", 1, "kind", "required; supported: "),
        ("kind: Service", 1, "apiVersion", 'Service is supported as "v1", not nothing; '),
        (
            "kind: HTTPRoute\napiVersion: gateway.networking.k8s.io/v1beta1",
            2,
            "apiVersion",
            'HTTPRoute is supported as "gateway.networking.k8s.io/v1", not "gateway.networking.k8s.io/v1beta1"; ',
        ),
    ],
)
def test_unknown_kinds(head: str, line: int, field: str, start: str) -> None:
    ((found_line, found_field, message),) = errors(f"{head}\nmetadata: {{name: x}}\n")
    assert (found_line, found_field) == (line, field)
    assert message.startswith(start)


def test_how_a_broken_object_is_called() -> None:
    titles = [
        e.obj for e in check("kind: X\n---\nmetadata: {name: a, namespace: b}\n---\nkind: Y\nmetadata: []\n").errors
    ]
    assert titles == ["X default/?", "? b/a", "Y default/?"]


@pytest.mark.parametrize(
    ("meta", "field", "message"),
    [
        ("{}", "metadata.name", "required"),
        ("[]", "metadata", "must be a mapping, not a list"),
        ("{name: x, labels: {version: 1}}", "metadata.labels.version", "must be text, not 1: put it in quotes"),
        ("{name: x, labels: {on: true}}", "metadata.labels.on", "must be text, not true: put it in quotes"),
        (
            "{name: x, labels: {-a: b}}",
            "metadata.labels[-a]",
            'must be a label key such as "app" or "example.com/app", not "-a"',
        ),
        ("{name: x, namespace: a.b}", "metadata.namespace", "must be lower case"),
        ("{name: x, creationTimestamp: 2025-01-31}", "metadata.creationTimestamp", "must be a time such as"),
        ("{name: x, creationTimestamp: soon}", "metadata.creationTimestamp", "must be a time such as"),
        ("{name: x, annotatons: {}}", "metadata.annotatons", 'unknown field; did you mean "annotations"?'),
        ("{name: " + "x" * 254 + "}", "metadata.name", "must be at most 253 characters long"),
    ],
)
def test_bad_metadata(meta: str, field: str, message: str) -> None:
    ((_, found_field, found),) = errors(f"apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {meta}\n")
    assert found_field == field
    assert found.startswith(message)


def test_metadata_as_kubernetes_writes_it() -> None:
    meta = """name: x, namespace: shop, uid: abc, resourceVersion: "12", generation: 3, selfLink: /x,
      creationTimestamp: 2025-01-31T12:00:00+01:00, labels: {app.kubernetes.io/name: x, empty: ""}, annotations: null,
      ownerReferences: [{kind: A}], managedFields: [{}], finalizers: [a]"""
    found = spec_of("MeshConfig", "status: {conditions: []}", meta).metadata
    assert found.creation_timestamp == datetime(2025, 1, 31, 11, tzinfo=UTC)
    assert found.annotations == {}
    assert found.labels == {"app.kubernetes.io/name": "x", "empty": ""}


def test_service_as_kubernetes_writes_it() -> None:
    service: Service = spec_of(
        "Service",
        """
spec:
  allocateLoadBalancerNodePorts: true
  clusterIP: 10.96.0.7
  clusterIPs: [10.96.0.7, "fd00:0::7"]
  externalIPs: []
  externalTrafficPolicy: Cluster
  internalTrafficPolicy: Cluster
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: PreferDualStack
  loadBalancerIP: ""
  publishNotReadyAddresses: false
  sessionAffinity: None
  selector: null
  type: LoadBalancer
  ports:
  - {name: http, port: 80, targetPort: web, protocol: TCP, appProtocol: kubernetes.io/ws, nodePort: 30080}
  - {name: dns, port: 80, protocol: UDP}
status: {loadBalancer: {}}
""",
    )
    assert service.spec.cluster_addresses == ("10.96.0.7", "fd00::7")
    assert service.spec.ports[0].target_port == "web"
    assert service.spec.ports[1].target_port is None
    assert not service.spec.headless
    assert spec_of("Service", "spec: {clusterIP: None, clusterIPs: [None]}").spec.headless


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}", [("ports", "at least one port is required")]),
        ("{type: ExternalName, externalName: example.com}", [("type", "ExternalName is not supported yet")]),
        ("{ports: [{port: 80}, {port: 81}]}",
            [("ports[0].name", "required when there are several ports"),
             ("ports[1].name", "required when there are several ports")]),
        ("{ports: [{name: a, port: 80}, {name: a, port: 80}]}",
            [("ports[1].port", "is the same as in item 0"), ("ports[1].name", "is the same as in item 0")]),
        ("{ports: [{port: 80, targetPort: 0}]}", [("ports[0].targetPort", "must be between 1 and 65535, not 0")]),
        ("{ports: [{port: 80, targetPort: true}]}",
            [("ports[0].targetPort", "must be a port number or name, not true")]),
        ("{ports: [{port: 80, targetPort: '8080'}]}",
            [("ports[0].targetPort",
              'must be a port name: lower case letters, digits and "-" '
              '(for a number leave out the quotes), not "8080"')]),
        ("{ports: [{port: 80, protocol: tcp}]}", [("ports[0].protocol", 'must be "TCP", "UDP" or "SCTP", not "tcp"')]),
        ("{ports: 80}", [("ports", "must be a list, not 80")]),
        ("{ports: [80]}", [("ports[0]", "must be a mapping, not 80")]),
        ("{ports: [~]}", [("ports[0]", "must be a mapping, not nothing")]),
        ("{ports: [{port: 80.0}]}", [("ports[0].port", "must be a whole number, not 80.0")]),
        ("{ports: [{port: 70000}]}", [("ports[0].port", "must be at most 65535, not 70000")]),
        ("{ports: [{port: 80}], selektor: ~}", [("selektor", 'unknown field; did you mean "selector"?')]),
        ("{ports: [{port: 80}], clusterIP: 10.1}",
            [("clusterIP", "must be text, not 10.1: put it in quotes")]),
        ("{ports: [{port: 80}], clusterIP: ten}",
            [("clusterIP", 'must be an IPv4 or IPv6 address, or "None" for a headless Service')]),
        ("{ports: [{port: 80}], clusterIPs: [10.0.0.1]}",
            [("clusterIPs", "needs clusterIP, with the same first address")]),
        ("{ports: [{port: 80}], clusterIP: 10.0.0.1, clusterIPs: [10.0.0.2]}",
            [("clusterIPs[0]", "must be the same as clusterIP")]),
        ("{ports: [{port: 80}], clusterIP: 10.0.0.1, clusterIPs: [10.0.0.1, 10.0.0.2]}",
            [("clusterIPs[1]", "must be of the other IP family than the first")]),
    ],
)  # fmt: skip
def test_bad_services(spec: str, expected: list[tuple[str, str]]) -> None:
    assert spec_errors("Service", spec) == expected


def test_slice_as_kubernetes_writes_it() -> None:
    found: EndpointSlice = spec_of(
        "EndpointSlice",
        """
addressType: IPv6
ports: [{name: null, port: 80, protocol: TCP, appProtocol: http}]
endpoints:
- addresses: ["FD00::0001"]
  conditions: {ready: null, serving: true, terminating: false}
  nodeName: a
  zone: z
  hostname: h
  targetRef: {kind: Pod, name: x}
  hints: {forZones: [{name: z}]}
- {addresses: ["fd00::2"], conditions: {ready: true, terminating: true}}
- {addresses: ["fd00::3"], conditions: {ready: false}}
""",
        "name: x, labels: {kubernetes.io/service-name: web}",
    )
    assert found.service_name == "web"
    assert [(e.addresses[0], e.ready) for e in found.endpoints] == [
        ("fd00::1", True),
        ("fd00::2", False),
        ("fd00::3", False),
    ]


def test_bad_slices() -> None:
    head = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: x}\n"
    assert errors(head + "addressType: FQDN") == [(4, "addressType", "FQDN is not supported yet")]
    assert errors(
        head + "addressType: IPv4\nendpoints:\n- addresses: [10.0.0.1, 'fd00::1']\n- addresses: []\n- {}\n"
    ) == [
        (7, "endpoints[1].addresses", "must have at least 1 entry"),
        (8, "endpoints[2].addresses", "required"),
    ]
    assert errors(head + "addressType: IPv4\nendpoints:\n- addresses:\n  - 10.0.0.1\n  - fd00::1\n") == [
        (8, "endpoints[0].addresses[1]", "is not an IPv4 address")
    ]
    for address in ("0.0.0.0", "224.0.0.1", "::"):
        assert errors(head + f"addressType: IPv4\nendpoints: [{{addresses: ['{address}']}}]")[0][2].startswith(
            "must be the address of one host"
        )


def rule(text: str) -> str:
    return f"{{parentRefs: [{{name: a}}], rules: [{text}]}}"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (rule("{matches: [{path: {type: RegularExpression, value: '/a(?=b)'}}]}"),
            [("rules[0].matches[0].path.value", "is no regular expression (RE2): invalid perl operator: (?=")]),
        (rule("{matches: [{path: {type: RegularExpression, value: ''}}]}"),
            [("rules[0].matches[0].path.value", "must not be empty")]),
        (rule(r"{matches: [{headers: [{type: RegularExpression, name: a, value: '(b)\1'}]}]}"),
            [("rules[0].matches[0].headers[0].value", r"is no regular expression (RE2): invalid escape sequence: \1")]),
        (rule("{matches: [{headers: [{type: RegularExpression, name: a, value: " + "x" * 1025 + "}]}]}"),
            [("rules[0].matches[0].headers[0].value",
              "is no regular expression (RE2): has 1025 characters, at most 1024 are allowed")]),
        (rule(r"{matches: [{queryParams: [{type: RegularExpression, name: a, value: '\pL{900}'}]}]}"),
            [("rules[0].matches[0].queryParams[0].value",
              "is no regular expression (RE2): pattern too large - compile failed")]),
        (rule("{matches: [{queryParams: [{name: '', value: ''}, {name: a, value: b, type: Prefix}]}]}"),
            [("rules[0].matches[0].queryParams[0].name", "must not be empty"),
             ("rules[0].matches[0].queryParams[0].value", "must not be empty"),
             ("rules[0].matches[0].queryParams[1].type", 'must be "Exact" or "RegularExpression", not "Prefix"')]),
        (rule("{matches: [{queryParams: [" + ", ".join(["{name: a, value: b}"] * 17) + "]}]}"),
            [("rules[0].matches[0].queryParams", "must have at most 16 entries, not 17")]),
        (rule("{matches: [" + ", ".join(["{headers: [" + ", ".join(
            f"{{name: h{n}, value: a+, type: RegularExpression}}" for n in range(13)) + "]}"] * 5) + "]}"),
            [("rules", "has 65 regular expressions in all, at most 64 are allowed")]),
        (rule("{matches: [{method: get}]}"),
            [("rules[0].matches[0].method",
              'must be "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE" or "PATCH", not "get"')]),
        (rule("{filters: [{type: URLRewrite}]}"), [("rules[0].filters", "not supported yet")]),
        (rule("{backendRefs: [{name: a, port: 1, filters: [{type: URLRewrite}]}]}"),
            [("rules[0].backendRefs[0].filters", "not supported yet")]),
        (rule("{timeouts: {backendRequest: 1s}}"), [("rules[0].timeouts.backendRequest", "not supported yet")]),
        (rule("{retry: {attempts: 2}}"), [("rules[0].retry", "not supported yet")]),
        (rule("{sessionPersistence: {type: Cookie}}"), [("rules[0].sessionPersistence", "not supported yet")]),
        (rule("{matches: [{headers: [{name: 'a b', value: b}]}]}"),
            [("rules[0].matches[0].headers[0].name", 'must be the name of an HTTP header, not "a b"')]),
        (rule("{matches: [{headers: [{name: a, value: ''}]}]}"),
            [("rules[0].matches[0].headers[0].value", "must not be empty")]),
        (rule("{backendRefs: [{name: a, port: 1, weight: 1000001}]}"),
            [("rules[0].backendRefs[0].weight", "must be at most 1000000, not 1000001")]),
        (rule("{name: a}, {name: a}"), [("rules[1].name", "is the same as in item 0")]),
        (rule(", ".join(["{}"] * 17)), [("rules", "must have at most 16 entries, not 17")]),
        (rule("{matches: [" + ", ".join(["{}"] * 65) + "]}"),
            [("rules[0].matches", "must have at most 64 entries, not 65")]),
        (rule(", ".join(["{matches: [" + ", ".join(["{}"] * 43) + "]}"] * 3)),
            [("rules", "has 129 matches in all, at most 128 are allowed")]),
        (rule("{backendRefs: [" + ", ".join(["{name: a, port: 1}"] * 17) + "]}"),
            [("rules[0].backendRefs", "must have at most 16 entries, not 17")]),
        ("{rules: []}", [("rules", "must have at least 1 entry")]),
        ("{parentRefs: [{name: a}, {name: a}]}", [("parentRefs[1]", "is the same as in item 0")]),
        ("{hostnames: ['*.*.x', 'A.b']}",
            [("hostnames[0]", 'must be a host name in lower case, or "*." and a host name, not "*.*.x"'),
             ("hostnames[1]", 'must be a host name in lower case, or "*." and a host name, not "A.b"')]),
    ],
)  # fmt: skip
def test_bad_routes(spec: str, expected: list[tuple[str, str]]) -> None:
    assert spec_errors("HTTPRoute", spec) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a", 'must start with "/"'),
        ("", 'must start with "/"'),
        ("/a//b", 'must not contain "//"'),
        ("/a/./b", 'must not contain "/./"'),
        ("/a/../b", 'must not contain "/../"'),
        ("/a%2fb", 'must not contain "%2f"'),
        ("/a%2Fb", 'must not contain "%2F"'),
        ("/a#b", 'must not contain "#"'),
        ("/a/..", 'must not end with "/.."'),
        ("/a/.", 'must not end with "/."'),
        ("/a b", "contains a character that is not allowed in a path"),
        ("/a%2", "contains a character that is not allowed in a path"),
        ("/a?b", "contains a character that is not allowed in a path"),
        ("/" + "a" * 1024, "must be at most 1024 characters long"),
    ],
)
@pytest.mark.parametrize("kind", ["Exact", "PathPrefix"])
def test_bad_paths(kind: str, path: str, message: str) -> None:
    spec = rule(f"{{matches: [{{path: {{type: {kind}, value: '{path}'}}}}]}}")
    assert spec_errors("HTTPRoute", spec) == [("rules[0].matches[0].path.value", message)]


def test_route_defaults() -> None:
    route: HTTPRoute = spec_of("HTTPRoute", "spec: {parentRefs: [{name: gw}], hostnames: ['*.example.com', a.b]}")
    assert (route.spec.parent_refs[0].kind, route.spec.parent_refs[0].group) == ("Gateway", "gateway.networking.k8s.io")
    assert len(route.spec.rules) == 1
    route = spec_of(
        "HTTPRoute", "spec: {rules: [{filters: [], backendRefs: [{name: a, port: 80, weight: 0}], matches: [{}]}]}"
    )
    assert route.spec.rules[0].matches[0].path.value == "/"
    assert route.spec.rules[0].backend_refs[0].weight == 0


def test_route_matches() -> None:
    route: HTTPRoute = spec_of(
        "HTTPRoute",
        """
spec:
  rules:
  - matches:
    - path: {type: RegularExpression, value: "/v[0-9]+/.*"}
      method: PATCH
      headers: [{type: RegularExpression, name: X-A, value: "(?i)a|b"}]
      queryParams: [{type: RegularExpression, name: "filter[é]", value: ".+"}, {name: q, value: "&"}]
    - {queryParams: null, method: null}
""",
    )
    match, other = route.spec.rules[0].matches
    assert (match.path.value, match.method, match.headers[0].value) == ("/v[0-9]+/.*", "PATCH", "(?i)a|b")
    assert [(q.name, q.value, q.type) for q in match.query_params] == [
        ("filter[é]", ".+", "RegularExpression"),
        ("q", "&", "Exact"),
    ]
    assert (other.method, other.query_params) == (None, ())


@pytest.mark.parametrize("version", ["v1", "v1alpha2"])
def test_tcp_routes_of_both_versions(version: str) -> None:
    text = f"""apiVersion: gateway.networking.k8s.io/{version}
kind: TCPRoute
metadata: {{name: x}}
spec:
  parentRefs: [{{group: "", kind: Service, name: a, port: 1}}]
  rules: [{{name: r, backendRefs: [{{name: b, port: 2, weight: 3}}]}}]
"""
    (found,) = check(text).objects
    assert isinstance(found.resource, TCPRoute)
    assert found.resource.spec.rules[0].backend_refs[0].weight == 3


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}", [("rules", "required")]),
        ("{rules: []}", [("rules", "must have at least 1 entry")]),
        ("{rules: [{backendRefs: [{name: a, port: 1}]}, {backendRefs: [{name: a, port: 1}]}]}",
            [("rules", "must have at most 1 entries, not 2")]),
        ("{rules: [{}]}", [("rules[0].backendRefs", "required")]),
        ("{rules: [{backendRefs: []}]}", [("rules[0].backendRefs", "must have at least 1 entry")]),
        ("{rules: [{backendRefs: [{name: a, port: 1, filters: []}], matches: []}]}",
            [("rules[0].backendRefs[0].filters", "unknown field"), ("rules[0].matches", "unknown field")]),
        ("{parentRefs: [{name: a}, {name: a}], rules: [{backendRefs: [{name: a, port: 1}]}]}",
            [("parentRefs[1]", "is the same as in item 0")]),
    ],
)  # fmt: skip
def test_bad_tcp_routes(spec: str, expected: list[tuple[str, str]]) -> None:
    assert spec_errors("TCPRoute", spec) == expected


def test_external_service() -> None:
    found: ExternalService = spec_of(
        "ExternalService",
        """
spec:
  hosts: [api.example.com, "*.cdn.example.com"]
  addresses: [192.0.2.1, 198.51.100.0/24, "2001:DB8::/32", 0.0.0.0/0]
  ports: [{port: 443, protocol: TLS, name: https, targetPort: 8443}, {port: 80, protocol: HTTP}]
  endpoints: ["203.0.113.1", "2001:DB8::1"]
""",
    )
    assert found.spec.addresses == ("192.0.2.1/32", "198.51.100.0/24", "2001:db8::/32", "0.0.0.0/0")
    assert found.spec.endpoints == ("203.0.113.1", "2001:db8::1")
    assert [(p.port, p.target_port) for p in found.spec.ports] == [(443, 8443), (80, None)]


NAME = 'must be a host name in lower case, or "*." and a host name'


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{hosts: [a.b]}", [("ports", "required")]),
        ("{hosts: [a.b], ports: []}", [("ports", "must have at least 1 entry")]),
        ("{ports: [{port: 1, protocol: TCP}]}", [("hosts", "hosts, addresses or both are required")]),
        ("{hosts: [a.b], ports: [{port: 1}]}", [("ports[0].protocol", "required")]),
        ("{hosts: [a.b], ports: [{port: 1, protocol: UDP}]}",
            [("ports[0].protocol", 'must be "TLS", "HTTP" or "TCP", not "UDP"')]),
        ("{hosts: [a.b], ports: [{port: 1, protocol: TLS, targetPort: https}]}",
            [("ports[0].targetPort", 'must be a whole number, not "https"')]),
        ("{hosts: [a.b], ports: [{port: 1, protocol: TLS, name: x}, {port: 1, protocol: TCP, name: x}]}",
            [("ports[1].port", "is the same as in item 0"), ("ports[1].name", "is the same as in item 0")]),
        ("{hosts: [A.b, '*', '*.*.b', 'a.*', a..b, a.b., " + "x" * 64 + ".b, 10.0.0.1, '*.7'],"
            " ports: [{port: 1, protocol: TLS}]}",
            [("hosts[0]", f'{NAME}, not "A.b"'), ("hosts[1]", f'{NAME}, not "*"'), ("hosts[2]", f'{NAME}, not "*.*.b"'),
             ("hosts[3]", f'{NAME}, not "a.*"'), ("hosts[4]", f'{NAME}, not "a..b"'),
             ("hosts[5]", f'{NAME}, not "a.b."'),
             ("hosts[6]", f"{NAME}, not {'x' * 60!r}..."),
             ("hosts[7]", 'must be a name: an address belongs to addresses, not "10.0.0.1"'),
             ("hosts[8]", 'must be a name: an address belongs to addresses, not "*.7"')]),
        ("{hosts: [a.b, a.b], ports: [{port: 1, protocol: TLS}]}", [("hosts[1]", "is the same as in item 0")]),
        ("{hosts: [a.b, '*.b'], ports: [{port: 1, protocol: TLS}, {port: 2, protocol: TCP}]}",
            [("ports[1].protocol", "TCP can't tell the names of a wildcard (hosts[1]) apart: "
              "use TLS or HTTP, or list the names")]),
        ("{addresses: [10.0.0.1, 10.0.0.1/32, 127.0.0.0/8, '::1', ff02::/16, 10.0.0.1/8],"
            " ports: [{port: 1, protocol: TLS}]}",
            [("addresses[2]",
              'must not be a loopback or multicast network: those are never steered'),
             ("addresses[3]", 'must not be a loopback or multicast network: those are never steered'),
             ("addresses[4]", 'must not be a loopback or multicast network: those are never steered'),
             ("addresses[5]", 'must be an address or a network such as 10.0.0.0/8 or fd00::/8, not "10.0.0.1/8"')]),
        ("{addresses: [10.0.0.1, 10.0.0.1/32], ports: [{port: 1, protocol: TLS}]}",
            [("addresses[1]", "is the same as in item 0")]),
        ("{addresses: [10.0.0.1], endpoints: [10.0.0.2], ports: [{port: 1, protocol: TCP, targetPort: 2}]}",
            [("endpoints", "needs hosts: what is dialled by address goes to that address and port"),
             ("ports[0].targetPort", "needs hosts: what is dialled by address goes to that address and port")]),
        ("{hosts: [a.b], endpoints: [127.0.0.1, a.b, '::'], ports: [{port: 1, protocol: TCP}]}",
            [("endpoints[0]", 'must not be a loopback address'),
             ("endpoints[1]", 'must be an IPv4 or IPv6 address, not "a.b"'),
             ("endpoints[2]", 'must be the address of one host, not "::"')]),
        ("{hosts: [a.b], endpoints: [10.0.0.1, 10.0.0.1], ports: [{port: 1, protocol: TCP}]}",
            [("endpoints[1]", "is the same as in item 0")]),
    ],
)  # fmt: skip
def test_bad_external_services(spec: str, expected: list[tuple[str, str]]) -> None:
    assert spec_errors("ExternalService", spec) == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("10s", 10), ("500ms", 0.5), ("1h30m", 5400), ("1h1m1s1ms", 3661.001), ("99999h", 99999 * 3600)],
)
def test_durations(text: str, seconds: float) -> None:
    route: HTTPRoute = spec_of("HTTPRoute", f"spec: {{rules: [{{timeouts: {{request: {text}}}}}]}}")
    assert route.spec.rules[0].timeouts.request == seconds


@pytest.mark.parametrize("text", ["1", "''", "s", "-1s", "1.5s", "1us", "100000s", "1h1h1h1h1h", "1 s", "{}", "٣s"])
def test_bad_durations(text: str) -> None:
    ((field, message),) = spec_errors("HTTPRoute", rule(f"{{timeouts: {{request: {text}}}}}"))
    assert field == "rules[0].timeouts.request"
    assert message.startswith("must be a duration such as")


def test_workload() -> None:
    found: Workload = spec_of(
        "Workload",
        """
spec:
  node: node-a.example
  addresses: [10.80.1.3, "FD00:80::3", "::ffff:10.80.1.4"]
  serviceAccount: reviews
  attach: {netns: /run/netns/reviews-1}
  failurePolicy: closed
  ports: [{name: http, port: 8080, appProtocol: http}, {port: 9090}]
""",
    )
    assert found.spec.addresses == ("10.80.1.3", "fd00:80::3", "10.80.1.4")
    assert found.spec.attach is not None
    assert found.spec.attach.netns == "/run/netns/reviews-1"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}", [("addresses", "required")]),
        ("{addresses: []}", [("addresses", "must have at least 1 entry")]),
        ("{addresses: [10.0.0.1, 10.0.0.256]}",
            [("addresses[1]", 'must be an IPv4 or IPv6 address, not "10.0.0.256"')]),
        ("{addresses: [10.0.0.1, '::ffff:10.0.0.1']}", [("addresses[1]", "is the same as in item 0")]),
        ("{addresses: ['fe80::1%eth0']}", [("addresses[0]", "must not have a zone")]),
        ("{addresses: [10.0.0.1], attach: {systemdUnit: 'a b.service'}}",
            [("attach.systemdUnit", 'must be the name of a unit such as "reviews.service", not "a b.service"')]),
        ("{addresses: [10.0.0.1], attach: {cgroup: /a, netns: /b}}",
            [("attach.cgroup", "the other one says already where it lives")]),
        ("{addresses: [10.0.0.1], attach: {cgroup: a/b}}",
            [("attach.cgroup", 'must be an absolute path without ".." or a "/" at its end, not "a/b"')]),
        ("{addresses: [10.0.0.1], attach: {cgroup: /}}", [("attach.cgroup", "the root is everybody's")]),
        ("{addresses: [10.0.0.1], attach: {cgroup: /a}, steering: nftables}",
            [("steering", "a service of the host is steered by eBPF only")]),
        ("{addresses: [10.0.0.1], attach: {}}",
            [("attach.netns", "one of netns, systemdUnit and cgroup is required")]),
        ("{addresses: [10.0.0.1], attach: {netns: run/x}}",
            [("attach.netns", 'must be an absolute path without ".." or a "/" at its end, not "run/x"')]),
        ("{addresses: [10.0.0.1], attach: {netns: /run/../x}}",
            [("attach.netns", 'must be an absolute path without ".." or a "/" at its end, not "/run/../x"')]),
        ("{addresses: [10.0.0.1], failurePolicy: ajar}", [("failurePolicy", 'must be "open" or "closed", not "ajar"')]),
        ("{addresses: [10.0.0.1], steering: tc}",
            [("steering", 'must be "auto", "ebpf", "nftables" or "iptables", not "tc"')]),
        ("{addresses: [10.0.0.1], node: a/b}", [("node", 'must be letters, digits, "-", "_" and ".", not "a/b"')]),
        ("{addresses: [10.0.0.1], ports: [{port: 1}, {port: 1}]}", [("ports[1].port", "is the same as in item 0")]),
        ("{addresses: [10.0.0.1], dns: {nameservers: [resolver, 10.0.0.1, 10.0.0.1], captur: true}}",
            [("dns.nameservers[0]", 'must be an IPv4 or IPv6 address, not "resolver"'),
             ("dns.captur", 'unknown field; did you mean "capture"?')]),
        ("{addresses: [10.0.0.1], dns: {nameservers: [10.0.0.1, 10.0.0.1], capture: ~}}",
            [("dns.nameservers[1]", "is the same as in item 0")]),
        ("{addresses: [10.0.0.1], dns: {nameservers: [" + ", ".join(f"10.0.0.{n}" for n in range(1, 10)) + "]}}",
            [("dns.nameservers", "must have at most 8 entries, not 9")]),
        ("{addresses: [10.0.0.1], traffic: {outbound: {includeCidrs: [10.0.0.1/8, all, '::ffff:10.0.0.0/104', 10]}}}",
            [("traffic.outbound.includeCidrs[0]",
              'must be an address or a network such as 10.0.0.0/8 or fd00::/8, not "10.0.0.1/8"'),
             ("traffic.outbound.includeCidrs[1]",
              'must be an address or a network such as 10.0.0.0/8 or fd00::/8, not "all"'),
             ("traffic.outbound.includeCidrs[2]",
              'must be written as an IPv4 network, not "::ffff:10.0.0.0/104"'),
             ("traffic.outbound.includeCidrs[3]", "must be text, not 10: put it in quotes")]),
        ("{addresses: [10.0.0.1], traffic: {outbound: {excludeUids: [-1, root, 4294967295]}}}",
            [("traffic.outbound.excludeUids[0]", "must be at least 0, not -1"),
             ("traffic.outbound.excludeUids[1]", 'must be a whole number, not "root"'),
             ("traffic.outbound.excludeUids[2]", "must be at most 4294967294, not 4294967295")]),
        ("{addresses: [10.0.0.1], traffic: {inbound: {includePorts: [0], excludeUids: [1]}}}",
            [("traffic.inbound.includePorts[0]", "must be at least 1, not 0"),
             ("traffic.inbound.excludeUids", 'unknown field; did you mean "excludeCidrs"?')]),
        ("{addresses: [10.0.0.1], traffic: {inbound: {excludePorts: [" + ", ".join(["80"] * 257) + "]}}}",
            [("traffic.inbound.excludePorts", "must have at most 256 entries, not 257")]),
    ],
)  # fmt: skip
def test_bad_workloads(spec: str, expected: list[tuple[str, str]]) -> None:
    assert spec_errors("Workload", spec) == expected


def test_mesh_config() -> None:
    found: MeshConfig = spec_of("MeshConfig", "spec: {detectTimeout: 500ms, vipCidrs: {ipv4: 10.9.0.0/24}}")
    assert found.spec.detect_timeout == 0.5
    assert (found.spec.vip_cidrs.ipv4, found.spec.vip_cidrs.ipv6) == ("10.9.0.0/24", "fd00:240::/32")
    assert spec_of("MeshConfig", "").spec.trust_domain == "cluster.local"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{detectTimeout: 0s}", [("detectTimeout", "must be more than 0")]),
        ("{detectTimeout: 1}", [("detectTimeout", 'must be a duration such as "500ms", "10s" or "1h30m", not 1')]),
        ("{maxHeadBytes: 64}", [("maxHeadBytes", "must be at least 1024, not 64")]),
        ("{opaquePorts: [0]}", [("opaquePorts[0]", "must be at least 1, not 0")]),
        ("{trustDomain: 'a/b'}", [("trustDomain", 'must be lower case letters, digits, ".", "_" and "-", not "a/b"')]),
        ("{outboundPolicy: maybe}", [("outboundPolicy", 'must be "allow" or "deny", not "maybe"')]),
        ("{vipCidrs: {ipv4: 'fd00::/64'}}",
            [("vipCidrs.ipv4", 'must be an IPv4 network such as 240.240.0.0/16, not "fd00::/64"')]),
        ("{vipCidrs: {ipv4: 10.0.0.1/16}}",
            [("vipCidrs.ipv4", 'must be an IPv4 network such as 240.240.0.0/16, not "10.0.0.1/16"')]),
        ("{vipCidrs: {ipv6: 'fd00::/120'}}", [("vipCidrs.ipv6", 'must be /112 or larger, not "fd00::/120"')]),
        ("{via: 'a b'}", [("via", 'must be a token (RFC 9110) of letters and digits, or empty, not "a b"')]),
        ("{forwarded: add, headerCase: as-is, requestId: 'no', steering: bpf}",
            [("forwarded", 'must be "append", "set" or "preserve", not "add"'),
             ("headerCase", 'must be "lower" or "preserve", not "as-is"'),
             ("requestId", 'must be true or false, not "no"'),
             ("steering", 'must be "auto", "ebpf", "nftables" or "iptables", not "bpf"')]),
        ("{accessLog: {percent: 101, minStatus: 99, minDuration: 0s, flags: [XX]}}",
            [("accessLog.percent", "must be at most 100, not 101"),
             ("accessLog.minStatus", "must be at least 100, not 99"),
             ("accessLog.minDuration", "must be more than 0"),
             ("accessLog.flags[0]",
              'must be one of DC, DF, DPE, DT, LR, NC, NR, OM, SI, UAEX, UC, UF, UH, UO, UPE, UT, not "XX"')]),
        ("{accessLog: {percent: .nan}}", [("accessLog.percent", "must be a number, not nan")]),
        ("{accessLog: {percent: true}}", [("accessLog.percent", "must be a number, not true")]),
        ("{dnsTimeout: 0s, dnsMaxOutstanding: 0, clusterDomain: A}",
            [("dnsTimeout", "must be more than 0"), ("dnsMaxOutstanding", "must be at least 1, not 0"),
             ("clusterDomain", 'must be lower case letters, digits and "-", and begin and end with a letter or digit '
                 '("." between parts), not "A"')]),
        ("{vip_cidrs: {}}", [("vip_cidrs", 'unknown field; did you mean "vipCidrs"?')]),
    ],
)  # fmt: skip
def test_bad_mesh_configs(spec: str, expected: list[tuple[str, str]]) -> None:
    # All on one line: in the order of the model.
    assert sorted(spec_errors("MeshConfig", spec)) == sorted(expected)


def test_peer_authentication() -> None:
    found: PeerAuthentication = spec_of(
        "PeerAuthentication",
        "spec: {selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}",
    )
    assert found.spec.port_level_mtls[8080].mode == "DISABLE"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{mtls: {mode: strict}}", [("mtls.mode", 'must be "DISABLE", "PERMISSIVE" or "STRICT", not "strict"')]),
        ("{mtls: {}}", [("mtls.mode", "required")]),
        ("{portLevelMtls: {80: {mode: STRICT}}}", [("portLevelMtls", "needs selector.matchLabels")]),
        ("{portLevelMtls: {http: {mode: STRICT}}}",
            [("portLevelMtls.http", 'must be a port number between 1 and 65535, not "http"')]),
        ("{portLevelMtls: {70000: {mode: STRICT}}}",
            [("portLevelMtls[70000]", 'must be a port number between 1 and 65535, not "70000"')]),
        ("{selector: {matchLabel: {a: b}}}", [("selector.matchLabel", 'unknown field; did you mean "matchLabels"?')]),
    ],
)  # fmt: skip
def test_bad_peer_authentication(spec: str, expected: list[tuple[str, str]]) -> None:
    assert spec_errors("PeerAuthentication", spec) == expected


def test_the_number_of_errors_is_bounded() -> None:
    many = ", ".join(f"x{n}: 1" for n in range(1000))
    assert len(spec_errors("MeshConfig", f"{{{many}}}")) == 100


def test_age_orders_by_time_then_name() -> None:
    base = datetime(2025, 1, 1, tzinfo=UTC)
    text = ""
    for name, days in (("c", 0), ("b", 1), ("a", 1), ("z", None), ("y", None)):
        when = f", creationTimestamp: {(base + timedelta(days=days)).isoformat()}" if days is not None else ""
        text += f"---\napiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {{name: {name}{when}}}\n"
    objects = check(text).objects
    assert [o.resource.metadata.name for o in sorted(objects, key=lambda o: o.age)] == ["c", "a", "b", "y", "z"]


NAMES = sorted(
    {
        "metadata",
        "name",
        "namespace",
        "labels",
        "spec",
        "ports",
        "port",
        "targetPort",
        "selector",
        "matchLabels",
        "clusterIP",
    }
    | {
        "clusterIPs",
        "addressType",
        "endpoints",
        "addresses",
        "rules",
        "matches",
        "path",
        "value",
        "type",
        "headers",
        "timeouts",
    }
    | {
        "request",
        "backendRefs",
        "attach",
        "netns",
        "mtls",
        "mode",
        "portLevelMtls",
        "80",
        "vipCidrs",
        "ipv4",
        "parentRefs",
    }
)
LEAVES = st.sampled_from(
    [None, True, 0, -1, 80, 10**30, 1.5, float("nan"), "", "a", "80", "/a", "1s", "10.0.0.1", "None", "\x00"]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)


@given(st.sampled_from(sorted(KINDS)), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_any_values_give_an_object_or_errors(kind: str, body: dict[str, Any]) -> None:
    value = {"apiVersion": KINDS[kind][0], "kind": kind, "metadata": {"name": "x"}} | body
    found = validate([Document("f", value, lambda path: 1)])
    assert len(found.objects) == (not found.errors)
    assert all(error.message and error.obj.startswith(f"{kind} ") for error in found.errors)
