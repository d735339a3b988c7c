"""The demonstration: ``make demo``, or ``python -m examples.demo`` as root.

Two nodes and six pods as network namespaces on this machine, an agent on each node, real servers and real clients.
Seven steps, each with what was expected and what was seen; exit code 0 only if all of it holds. Nothing is left
behind, however it ends. ``KEEP=1`` keeps it running after the last step and says how to look around.

The resources are in ``examples/demo_mesh``. Copies of them are used, in a temporary folder; two steps edit those.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from examples.agent import Agent
from examples.stage import WIRE, Node, Pod, Stage, forget_stale, wait_for
from examples.story import Story
from examples.wiretap import hexdump, streams, tls_records

PREFIX = "demo"
FOLDER = "netproxy-demo-"
WORKERS = 2
PORTS = {"web-v1": 8080, "web-v2": 8080, "files": 8080, "echo": 9000}
MARKER = "correct-horse-battery-staple"
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_CALLS = 500
_ETC_NETNS = Path("/etc/netns")
_PID = os.getpid()
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Everything that nginx writes goes into the stage's folder; its workers stay root because only root may enter that.
_NGINX = """\
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    default_type text/plain;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 8080;
        listen [::]:8080;
        location / {{ return 200 "{name}\\n"; }}
        location /whoami {{ return 200 "{name} sees x-forwarded-client-cert: $http_x_forwarded_client_cert\\n"; }}
    }}
}}
"""


_asked: list[int] = []
"""The signal that asked for the end."""


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end. Of this kind, since asyncio (in pyroute2) swallows any other from a handler."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Demo:
    """The running mesh, and the steps."""

    def __init__(self, stage: Stage, story: Story) -> None:
        self.stage, self.story = stage, story
        self.config = stage.folder / "mesh"
        self.agents = [Agent(stage, node, self.config, workers=WORKERS, drain_s=1.0) for node in stage.nodes]
        self.calls = 0
        """HTTP calls that the pod `client` made; its node's metrics must know of exactly as many."""

    # -- tools --------------------------------------------------------------------------------------

    @property
    def client(self) -> Pod:
        return self.stage.pods["client"]

    def edit(self, file: str, *changes: tuple[str, str]) -> None:
        """Replace in one of the mesh's files, at once as a whole. `changes`: pattern, new text."""
        path = self.config / file
        text = path.read_text()
        for pattern, new in changes:
            text, found = re.subn(pattern, new, text)
            assert found == 1, (file, pattern, found)
        temporary = path.with_name(f".{file}.new")
        temporary.write_text(text)
        temporary.rename(path)
        self.story.say(f"  edited {path}: {', '.join(new for _, new in changes)}")

    def run(self, where: Pod | Node, *argv: str, show: bool = True) -> str:
        """What a command printed, also when it failed."""
        done = where.run(*argv, check=False)
        output = done.stdout + done.stderr
        if show:
            self.story.shown(shlex.join(where.command(*argv)), output)
        return output

    def curl(self, pod: Pod, *argv: str) -> str:
        self.calls += pod is self.client
        return self.run(pod, "curl", "-sS", "-m", "10", *argv)

    def caller(self, pod: Pod, *argv: str, show: bool = True) -> list[str]:
        """The lines of one run of caller.py, a client for many calls. Not shown themselves."""
        command = [sys.executable, str(_HERE / "caller.py"), *argv]
        if show:
            self.story.shown(shlex.join(pod.command(*command)))
        lines = self.run(pod, *command, show=False).splitlines()
        if pod is self.client and argv[0] == "http":
            self.calls += len(lines)
        return lines

    def wait_all(self, pod: Pod, url: str, wanted: Callable[[str], bool], what: str) -> float:
        """Until 20 calls in a row, over 20 connections and so all workers, are as `wanted`. Seconds it took."""
        began = time.monotonic()
        wait_for(lambda: all(wanted(line) for line in self.caller(pod, "http", url, "--calls", "20", show=False)), what)
        return time.monotonic() - began

    # -- steps --------------------------------------------------------------------------------------

    def build(self) -> None:
        """Pods, servers, agents, names."""
        story, stage = self.story, self.stage
        story.step("0 the stage")
        self.config.mkdir()
        for file in sorted((_HERE / "demo_mesh").glob("*.yaml")):
            shutil.copy(file, self.config)
        nodes = {node.netns: node for node in stage.nodes}
        attached: dict[Node, list[str]] = {node: [] for node in stage.nodes}
        for workload in yaml.safe_load_all((self.config / "workloads.yaml").read_text()):
            spec, name = workload["spec"], workload["metadata"]["name"]
            pod = stage.add_pod(name, nodes[spec["node"]])
            assert pod.addresses == spec["addresses"], (name, pod.addresses)
            if "attach" in spec:
                attached[pod.node].append(f"shop/{name}")
            serves = self.serve(pod)
            story.say(f"  pod {name:9} on {pod.node.name}  {', '.join(pod.addresses):23} {serves}")
        for name, port in PORTS.items():
            pod = stage.pods[name]
            wait_for(lambda: pod.run("ss", "-Hltn", f"sport = :{port}").stdout, f"{name} to listen on {port}")  # noqa: B023
        for agent in self.agents:
            agent.start()
            story.say(f"  agent on {agent.node.name}: netproxy run -f {self.config} --node {agent.name}")
        for agent in self.agents:
            agent.wait_steered(*attached[agent.node])
        vips = [{item["service"]: item["vips"] for item in agent.status()["services"]} for agent in self.agents]
        states = [item for agent in self.agents for item in agent.status()["workloads"]]
        steered = [item["workload"] for item in states if item["state"] == "steered"]
        wanted = sorted(name for names in attached.values() for name in names)
        story.check("five pods are steered", " ".join(sorted(steered)), sorted(steered) == wanted)
        names = {service.partition("/")[2]: addresses for service, addresses in vips[0].items()}
        story.say("Virtual addresses of the services:")
        for name, addresses in names.items():
            story.say(f"  {name:7} {' '.join(addresses)}")
        seen = f"{len(names)} services, {sum(map(len, names.values()))} addresses"
        if vips[0] != vips[1]:
            seen += f", not alike: {vips[1]}"
        ok = vips[0] == vips[1] and all(len(addresses) == 2 for addresses in names.values())
        story.check("both nodes give a service the same two addresses", seen, ok)
        self.client.hosts(names)
        stage.pods["outsider"].hosts({name: stage.pods[name].ip for name in PORTS})

    def serve(self, pod: Pod) -> str:
        """Start the pod's server. What to call it."""
        folder = self.stage.folder / pod.name
        match pod.name:
            case "web-v1" | "web-v2":
                folder.mkdir()
                (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, name=pod.name))
                argv = ["/usr/sbin/nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", "nginx.conf"]
                what = "nginx on 8080"
            case "files":
                folder.mkdir()
                (folder / "secret.txt").write_text(f"the secret is {MARKER}\n")
                argv = [sys.executable, "-m", "http.server", "8080", "--bind", "::", "--directory", str(folder)]
                what = "python -m http.server on 8080"
            case "echo":
                argv = [sys.executable, str(_HERE / "echo.py"), "9000"]
                what = "a raw TCP echo server on 9000"
            case "outsider":
                return "curl, outside of the mesh"
            case _:
                return "curl and other clients"
        pod.start(*argv, log=f"{pod.name}.log")
        return what

    def plain_calls(self) -> None:
        story = self.story
        story.step("1 plain calls")
        story.say("The clients know nothing of the mesh; names come from the pod's /etc/hosts.")
        seen = self.curl(self.client, "http://web-v1/").strip()
        story.check("curl by name, to a pod on the same node", seen, seen == "web-v1")
        seen = self.curl(self.client, "http://web-v2/").strip()
        story.check("curl by name, to a pod on the other node", seen, seen == "web-v2")
        seen = self.curl(self.client, "http://files/secret.txt").strip()
        story.check("a file from http.server, on the other node", seen, seen == f"the secret is {MARKER}")
        for family, mark in (("-4", "."), ("-6", ":")):
            command = (family, "-o", "/dev/null", "-w", "%{http_code} from %{remote_ip}", "http://web/")
            seen = self.curl(self.client, *command).strip()
            story.check(f"IPv{family[1]}", seen, seen.startswith("200 ") and mark in seen.partition("from ")[2])
        lines = self.caller(self.client, "tcp", "echo", "9000", "over raw TCP")
        story.quote("\n".join(lines))
        story.check("raw TCP through a service with appProtocol tcp", " ".join(lines), lines == ["over raw TCP"])

    def split(self) -> None:
        story = self.story
        story.step("2 traffic split")
        story.say(f"Service web has an HTTPRoute with weights 90 and 10. {_CALLS} calls from one Python process:")
        began = time.monotonic()
        counts = Counter(self.caller(self.client, "http", "http://web/", "--calls", str(_CALLS)))
        story.say(f"  took {time.monotonic() - began:.1f} s")
        v1, v2 = counts["200 web-v1"], counts["200 web-v2"]
        # Not by chance but by a sequence, one per worker, each exact to within one or two.
        ok = v1 + v2 == _CALLS and abs(v2 - _CALLS // 10) <= 2 * WORKERS
        story.check(f"450 to web-v1, 50 to web-v2, each within {2 * WORKERS}", _counted(counts), ok)

    def header_route(self) -> None:
        story = self.story
        story.step("3 header route")
        urls = ["http://web/"] * 5
        with_header = self.curl(self.client, "-H", "x-tester: yes", *urls).split()
        self.calls += len(urls) - 1
        story.check("five calls with x-tester: yes go to web-v2", " ".join(with_header), with_header == ["web-v2"] * 5)
        # Two of 20 are due to v2; were the header looked at wrongly, all or none would be.
        counts = Counter(self.caller(self.client, "http", "http://web/", "--calls", "20"))
        ok = sum(counts.values()) == 20 and 16 <= counts["200 web-v1"] <= 20
        story.check("20 calls without it mostly to web-v1", _counted(counts), ok)

    def weight_change(self) -> None:
        story = self.story
        story.step("4 change under load")
        log = self.stage.folder / "load.log"
        command = [
            sys.executable,
            str(_HERE / "caller.py"),
            "http",
            "http://web/",
            "--calls",
            "20000",
            "--threads",
            "4",
        ]
        story.shown(f"{shlex.join(self.client.command(*command))} > {log} &")
        load = self.client.start(*command, log=log.name)

        def lines() -> list[str]:
            return log.read_text().splitlines()

        def share(tail: list[str]) -> int:
            return sum(line == "200 web-v2" for line in tail)

        wait_for(lambda: len(lines()) >= 300 or load.poll() is not None, "300 calls")
        edited = len(lines())
        began = time.monotonic()
        self.edit("route.yaml", ("weight: 90", "weight: 20"), ("weight: 10", "weight: 80"))
        wait_for(lambda: share(lines()[-100:]) >= 70 or load.poll() is not None, "the new weights to hold")
        took = time.monotonic() - began
        held = len(lines())
        wait_for(lambda: len(lines()) >= held + 400 or load.poll() is not None, "400 calls more")
        code = self.stage.stop(load)
        every = lines()
        self.calls += len(every)
        after = every[held : held + 400]
        failed = [line for line in every if line not in ("200 web-v1", "200 web-v2")]
        story.say(f"  {len(every)} calls; the new weights held {took:.1f} s after the file was written")
        seen = f"{len(failed)} of {len(every)} failed {failed[:3] if failed else ''}".strip()
        story.check("no call fails", seen, not failed and code == 0)
        before = every[:edited]
        wanted = len(before) / 10
        # Calls in flight, one per thread, may be on the other side of a cut.
        slack = 2 * WORKERS + 4
        story.check(
            "10 % to web-v2 before the change",
            f"{share(before)} of {len(before)}",
            abs(share(before) - wanted) <= slack,
        )
        story.check("80 % after it", f"{share(after)} of {len(after)}", abs(share(after) - 320) <= slack)

    def on_the_wire(self) -> None:
        story = self.story
        story.step("5 on the wire")
        story.say(f"All frames on the veth between the nodes, captured in {self.stage.nodes[0].netns}, while a marker")
        story.say(f"({MARKER}) travels in a request header, in bodies both ways and over raw TCP.")
        file = self.captured("mesh.pcap")
        found = streams(file)
        records = [tls_records(stream) for stream in found.values()]
        total: Counter[str] = Counter()
        for kinds in records:
            total.update(kinds or {})
        octets = sum(map(len, found.values()))
        story.say(f"  {file}: {len(found)} TCP streams, {octets} octets; TLS records: {dict(total)}")
        for flow, stream in found.items():
            if flow.dport == PORTS["files"] and flow.dst == self.stage.pods["files"].ip:
                story.say(f"  the last octets of {flow}:")
                story.quote(hexdump(stream[-64:]))
        is_tls = bool(records) and all(records) and total["application_data"] > 0
        story.check(
            "every TCP octet belongs to a TLS record",
            f"{sum(map(bool, records))} of {len(found)} streams, {octets} octets",
            is_tls,
        )
        times = file.read_bytes().count(MARKER.encode())
        story.check("the marker is nowhere", f"found {times} times", times == 0 and octets > 0)

        story.say("Now the same with mesh TLS switched off:")
        self.edit("security.yaml", (r"mode: \w+", "mode: DISABLE"))
        self.wait_all(self.client, "http://web-v2/whoami", lambda line: line.endswith("cert: "), "plaintext")
        file = self.captured("plain.pcap")
        found = streams(file)
        story.say(f"  {file}:")
        for flow, stream in found.items():
            at = stream.find(b"GET /secret.txt")
            if at >= 0:
                story.say(f"  {flow}:")
                story.quote(hexdump(stream[at:], 12))
        # A header, the bodies of a request and of a response, raw TCP to and fro.
        times = sum(stream.count(MARKER.encode()) for stream in found.values())
        story.check("it is, with PeerAuthentication DISABLE", f"found {times} times", times == 5)

    def captured(self, name: str) -> Path:
        """A capture of the wire while the marker travels."""
        node = self.stage.nodes[0]
        file, log = self.stage.folder / name, self.stage.folder / f"{name}.log"
        tap = node.start(sys.executable, str(_HERE / "wiretap.py"), WIRE, str(file), log=log.name)
        wait_for(lambda: "capturing" in log.read_text(), "the capture to begin")
        answers = [
            self.curl(self.client, "-H", f"x-secret: {MARKER}", "http://files/secret.txt"),
            self.curl(self.client, "-d", f"secret={MARKER}", "http://web-v2/"),
            *self.caller(self.client, "tcp", "echo", "9000", MARKER),
        ]
        if [MARKER in answers[0], answers[1], answers[2:]] != [True, "web-v2\n", [MARKER]]:
            raise AssertionError(f"while capturing: {answers}")
        self.stage.stop(tap)
        return file

    def strict(self) -> None:
        story = self.story
        story.step("6 identity")
        outsider = self.stage.pods["outsider"]
        direct = "http://web-v2:8080/whoami"
        self.edit("security.yaml", (r"mode: \w+", "mode: PERMISSIVE"))
        self.wait_all(self.client, "http://web-v2/whoami", lambda line: "URI=spiffe:" in line, "mesh TLS")
        story.say("A pod outside of the mesh calls a pod in it, by the pod's address:")
        seen = self.curl(outsider, direct).strip()
        story.check("PERMISSIVE serves it, without an identity", seen, seen == "web-v2 sees x-forwarded-client-cert:")
        self.edit("security.yaml", (r"mode: \w+", "mode: STRICT"))
        self.wait_all(outsider, direct, lambda line: line.startswith("403 "), "STRICT")
        answer = self.curl(outsider, "-i", direct)
        head, _, body = answer.replace("\r", "").partition("\n\n")
        wanted = ("403", "x-netproxy-reason: UAEX", "application/problem+json")
        seen = ", ".join(part for part in wanted if part in head)
        story.check("STRICT refuses it, and says so", seen, seen == ", ".join(wanted))
        detail = json.loads(body or "{}").get("detail", "")
        story.check("the body explains", detail, "web-v2 accepts mesh TLS only" in detail)
        lines = self.caller(outsider, "tcp", "echo", "9000", "let me in")
        story.quote("\n".join(lines))
        story.check("raw TCP from outside is reset", " ".join(lines), lines[0].startswith("failed ConnectionReset"))
        seen = self.curl(self.client, "-H", "x-forwarded-client-cert: URI=spiffe://evil", "http://web-v2/whoami")
        fields = ("By=spiffe://cluster.local/ns/shop/sa/web;", ";URI=spiffe://cluster.local/ns/shop/sa/client\n")
        story.check(
            "a client in the mesh is served; the app sees who it is, not what it claims",
            re.sub(";Hash=[^;]*", ";Hash=...", seen.strip()),
            all(field in seen for field in fields) and "evil" not in seen,
        )

    def metrics(self) -> None:
        story = self.story
        story.step("7 metrics, status")
        a, b = self.agents
        url = "http://127.0.0.1:15020/metrics"
        # A request is counted after its last octet left, so the last one may be on its way.
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: _requests(a, "source").total() == self.calls, "the metrics", 3.0)
        lines = a.node.run("curl", "-sS", url).stdout.splitlines()
        story.shown(f"{shlex.join(a.node.command('curl', '-sS', url))} | grep -m 4 'requests_total.*reporter=.source'")
        wanted = [line for line in lines if line.startswith("netproxy_requests_total") and 'reporter="source"' in line]
        story.quote("\n".join(wanted[:4]))
        sources = _requests(a, "source")
        story.check(
            f"{a.node.name} counted each of the {self.calls} calls of client",
            ", ".join(f"{dst} {count}" for (_, dst), count in sorted(sources.items())),
            sources.total() == self.calls and {src for src, _ in sources} == {"shop/client"},
        )
        there, pair = _requests(b, "destination"), ("shop/client", "shop/web-v2")
        story.check(
            f"{b.node.name} counted as many from client to web-v2",
            f"{there[pair]} of {sources[pair]}",
            there[pair] == sources[pair] > 0,
        )
        for agent in self.agents:
            command = agent.command("status")
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT, timeout=60)
            story.shown(shlex.join(command), done.stdout + done.stderr)
            story.check(f"netproxy status of {agent.node.name}", f"exit code {done.returncode}", done.returncode == 0)

    def play(self) -> None:
        for step in (
            self.build,
            self.plain_calls,
            self.split,
            self.header_route,
            self.weight_change,
            self.on_the_wire,
            self.strict,
            self.metrics,
        ):
            step()
            if _asked:
                # Somebody's clean-up swallowed what the handler raised.
                raise Interrupted(_asked[0])

    # -- KEEP=1 -------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Leave it running, say how to look around, and wait."""
        a, b = self.agents
        outsider = self.stage.pods["outsider"]
        python = shlex.join([sys.executable, "-m", "netproxy"])
        where = f"--run-root {a.run_root}"
        lines = (
            "It keeps running (KEEP=1). Look around, as root, in another terminal:",
            f"  cd {_ROOT}",
            f"  ip netns exec {self.client.netns} curl -si http://web/          # names: web web-v1 web-v2 files echo",
            f"  ip netns exec {self.client.netns} curl -s http://web-v2/whoami    # who the app sees",
            f"  ip netns exec {outsider.netns} curl -si http://web-v2:8080/    # outside of the mesh",
            f"  ip netns exec {self.client.netns} nft list ruleset",
            f"  {python} status --node {a.name} {where}",
            f"  {python} status --node {b.name} {where}",
            f"  {shlex.join(a.node.command('curl', '-s', 'http://127.0.0.1:15020/metrics'))}",
            f"  {shlex.join(a.node.command('tcpdump', '-ni', WIRE, '-X'))}",
            f"  wireshark {self.stage.folder / 'mesh.pcap'}",
            "Edit the resources; agents reload them within a second (validate says what is wrong before you save):",
            *(f"  {file}" for file in sorted(self.config.glob("*.yaml"))),
            f"  {python} validate -f {self.config}",
            f"Logs: {a.log} {b.log}",
        )
        for line in lines:
            self.story.say(line)
        if sys.stdin is not None and sys.stdin.isatty():
            self.story.say("Enter or Ctrl-C ends it and removes everything.")
            sys.stdin.readline()
        else:
            self.story.say(f"`kill {os.getpid()}` ends it and removes everything.")
            while True:
                signal.pause()


