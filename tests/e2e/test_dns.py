"""Names through whole agents: dig, getent, curl and single queries as musl sends them, in pods with a resolver of their
own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import selectors
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import pytest
import yaml

from examples.stage import Pod, wait_for
from tests.e2e.mesh import NAMESPACE, HttpClient, Mesh, dial, socket_in, wait_listening
from tests.e2e.test_resilience import brain_of, children, kill_all, supervisor, wait_replaced

VIPS = {4: "240.240.0.10", 6: "fd00:240::10"}
OTHER_VIPS = {4: "240.240.0.11", 6: "fd00:240::11"}
OUTSIDE = {4: "192.0.2.7", 6: "2001:db8::7"}
MANY = 60
"""Addresses of many.example in each family: 60 * 16 octets are more than 512, and 60 * 28 more than 1232."""
KIND = {4: "A", 6: "AAAA"}

_numbers = itertools.count()


class Dig:
    """What dig was answered. It fails the test when there was no answer."""

    def __init__(self, found: subprocess.CompletedProcess[str]) -> None:
        assert found.returncode == 0, found.stdout + found.stderr
        self.data = yaml.safe_load(found.stdout)[-1]["message"]["response_message_data"]
        self.status: str = self.data["status"]
        self.flags: set[str] = set(self.data["flags"].split())
        self.answers: list[str] = self.data.get("ANSWER_SECTION", [])

    def records(self, kind: str) -> list[str]:
        """Data of the answer's records, sorted."""
        return sorted(line.split(maxsplit=4)[4] for line in self.answers if line.split()[3] == kind)


