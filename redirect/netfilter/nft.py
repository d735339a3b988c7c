"""The rule model as nftables text, and what `nft -j list table` says of it. PURE.

Every workload has one `inet` table, named `netproxy-<node>-g<generation>`. The generation is always there, so that
node `a-g1` and the first generation of node `a` cannot be mistaken for each other. A table changes by being replaced:
an owned table can be changed by its owner's socket only, and two generations side by side do no harm (the first NAT
wins, and tproxy twice finds the same socket).

A `Listing` is the canonical form in which what we want and what the kernel has are compared.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
from typing import Any, assert_never

from redirect.netfilter.rules import (
    Action,
    Chain,
    Established,
    FromInterface,
    InZone,
    IsTcp,
    MarkIs,
    Match,
    OfFamily,
    OpensTcp,
    Pass,
    Redirect,
    Reset,
    Rule,
    Ruleset,
    ToListener,
    ToLocal,
    ToNetwork,
    ToPorts,
)

Listing = tuple[str, ...]

_NAME = re.compile(r"netproxy-([a-z0-9-]{1,40})-g([1-9][0-9]{0,9})")
_SYN_OF = ["fin", "syn", "rst", "ack"]


def table_name(node: str, generation: int) -> str:
    return f"netproxy-{node}-g{generation}"


def parse_table_name(name: str) -> tuple[str, int] | None:
    """Node and generation, or None for a table which is not ours."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def create(name: str, rules: Ruleset, *, owned: bool) -> str:
    """One transaction which makes the table. It fails, changing nothing, if there is one of that name: `create` refuses
    a plain one, and the kernel refuses to make an existing table an owned one."""
    lines = [] if owned else [f"create table inet {name}"]
    lines += [f"table inet {name} {{", *(["\tflags owner"] if owned else [])]
    for chain in rules:
        lines.append(f"\tchain {chain.name} {{")
        lines.append(f"\t\ttype {chain.kind} hook {chain.hook} priority {chain.priority}; policy accept;")
        lines += [f"\t\t{_rule(rule)}" for rule in chain.rules]
        lines.append("\t}")
    return "\n".join([*lines, "}", ""])


def delete(names: tuple[str, ...]) -> str:
    """One transaction which deletes these tables, all or none."""
    return "".join(f"delete table inet {name}\n" for name in names)


def _rule(rule: Rule) -> str:
    return " ".join([*(_match(match) for match in rule.matches), _action(rule.action)])


def _match(match: Match) -> str:
    match match:
        case Established():
            return "ct state established"
        case MarkIs(mark, mask):
            return f"meta mark & {mask:#010x} == {mark:#010x}"
        case ToLocal(wanted):
            return f"fib daddr type {'==' if wanted else '!='} local"
        case ToNetwork(cidr):
            return f"{'ip6' if ':' in cidr else 'ip'} daddr {cidr}"
        case ToPorts(ports, protocol):
            return f"{protocol} dport {{ {', '.join(map(str, ports))} }}"
        case FromInterface(name):
            return f'iifname "{name}"'
        case OfFamily(family):
            return f"meta nfproto ipv{family}"
        case IsTcp():
            return "meta l4proto tcp"
        case OpensTcp():
            return f"tcp flags & ({'|'.join(_SYN_OF)}) == syn"
    assert_never(match)


def _action(action: Action) -> str:
    match action:
        case Pass():
            return "return"
        case Redirect(port):
            return f"redirect to :{port}"
        case ToListener(4, port):
            return f"tproxy ip to 127.0.0.1:{port} accept"
        case ToListener(_, port):
            return f"tproxy ip6 to [::1]:{port} accept"
        case Reset():
            return "reject with tcp reset"
        case InZone(zone):
            return f"ct original zone set {zone}"
    assert_never(action)


def listing(rules: Ruleset) -> Listing:
    """What the kernel will show once these rules are loaded."""
    found: list[str] = []
    for chain in rules:
        found.append(_chain_line(chain))
        for rule in chain.rules:
            statements = [_match_json(match) for match in rule.matches] + _action_json(rule.action)
            found.append(_line(chain.name, statements))
    return tuple(_by_chain(found))