def _requests(agent: Agent, reporter: str) -> Counter[tuple[str, str]]:
    """(source, destination) -> requests, as the agent's metrics say."""
    found: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(agent.get("/metrics")[1].decode()):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "netproxy_requests_total" and labels["reporter"] == reporter:
                found[labels["source_workload"], labels["destination_workload"]] += int(sample.value)
    return found


def _counted(lines: Counter[str]) -> str:
    return ", ".join(f"{count} x {line}" for line, count in lines.most_common(4))


# --- coming and going


def _sweep(created_etc: bool) -> list[str]:
    """Remove what a run of the demonstration left, this one or one that was killed. What would not go."""
    forget_stale(PREFIX)
    for folder in _ETC_NETNS.glob(f"{PREFIX}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    if created_etc:
        with contextlib.suppress(OSError):
            _ETC_NETNS.rmdir()
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        if folder.lstat().st_uid == os.geteuid():
            shutil.rmtree(folder, ignore_errors=True)
    places = (Path("/run/netns"), _ETC_NETNS)
    left = [str(path) for place in places for path in place.glob(f"{PREFIX}-*")]
    return left + [str(path) for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*")]


def _interrupt(number: int, _frame: object) -> None:
    if os.getpid() != _PID:
        os._exit(1)  # a child that pyroute2 forked, and ends by SIGTERM: nothing here is its to clean up
    _ignore_signals()  # the end is not to be interrupted
    _asked.append(number)
    raise Interrupted(number)


def _ignore_signals() -> None:
    for number in _ENDS:
        signal.signal(number, signal.SIG_IGN)


def _play(stage: Stage, story: Story) -> None:
    demo = Demo(stage, story)
    began = time.monotonic()
    try:
        demo.play()
    except Exception as exc:  # noqa: BLE001 - whatever it is: show it as a failed step, then clean up
        traceback.print_exc()
        story.check("the step comes to its end", f"{type(exc).__name__}: {exc}".partition("\n")[0], False)
    if not story.ok():
        for agent in demo.agents:
            if agent.log.exists():
                story.say(f"\nThe end of {agent.log}:")
                story.quote(agent.tail())
    story.table()
    story.say(f"{'All of it holds' if story.ok() else 'NOT all of it holds'}; {time.monotonic() - began:.0f} s.")
    if os.environ.get("KEEP"):
        demo.keep()


def main() -> int:
    if os.geteuid() != 0:
        print("demo: needs root, for network namespaces and nftables", file=sys.stderr)
        return 2
    missing = [tool for tool in ("ip", "nsenter", "ss", "curl", "nginx") if shutil.which(tool) is None]
    if missing:
        print(f"demo: not installed: {' '.join(missing)} (`make setup` does)", file=sys.stderr)
        return 2
    # Goes with the process, however it ends.
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind("\0netproxy-demo")
    except OSError:
        print("demo: it runs already (see `ip netns`)", file=sys.stderr)
        return 2
    story = Story()
    created_etc = not _ETC_NETNS.exists()
    stage: Stage | None = None
    code = 1
    left: list[str] = []
    try:
        for number in _ENDS:
            signal.signal(number, _interrupt)
        _sweep(created_etc)
        stage = Stage(PREFIX, Path(tempfile.mkdtemp(prefix=FOLDER)), families=(4, 6))
        _play(stage, story)
        code = 0 if story.ok() else 1
    except Interrupted as exc:
        with contextlib.suppress(OSError):
            story.say(f"\n{exc}: cleaning up.")
        # Once the table was shown, this is how KEEP=1 ends.
        code = (0 if story.ok() else 1) if story.ended else 128 + exc.number
    finally:
        _ignore_signals()
        try:
            if stage is not None:
                stage.close()
        finally:
            left = _sweep(created_etc)
    if left:
        story.say(f"Could not be removed: {' '.join(left)}")
        return code or 1
    story.say("Everything is removed: processes, namespaces, rules, files.")
    return code


if __name__ == "__main__":
    sys.exit(main())