class Scene:
    """A client and a web server on a node with an agent, a dnsmasq on another node; services web and other/web."""

    def __init__(self, mesh: Mesh, families: Sequence[int], **client: Any) -> None:
        self.mesh, self.families = mesh, tuple(families)
        self.client = mesh.pod("client-1", 0, app="client", **client)
        self.web = mesh.pod("web-1", 0, app="web")
        self.outside = mesh.pod("dns-1", 1, attach=False)
        other = mesh.service("web", {"app": "web"}, [OTHER_VIPS[family] for family in families])
        other["metadata"]["namespace"] = "other"
        mesh.put(mesh.service("web", {"app": "web"}, [VIPS[family] for family in families]), other)
        mesh.put(mesh.service("each", {"app": "web"}, ["None"]))
        self.resolver = self.outside.addresses[-1]
        self.resolve_as_usual()
        self.agent = mesh.agents[0]
        self.dnsmasq: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.start_resolver()
        self.mesh.serve(self.web, "origin", "8080", str(self.mesh.stage.folder / "journal"), "web")
        self.agent.start()
        self.agent.wait_steered(*self.mesh.attached(self.agent.name))

    def resolve_as_usual(self) -> None:
        for pod in (self.client, self.web):
            pod.resolv(self.resolver, search="corp.example")

    def start_resolver(self) -> None:
        hosts = self.mesh.stage.folder / "hosts"
        lines = [f"{address} outside.example" for address in OUTSIDE.values()]
        lines += [f"{address} front.example" for address in self.outside.addresses]
        lines += [f"10.9.0.{n} many.example" for n in range(1, MANY + 1)]
        lines += [f"fd99::{n:x} many.example" for n in range(1, MANY + 1)]
        hosts.write_text("\n".join(lines) + "\n")
        self.dnsmasq = self.outside.start(
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"),
            *("--pid-file=", "--local=/example/", "--edns-packet-max=4096", f"--addn-hosts={hosts}"),
            "--cname=alias.example,outside.example",
            log="dnsmasq.log",
        )
        wait_listening(self.outside, 53)

    def stop_resolver(self) -> None:
        assert self.dnsmasq is not None
        self.mesh.stage.stop(self.dnsmasq)

    def dig(self, *argv: str, pod: Pod | None = None, resolver: str = "") -> Dig:
        where, asked = pod or self.client, resolver or self.resolver
        return Dig(where.run("dig", f"@{asked}", "+yaml", "+tries=1", "+time=5", *argv, check=False))

    def dig_again(self, *argv: str) -> Dig:
        """After a change of what is captured: a port that was used before it leads where it led then, until conntrack
        forgets (30 s). Refused, dig is run again, from another port."""
        return wait_for(lambda: self._answered(*argv), f"an answer to dig {' '.join(argv)}")  # type: ignore[no-any-return]

    def _answered(self, *argv: str) -> Dig | None:
        done = self.client.run("dig", f"@{self.resolver}", "+yaml", "+tries=1", "+time=5", *argv, check=False)
        return Dig(done) if done.returncode == 0 else None

    def names(self, pod: Pod | None = None) -> bool:
        """Is the service's name known there?"""
        family = self.families[0]
        return self.dig("web", KIND[family], pod=pod).records(KIND[family]) == [VIPS[family]]

    def queries(self, **labels: str) -> float:
        return self.agent.metric("netproxy_dns_queries_total", **labels)

    def status(self, pod: Pod) -> dict[str, Any]:
        (found,) = (w for w in self.agent.status()["workloads"] if w["workload"] == f"{NAMESPACE}/{pod.name}")
        return dict(found["dns"])

    def ask(
        self, *names: str, kinds: Sequence[str] = ("A", "AAAA"), timeout: float = 10.0
    ) -> list[dns.message.Message]:
        """All at once from one unconnected socket, as musl does: an answer has to come from the resolver."""
        with socket_in(self.client, self._family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(timeout)
            pending = {}
            for number, (name, kind) in enumerate(itertools.product(names, kinds), 1000):
                pending[number] = dns.message.make_query(name, kind, use_edns=False, id=number)
                sock.sendto(pending[number].to_wire(), (self.resolver, 53))
            found = {}
            while pending:
                wire, sender = sock.recvfrom(65535)
                assert sender[:2] == (self.resolver, 53)
                answer = dns.message.from_wire(wire)
                assert pending.pop(answer.id).is_response(answer)
                found[answer.id] = answer
            return [found[number] for number in sorted(found)]

    @property
    def _family(self) -> int:
        return socket.AF_INET6 if ":" in self.resolver else socket.AF_INET


def addresses(answer: dns.message.Message) -> list[str]:
    return sorted(rdata.to_text() for rrset in answer.answer for rdata in rrset)


@contextlib.contextmanager
def scene_of(folder: Path, families: Sequence[int], *, steering: str = "auto", **client: Any) -> Iterator[Scene]:
    workers = 2 if tuple(families) == (4,) else 1
    mesh = Mesh(f"d{os.getpid() % 100000}{next(_numbers)}", folder / "m", families=families, workers=workers)
    try:
        scene = Scene(mesh, families, **client)
        if steering != "auto":
            mesh.put(mesh.mesh_config(steering=steering))
        scene.start()
        yield scene
        assert "Traceback" not in scene.agent.log.read_text()
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[tuple[int, ...]], Scene]]:
    """One for each set of families. A test leaves it as it was."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def get(families: tuple[int, ...]) -> Scene:
            return stack.enter_context(scene_of(tmp_path_factory.mktemp("dns"), families))

        yield get


@pytest.fixture(params=[(4,), (6,), (4, 6)], ids=["4", "6", "dual"])
def any_scene(request: pytest.FixtureRequest, scenes: Callable[[tuple[int, ...]], Scene]) -> Scene:
    return scenes(request.param)


@pytest.fixture
def scene(scenes: Callable[[tuple[int, ...]], Scene]) -> Scene:
    return scenes((4, 6))


# -- names of the mesh, others, every family -----------------------------------------------------------------


@pytest.mark.parametrize("tcp", ["+notcp", "+tcp"])
def test_dig(any_scene: Scene, tcp: str) -> None:
    scene = any_scene
    for family in (4, 6):
        ours = [VIPS[family]] if family in scene.families else []
        theirs = [OTHER_VIPS[family]] if family in scene.families else []
        kind = KIND[family]
        forms = {"web": ours, "WEB.shop": ours, "web.shop.svc": ours, "web.shop.svc.cluster.local": ours}
        for name, wanted in {**forms, "web.other": theirs, "web.other.svc.cluster.local": theirs}.items():
            found = scene.dig(tcp, name, kind)
            assert (found.status, found.records(kind)) == ("NOERROR", wanted), name
            assert {"qr", "aa", "ra"} <= found.flags
        outside = scene.dig(tcp, "outside.example", kind)
        assert (outside.status, outside.records(kind)) == ("NOERROR", [OUTSIDE[family]])
        reached = [address for address in scene.web.addresses if (":" in address) == (family == 6)]
        assert scene.dig(tcp, "each.shop", kind).records(kind) == reached
    assert scene.dig(tcp, "nothing.example").status == "NXDOMAIN"
    assert scene.dig(tcp, "web", "TXT").status == "NOERROR"
    found = scene.dig(tcp, "_http._tcp.web", "SRV")
    assert found.records("SRV") == ["0 0 80 web.shop.svc.cluster.local."]
    assert len(found.data["ADDITIONAL_SECTION"]) == len(scene.families)
    for family in scene.families:
        assert scene.dig(tcp, "-x", VIPS[family]).records("PTR") == ["web.shop.svc.cluster.local."]
    assert all(line.split()[1] == "5" for line in scene.dig(tcp, "web", KIND[scene.families[0]]).answers)


def test_getent_and_curl(any_scene: Scene) -> None:
    """glibc's resolver, with a search list: web.corp.example is asked for first, and is not there."""
    scene = any_scene
    for name, vips in (("web", VIPS), ("web.other", OTHER_VIPS), ("outside.example", OUTSIDE)):
        found = scene.client.run("getent", "ahosts", name).stdout.split("\n")
        wanted = {vips[family] for family in (OUTSIDE if vips is OUTSIDE else scene.families)}
        assert {line.split()[0] for line in found if line} & set(vips.values()) <= wanted
        assert found[0].split()[0] in wanted
    assert scene.client.run("getent", "ahosts", "web-that-is-not", check=False).returncode == 2
    told = scene.client.run("curl", "-sS", "--max-time", "20", "http://web/hello").stdout
    assert '"/hello"' in told
    assert '"/hello"' in scene.client.run("curl", "-sS", "--max-time", "20", "http://web.shop.svc:80/hello").stdout


