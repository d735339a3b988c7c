"""Memory of a connection that is idle after one request, plain and with mutual TLS: what RSS grows by.

``--connections`` of them (2,000; 10,000 with FULL=1), twice. TLS ends at the proxy; at netproxy it is mesh TLS that
comes in, dialled from the node with the certificate of the client.
"""

from __future__ import annotations

import json
import sys

from bench import _proc
from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._question import Options, Question, Standing
from bench._systems import PORT, TLS_PORT, VIP, Absent, Netproxy, Peer, System
from examples.stage import wait_for

PATIENCE_S = 180.0


def put(standing: Standing, options: Options) -> Round:
    plain, tls = standing.systems
    count = options.connections
    return {
        "connections": float(count),
        "plain_kib": grown_kib(plain, count, []) / count,
        "tls_kib": grown_kib(tls, count, credentials(tls)) / count,
        "rss_mib": _proc.rss_mib(plain.pids()),
    }


def grown_kib(system: System, count: int, tls: list[str]) -> float:
    assert isinstance(system, Netproxy | Peer)
    place = system.place
    ready = place.folder / "ready"
    ready.unlink(missing_ok=True)
    where: tuple[str, int] = ("127.0.0.1", TLS_PORT if tls else PORT)
    pod = place.client.command
    if isinstance(system, Netproxy):
        where = (place.server.ip, 8080) if tls else (VIP, 80)
        # From outside of the client's pod: what leaves that is the agent's already.
        pod = place.node.command if tls else pod
    pids = system.pids()
    before = _proc.rss_mib(pids)
    argv = pod(sys.executable, "-m", "bench._idle", where[0], str(where[1]), str(count), str(ready), *tls)
    driver = place.stage.start(argv, log=place.log.name)

    def there() -> bool:
        if driver.poll() is not None:
            raise Absent(f"the driver ended with code {driver.returncode}: {place.tail()}")
        return ready.exists()

    try:
        wait_for(there, f"{count} idle connections", PATIENCE_S)
        if system.pids() != pids:
            raise Absent("its processes are not the same any more")
        return (_proc.rss_mib(pids) - before) * 1024
    finally:
        place.stage.stop(driver)


def credentials(system: System) -> list[str]:
    """Certificate, key, CA and ALPN for the driver."""
    assert isinstance(system, Netproxy | Peer)
    stage, folder = system.place.stage, system.place.folder
    if not isinstance(system, Netproxy):
        return [
            str(stage.folder / "leaf.pem"),
            str(stage.folder / "leaf.key"),
            str(stage.folder / "ca.pem"),
            "http/1.1",
        ]
    for file in (stage.folder / "state" / system.place.node.netns / "svid").iterdir():
        svid = json.loads(file.read_text())
        if svid["identity"].endswith("/sa/client"):
            break
    else:
        raise Absent("the agent has no certificate for the client")
    (folder / "chain.pem").write_text(svid["chain_pem"])
    (folder / "chain.key").write_text(svid["key_pem"])
    (folder / "bundle.pem").write_text(svid["bundle_pem"])
    return [*(str(folder / name) for name in ("chain.pem", "chain.key", "bundle.pem")), "netproxy/http/1.1"]


QUESTION = Question(
    "idle_memory", first_line(__doc__), ("http", "tls"), ("netproxy", *PROXIES), put, only_once=True
)  # fmt: skip
main = QUESTION.main