def chains_of(table: str, text: str) -> list[str]:
    """The names of a table's chains in the answer of `nft -j list chains inet`."""
    chains = [entry["chain"] for entry in json.loads(text)["nftables"] if "chain" in entry]
    return [chain["name"] for chain in chains if chain["table"] == table]


def read_listing(*texts: str) -> Listing:
    """The canonical form of the answer of `nft -j list table`, or the answers of `list chain` for all of its chains.

    Anything in the table which we would never put there (a set, a counter, another chain) makes it differ from every
    `listing`."""
    found: list[str] = []
    for entry in itertools.chain.from_iterable(json.loads(text)["nftables"] for text in texts):
        ((kind, body),) = entry.items()
        if kind in ("metainfo", "table"):
            continue
        body = {key: value for key, value in body.items() if key not in ("family", "table", "handle")}
        if kind == "chain":
            found.append(_line(body.pop("name"), ["chain", body]))
        elif kind == "rule" and set(body) == {"chain", "expr"}:
            found.append(_line(body["chain"], body["expr"]))
        else:
            found.append(_line("", [kind, body]))
    return tuple(_by_chain(found))


def _by_chain(lines: list[str]) -> list[str]:
    """Chains in order of name, the rules of each in their own order (the sort is stable)."""
    return sorted(lines, key=lambda line: line.partition(" ")[0])


def _chain_line(chain: Chain) -> str:
    body = {"type": chain.kind, "hook": chain.hook, "prio": chain.priority, "policy": "accept"}
    return _line(chain.name, ["chain", body])


def _line(chain: str, content: Any) -> str:
    return f"{chain} {json.dumps(_canonical(content), sort_keys=True, separators=(',', ':'))}"


def _canonical(node: Any) -> Any:
    """What versions of libnftables show differently: TCP flags as a list or as an or-expression, in an order of their
    own, and a set of one element as that element."""
    if isinstance(node, dict):
        if set(node) == {"|"}:
            return _canonical(node["|"])
        if set(node) == {"set"} and len(node["set"]) == 1:
            return _canonical(node["set"][0])
        return {key: _canonical(value) for key, value in node.items()}
    if isinstance(node, list):
        if all(isinstance(item, str) for item in node):
            return sorted(node)
        return [_canonical(item) for item in node]
    return node


def _match_json(match: Match) -> dict[str, Any]:
    match match:
        case Established():
            return _compare({"ct": {"key": "state"}}, "established", "in")
        case MarkIs(mark, mask):
            return _compare({"&": [{"meta": {"key": "mark"}}, mask]}, mark)
        case ToLocal(wanted):
            return _compare({"fib": {"result": "type", "flags": ["daddr"]}}, "local", "==" if wanted else "!=")
        case ToNetwork(cidr):
            network = ipaddress.ip_network(cidr)
            field = {"payload": {"protocol": f"ip{'6' if network.version == 6 else ''}", "field": "daddr"}}
            return _compare(field, {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}})
        case ToPorts(ports, protocol):
            return _compare({"payload": {"protocol": protocol, "field": "dport"}}, {"set": list(ports)})
        case FromInterface(name):
            return _compare({"meta": {"key": "iifname"}}, name)
        case OfFamily(family):
            return _compare({"meta": {"key": "nfproto"}}, f"ipv{family}")
        case IsTcp():
            return _compare({"meta": {"key": "l4proto"}}, "tcp")
        case OpensTcp():
            return _compare({"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, _SYN_OF]}, "syn")
    assert_never(match)


def _compare(left: dict[str, Any], right: Any, operator: str = "==") -> dict[str, Any]:
    return {"match": {"op": operator, "left": left, "right": right}}


def _action_json(action: Action) -> list[dict[str, Any]]:
    match action:
        case Pass():
            return [{"return": None}]
        case Redirect(port):
            return [{"redirect": {"port": port}}]
        case ToListener(4, port):
            return [{"tproxy": {"family": "ip", "addr": "127.0.0.1", "port": port}}, {"accept": None}]
        case ToListener(_, port):
            return [{"tproxy": {"family": "ip6", "addr": "::1", "port": port}}, {"accept": None}]
        case Reset():
            return [{"reject": {"type": "tcp reset"}}]
        case InZone(zone):
            return [{"mangle": {"key": {"ct": {"key": "zone", "dir": "original"}}, "value": zone}}]
    assert_never(action)