def test_single_queries_as_musl_sends_them(any_scene: Scene) -> None:
    scene = any_scene
    names = ("web", "outside.example", "web.other", "nothing.example")
    found = scene.ask(*names)
    wanted = []
    for name, vips in zip(names, (VIPS, OUTSIDE, OTHER_VIPS, {}), strict=True):
        for family in (4, 6):
            known = family in scene.families or name == "outside.example"
            wanted.append([vips[family]] if vips and known else [])
    assert [addresses(answer) for answer in found] == wanted
    assert [answer.rcode() for answer in found] == [dns.rcode.NOERROR] * 6 + [dns.rcode.NXDOMAIN] * 2
    # A connected socket takes an answer only from whom it is connected to.
    with socket_in(scene.client, scene._family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect((scene.resolver, 53))
        for name in ("web", "outside.example"):
            query = dns.message.make_query(name, "A")
            sock.send(query.to_wire())
            assert query.is_response(dns.message.from_wire(sock.recv(65535)))


# -- sizes ---------------------------------------------------------------------------------------------------


def test_sizes_and_the_way_to_tcp(scene: Scene) -> None:
    """An answer that does not fit is marked, and is whole by TCP."""
    for kind in ("A", "AAAA"):
        for size in ("+noedns", "+bufsize=1232"):
            cut = scene.dig("+notcp", "+ignore", size, "many.example", kind)
            fits = (kind, size) == ("A", "+bufsize=1232")
            assert ("tc" in cut.flags, len(cut.records(kind)) == MANY) == (not fits, fits)
            whole = scene.dig("+notcp", size, "many.example", kind)
            assert len(whole.records(kind)) == MANY
            assert "tc" not in whole.flags
    # Of the mesh, too.
    names = [f"10.80.1.{n}" for n in range(100, 140)]
    scene.mesh.put(
        scene.mesh.service("crowd", {}, ["None"]),
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "crowd", "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": "crowd"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [name]} for name in names],
        },
    )
    wait_for(lambda: scene.dig("+tcp", "crowd", "A").records("A") == sorted(names), "the headless service")
    cut = scene.dig("+notcp", "+ignore", "+noedns", "crowd", "A")
    assert ("tc" in cut.flags, cut.answers) == (True, [])
    assert scene.dig("+notcp", "+bufsize=1232", "+ignore", "crowd", "A").records("A") == sorted(names)
    assert scene.dig("+bufsize=4096", "web").data["OPT_PSEUDOSECTION"]["EDNS"]["udp"] == 1232
    assert "OPT_PSEUDOSECTION" not in scene.dig("+noedns", "web").data
    assert scene.dig("+edns=1", "+noednsnegotiation", "web").status == "BADVERS"


