"""Does a connection that the app opens reach the proxy? Tried with a real one; and if not, what may be in the way.

The connection goes to an address at the end of the VIP networks, where nobody is but the proxy. On its way are hooks
of output, and of input on loopback, and all that others have put there. It is closed as soon as it is open, and the
proxy counts it as one to an unknown destination; so this is for when somebody asks, not for every look.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from redirect.errors import RedirectError
from redirect.netfilter import session
from redirect.netfilter.restore import Variant
from redirect.netns import inside
from redirect.unsteered import ends

_PORT = 1
_PATIENCE_S = 1.0
_SHOWN = 5


def blocked(netns_fd: int, vip_cidrs: Iterable[str], port: int) -> str:
    """Empty when one to each network reaches the proxy, else what happened and who may be the cause. `port` is that of
    the listener for outbound connections, which has to be there."""
    with inside(netns_fd):
        failed = [found for cidr in sorted(vip_cidrs) if (found := _try(cidr, port))]
        if not failed:
            return ""
        try:
            suspects = list(dict.fromkeys(_suspects()))
        except (RedirectError, ValueError) as exc:
            suspects = [f"the rules of others can't be read: {exc}"]
    more = f" and {len(suspects) - _SHOWN} more" if len(suspects) > _SHOWN else ""
    said = f"; rules of others that may be the cause: {', '.join(suspects[:_SHOWN])}{more}" if suspects else ""
    return "; ".join(failed) + said


def _try(cidr: str, port: int) -> str:
    network = ipaddress.ip_network(cidr)
    target = str(network.broadcast_address - 1)
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_PATIENCE_S)
        try:
            sock.connect((target, _PORT))
        except OSError as exc:
            return f"IPv{network.version}: a connection to {target} does not reach the proxy on port {port}: {exc}"
        if _has_peer(sock, port):
            return ""
        return f"IPv{network.version}: a connection to {target} reaches somebody else than the proxy on port {port}"


def _has_peer(sock: socket.socket, port: int) -> bool:
    """Is the other end a socket of that port in this namespace?"""
    local, local_port = sock.getsockname()[:2]
    return (local, local_port) in ends(port)


def _suspects() -> Iterator[str]:
    """Chains of others on the way that drop, reject, redirect or hide connections from conntrack."""
    found: dict[tuple[str, str], list[tuple[dict[str, Any], list[Any]]]] = {}
    for entry in _foreign():
        if "chain" in entry:
            chain = entry["chain"]
            found.setdefault((chain["family"], chain["table"]), []).append((chain, []))
        elif "rule" in entry:
            rule = entry["rule"]
            for chain, rules in found.get((rule["family"], rule["table"]), []):
                if chain["name"] == rule["chain"]:
                    rules.append(rule["expr"])
    for (family, table), chains in found.items():
        acting = {chain["name"] for chain, rules in chains if not chain["name"].startswith("np-") and _acts(rules)}
        for chain, rules in chains:
            if chain.get("hook") in ("input", "output") and (
                chain.get("policy") == "drop" or chain["name"] in acting or acting & _reachable(rules, chains)
            ):
                yield f"{family} {table} {chain['name']}"
    yield from _legacy()


_NAME = re.compile(r"[A-Za-z0-9_./-]+").fullmatch


def _foreign() -> Iterator[dict[str, Any]]:
    """Chains and rules of others. Chain by chain: libnftables 1.0.6 can't list an owned table as JSON, nor a ruleset
    with one in it, see `session.list_table`. A name that would have to be quoted is passed over."""
    for entry in json.loads(session.run("list chains", json=True))["nftables"]:
        chain = entry.get("chain")
        if chain is None or chain["family"] not in ("ip", "ip6", "inet") or chain["table"].startswith("netproxy-"):
            continue
        family, table, name = chain["family"], chain["table"], chain["name"]
        if _NAME(table) and _NAME(name):
            yield from json.loads(session.run(f"list chain {family} {table} {name}", json=True))["nftables"]


_VERDICTS = {"drop", "reject", "redirect", "dnat", "notrack", "queue", "tproxy"}


def _acts(rules: list[Any]) -> bool:
    return any(isinstance(part, dict) and _VERDICTS & part.keys() for rule in rules for part in rule)


def _reachable(rules: list[Any], chains: list[tuple[dict[str, Any], list[Any]]]) -> set[str]:
    """Chains that these rules lead to, however far."""
    by_name = {chain["name"]: found for chain, found in chains}
    seen: set[str] = set()
    todo = [rules]
    while todo:
        for rule in todo.pop():
            for part in rule:
                for verb in ("jump", "goto"):
                    target = part[verb]["target"] if isinstance(part, dict) and verb in part else None
                    if target is not None and target not in seen:
                        seen.add(target)
                        todo.append(by_name.get(target, []))
    return seen


def _legacy() -> Iterator[str]:
    """Likewise of legacy iptables, coarsely: the tables in which somebody acts at all."""
    legacy = Variant("iptables-legacy")
    for name, text in legacy.saved():
        table = ""
        for line in text.splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith((":INPUT DROP", ":OUTPUT DROP")) or (
                line.startswith("-A ")
                and not line.startswith(("-A np-", "-A FORWARD", "-A POSTROUTING"))
                and any(f"-j {verb}" in line for verb in ("DROP", "REJECT", "REDIRECT", "DNAT", "NOTRACK", "CT"))
            ):
                yield f"{name}-legacy {table}: {line}"