def test_many_at_once(scene: Scene) -> None:
    """1,000 from sockets of their own, half of them for the resolver: all are answered."""
    before = {source: scene.queries(source=source) for source in ("mesh", "forwarded")}
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number in range(1000):
            sock = stack.enter_context(socket_in(scene.client, scene._family, socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.connect((scene.resolver, 53))
            selector.register(sock, selectors.EVENT_READ, ("web", "outside.example")[number % 2])
        for key in list(selector.get_map().values()):
            key.fileobj.send(dns.message.make_query(key.data, "A").to_wire())  # type: ignore[union-attr]
        counts = dict.fromkeys(("web", "outside.example"), 0)
        while selector.get_map():
            ready = selector.select(15.0)
            assert ready, f"unanswered: {len(selector.get_map())} {scene.agent.tail(5)}"
            for key, _ in ready:
                answer = dns.message.from_wire(key.fileobj.recv(65535))  # type: ignore[union-attr]
                assert addresses(answer) == [{"web": VIPS, "outside.example": OUTSIDE}[key.data][4]]
                counts[key.data] += 1
                selector.unregister(key.fileobj)
    assert counts == {"web": 500, "outside.example": 500}
    # None of ours came back to us.
    assert {source: scene.queries(source=source) - n for source, n in before.items()} == dict.fromkeys(before, 500)
    # By TCP one connection carries as many as you like.
    with dial(scene.client, scene.resolver, 53) as sock:
        for number in range(100):
            wire = dns.message.make_query(("web", "outside.example")[number % 2], "A", id=number).to_wire()
            sock.sendall(struct.pack("!H", len(wire)) + wire)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            found = []
            while head := file.read(2):
                found.append(dns.message.from_wire(file.read(struct.unpack("!H", head)[0])).id)
        assert sorted(found) == list(range(100))


# -- what fails ----------------------------------------------------------------------------------------------


def test_a_resolver_that_is_down(scene: Scene) -> None:
    scene.stop_resolver()
    for tcp in ("+notcp", "+tcp"):
        found = scene.dig(tcp, "outside.example")
        assert found.status == "SERVFAIL"
        assert scene.resolver in str(found.data["OPT_PSEUDOSECTION"]["EDNS"]["EDE"])
    assert scene.dig("+noedns", "outside.example").status == "SERVFAIL"
    assert scene.names()
    # Another is in resolv.conf now.
    scene.start_resolver()
    other = scene.outside.addresses[0]
    scene.client.resolv("127.0.0.1", "not-an-address", other, "10.9.9.9", "10.9.9.8")
    nameservers = ["127.0.0.1", other, "10.9.9.9"]
    wait_for(lambda: scene.status(scene.client)["nameservers"] == nameservers, "the resolvers to be noticed")
    note = scene.status(scene.client)["note"]
    assert "not-an-address" in note
    assert "first 3 of 4" in note
    # Nobody listens on the pod's own loopback: the next is asked.
    (answer,) = scene.ask("outside.example", kinds=["A"])
    assert addresses(answer) == [OUTSIDE[4]]
    scene.resolve_as_usual()
    assert scene.agent.get("/healthz")[0] == 200


def test_a_resolver_that_is_silent(scene: Scene) -> None:
    """Who waits for it is bounded in number and time, and nobody else waits."""
    names = [f"{n}.example" for n in range(10)]
    scene.mesh.put(scene.mesh.mesh_config(dnsTimeout="500ms", dnsMaxOutstanding=10))
    wait_for(lambda: b'"dns_max_outstanding": 10' in scene.agent.get("/config_dump")[1], "the limit to be read")
    scene.stop_resolver()
    before = {
        event: scene.agent.metric("netproxy_events_total", event=event) for event in ("dns_limit", "dns_timeouts")
    }

    def counted(event: str) -> float:
        return scene.agent.metric("netproxy_events_total", event=event) - before[event]

    try:
        with socket_in(scene.outside, scene._family, socket.SOCK_DGRAM) as silent:
            silent.bind((scene.resolver, 53))
            wait_for(lambda: len(scene.ask(*names)) and counted("dns_limit"), "the limit to be in force")
            before["dns_limit"] += counted("dns_limit")
            before["dns_timeouts"] += counted("dns_timeouts")
            found = scene.ask(*names, "web")
            assert [answer.rcode() for answer in found] == [dns.rcode.SERVFAIL] * 20 + [dns.rcode.NOERROR] * 2
            assert (counted("dns_limit"), counted("dns_timeouts")) == (15, 10)
    finally:
        scene.mesh.drop("MeshConfig", "mesh", "netproxy-system")
        scene.start_resolver()
    wait_for(lambda: len(scene.ask("outside.example")) == 2, "the resolver")


def test_names_without_a_brain_and_without_a_worker(scene: Scene) -> None:
    agent = scene.agent
    (worker,) = agent.pids("worker")
    old = brain_of(agent)
    os.kill(old, signal.SIGKILL)

    def replacement() -> int:
        brains = [pid for pid, argv in children(supervisor(agent)).items() if "netproxy.brain" in argv and pid != old]
        return brains[0] if brains else 0

    stopped = wait_for(replacement, "the next brain")
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert scene.names()
        assert scene.dig("outside.example").records("A") == [OUTSIDE[4]]
        assert scene.client.run("getent", "ahosts", "web").returncode == 0
        # Still without: a worker is killed, too. What is asked meanwhile waits for the next.
        os.kill(worker, signal.SIGKILL)
        assert scene.names()
        assert scene.dig("+tcp", "outside.example").records("A") == [OUTSIDE[4]]
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_replaced(agent, "brain", {old})
    assert scene.names()


def test_an_upgrade(scene: Scene) -> None:
    agent = scene.agent
    (old,) = agent.pids("worker")
    os.kill(supervisor(agent), signal.SIGUSR2)

    def replaced() -> bool:
        assert scene.names()
        assert scene.dig("+tcp", "outside.example").status == "NOERROR"
        with contextlib.suppress(OSError):
            return agent.pids("worker") not in ([], [old])
        return False

    wait_for(replaced, "a new worker", 40)
    assert scene.names()


def test_without_an_agent_open_asks_the_resolver(scene: Scene) -> None:
    kill_all(scene.agent)
    found = scene.dig("web")
    assert found.status != "NOERROR", "dnsmasq does not know it"
    assert scene.dig("outside.example").records("A") == [OUTSIDE[4]]
    scene.agent.start()
    scene.agent.wait_steered(*scene.mesh.attached(scene.agent.name))
    assert scene.names()


def test_without_an_agent_closed_refuses(tmp_path: Path) -> None:
    with scene_of(tmp_path, (4, 6), failurePolicy="closed") as scene:
        assert scene.names()
        kill_all(scene.agent)
        for tcp in ("+notcp", "+tcp"):
            refused = scene.client.run(
                "dig", f"@{scene.resolver}", tcp, "+tries=1", "+time=2", "outside.example", check=False
            )
            assert refused.returncode == 9, refused.stdout
        scene.agent.start()
        scene.agent.wait_steered(*scene.mesh.attached(scene.agent.name))
        assert scene.names()


# -- what is configured --------------------------------------------------------------------------------------


def test_capture_is_a_choice_of_each_workload(scene: Scene) -> None:
    mesh, client = scene.mesh, scene.client
    with HttpClient(client, VIPS[4]) as kept:
        assert kept.get("/x").status == 200
        mesh.put(mesh.workload(client, app="client", dns={"capture": False}))
        wait_for(lambda: scene.dig_again("web").status != "NOERROR", "the capture to end")
        wait_for(lambda: not scene.status(client)["capture"], "the status to say so")
        before = scene.queries()
        assert scene.dig_again("outside.example").records("A") == [OUTSIDE[4]]
        assert scene.queries() == before
        wait_for(lambda: not client.run("ss", "-Hlnut", "sport = :15053").stdout, "the listeners to go")
        # Others are asked for their names as before, and nothing else was closed.
        assert scene.names(scene.web)
        assert kept.get("/x").status == 200
        mesh.put(mesh.workload(client, app="client", dns={"nameservers": scene.outside.addresses}))
        wait_for(lambda: scene.dig_again("web", "A").records("A") == [VIPS[4]], "the capture to begin")
        wait_for(lambda: scene.status(client)["source"] == "Workload", "the status to say so")
        assert scene.dig("outside.example").records("A") == [OUTSIDE[4]]
        assert kept.get("/x").status == 200
    mesh.put(mesh.workload(client, app="client"))
    wait_for(lambda: scene.status(client)["source"] != "Workload", "all to be as it was")
    assert scene.agent.metric("netproxy_events_total", event="internal_errors") == 0


def test_a_host_outside(scene: Scene) -> None:
    """Its name is a virtual address for the app, and for us what the app's own resolver says."""
    mesh = scene.mesh
    mesh.serve(scene.outside, "origin", "8080", str(mesh.stage.folder / "front"), "front")
    assert scene.dig("front.example", "A").records("A") == [scene.outside.ip]
    mesh.put(
        {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "ExternalService",
            "metadata": {"name": "front", "namespace": "other"},
            "spec": {"hosts": ["front.example"], "ports": [{"name": "web", "port": 8080, "protocol": "HTTP"}]},
        }
    )

    def has_vip() -> bool:
        return scene.dig("front.example", "A").records("A")[0].startswith("240.240.")

    wait_for(has_vip, "its virtual address")
    assert scene.dig("_web._tcp.front.example", "SRV").records("SRV") == ["0 0 8080 front.example."]
    assert '"front"' in scene.client.run("curl", "-sS", "--max-time", "20", "http://front.example:8080/hello").stdout
    mesh.drop("ExternalService", "front", "other")
    wait_for(
        lambda: scene.dig("front.example", "A").records("A") == [scene.outside.ip], "the name to be forwarded again"
    )


def test_captured_by_iptables(tmp_path: Path) -> None:
    with scene_of(tmp_path, (4, 6), steering="iptables") as scene:
        (found,) = {w["steering"] for w in scene.agent.status()["workloads"]}
        assert found.startswith("iptables")
        for tcp in ("+notcp", "+tcp"):
            for resolver in scene.outside.addresses:
                assert scene.dig(tcp, "web", "AAAA", resolver=resolver).records("AAAA") == [VIPS[6]]
                assert scene.dig(tcp, "outside.example", resolver=resolver).records("A") == [OUTSIDE[4]]
        assert (scene.queries(source="mesh"), scene.queries(source="forwarded")) == (4, 4)


def test_the_whole_node_without_capture(tmp_path: Path) -> None:
    mesh = Mesh(f"d{os.getpid() % 100000}{next(_numbers)}", tmp_path / "m", families=(4, 6))
    try:
        scene = Scene(mesh, (4, 6))
        scene.start_resolver()
        scene.agent.start("--dns-port", "0")
        scene.agent.wait_steered(*mesh.attached(scene.agent.name))
        assert scene.dig("web").status != "NOERROR"
        assert scene.dig("outside.example").records("A") == [OUTSIDE[4]]
        assert not scene.status(scene.client)["capture"]
    finally:
        mesh.close()
