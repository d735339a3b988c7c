"""The rule model as nftables text, and what `nft -j list table` says of it. PURE.

Every workload has one `inet` table, named `netproxy-<node>-g<generation>`. The generation is always there, so that
node `a-g1` and the first generation of node `a` cannot be mistaken for each other. A table changes by being replaced:
an owned table can be changed by its owner's socket only, and two generations side by side do no harm (the first NAT
wins, and tproxy twice finds the same socket).
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
    FromNetworks,
    InZone,
    IsTcp,
    MarkIs,
    Match,
    OfFamily,
    OfUsers,
    OpensTcp,
    Pass,
    Redirect,
    Reset,
    Rule,
    ToListener,
    ToLocal,
    ToNetworks,
    ToPorts,
    ruleset,
)
from redirect.wanted import FailurePolicy, Listing, Wanted

DROPS_AT_ONCE = True
"""Several tables go in one transaction."""
NEEDS_ADDRESSES = False
TRANSLATES = True
_NAME = re.compile(r"netproxy-([a-z0-9-]{1,40})-g([1-9][0-9]{0,9})")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_SYN_OF = ["fin", "syn", "rst", "ack"]


def table_name(node: str, generation: int) -> str:
    return f"netproxy-{node}-g{generation}"


def parse_table_name(name: str) -> tuple[str, int] | None:
    """Node and generation, or None for a table which is not ours."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def in_force(policy: FailurePolicy) -> FailurePolicy:
    """What becomes of the failure policy that is asked for."""
    return policy


def is_owned(policy: FailurePolicy) -> bool:
    """Rules that shall go with the agent belong to a netlink socket of its."""
    return policy == "open"


def create(name: str, wanted: Wanted) -> str:
    """One transaction which makes the table. It fails, changing nothing, if there is one of that name: `create` refuses
    a plain one, and the kernel refuses to make an existing table an owned one."""
    owned = is_owned(wanted.failure_policy)
    lines = [] if owned else [f"create table inet {name}"]
    lines += [f"table inet {name} {{", *(["\tflags owner"] if owned else [])]
    for chain in ruleset(wanted):
        lines.append(f"\tchain {chain.name} {{")
        lines.append(f"\t\ttype {chain.kind} hook {chain.hook} priority {chain.priority}; policy accept;")
        lines += [f"\t\t{_rule(rule)}" for rule in chain.rules]
        lines.append("\t}")
    return "\n".join([*lines, "}", ""])


def delete(names: tuple[str, ...]) -> str:
    """One transaction which deletes these tables, all or none. One that is gone already, flushed by somebody since it
    was seen, is no failure: it is made and deleted."""
    return "".join(f"add table inet {name}\ndelete table inet {name}\n" for name in names)


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
        case ToNetworks(cidrs):
            return f"{_protocol(cidrs)} daddr {_set(cidrs)}"
        case FromNetworks(cidrs):
            return f"{_protocol(cidrs)} saddr {_set(cidrs)}"
        case OfUsers(uids):
            return f"meta skuid {_set(uids)}"
        case ToPorts(ports, protocol):
            return f"{protocol} dport {_set(ports)}"
        case FromInterface(name):
            return f'iifname "{name}"'
        case OfFamily(family):
            return f"meta nfproto ipv{family}"
        case IsTcp():
            return "meta l4proto tcp"
        case OpensTcp():
            return f"tcp flags & ({'|'.join(_SYN_OF)}) == syn"
    assert_never(match)


def _protocol(cidrs: tuple[str, ...]) -> str:
    return "ip6" if ":" in cidrs[0] else "ip"


def _set(values: tuple[str, ...] | tuple[int, ...]) -> str:
    return f"{{ {', '.join(map(str, values))} }}" if len(values) > 1 else str(values[0])


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


def listing(wanted: Wanted) -> Listing:
    """What the kernel will show once these rules are loaded."""
    found: list[str] = []
    for chain in ruleset(wanted):
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
    own, networks as prefixes, addresses or ranges, neighbours among them joined, and a set of one as its element."""
    if isinstance(node, dict):
        if set(node) == {"|"}:
            return _canonical(node["|"])
        if _is_address(node):
            return {"set": _ranges([node])}
        if set(node) == {"set"} and _is_address(node["set"][0]):
            return {"set": _ranges(node["set"])}
        if set(node) == {"set"} and len(node["set"]) == 1:
            return _canonical(node["set"][0])
        return {key: _canonical(value) for key, value in node.items()}
    if isinstance(node, list):
        if all(isinstance(item, str) for item in node):
            return sorted(node)
        return [_canonical(item) for item in node]
    if isinstance(node, str) and _is_address(node):
        return {"set": _ranges([node])}
    return node


def _is_address(node: Any) -> bool:
    if isinstance(node, dict):
        return set(node) == {"prefix"} or (set(node) == {"range"} and _is_address(node["range"][0]))
    try:
        ipaddress.ip_address(node if isinstance(node, str) else "")
    except ValueError:
        return False
    return True


def _ranges(items: list[Any]) -> list[list[str]]:
    """First and last addresses of what the set holds, in order."""
    pairs: list[tuple[_Address, _Address]] = []
    for item in items:
        if isinstance(item, str):
            pairs.append((ipaddress.ip_address(item), ipaddress.ip_address(item)))
        elif "prefix" in item:
            net = ipaddress.ip_network(f"{item['prefix']['addr']}/{item['prefix']['len']}")
            pairs.append((net.network_address, net.broadcast_address))
        else:
            first, last = item["range"]
            pairs.append((ipaddress.ip_address(first), ipaddress.ip_address(last)))
    joined: list[tuple[_Address, _Address]] = []
    for first, last in sorted(pairs, key=lambda pair: int(pair[0])):
        if joined and int(joined[-1][1]) + 1 == int(first):
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return [[str(first), str(last)] for first, last in joined]


def _match_json(match: Match) -> dict[str, Any]:
    match match:
        case Established():
            return _compare({"ct": {"key": "state"}}, "established", "in")
        case MarkIs(mark, mask):
            return _compare({"&": [{"meta": {"key": "mark"}}, mask]}, mark)
        case ToLocal(wanted):
            return _compare({"fib": {"result": "type", "flags": ["daddr"]}}, "local", "==" if wanted else "!=")
        case ToNetworks(cidrs):
            return _compare({"payload": {"protocol": _protocol(cidrs), "field": "daddr"}}, _networks_json(cidrs))
        case FromNetworks(cidrs):
            return _compare({"payload": {"protocol": _protocol(cidrs), "field": "saddr"}}, _networks_json(cidrs))
        case OfUsers(uids):
            return _compare({"meta": {"key": "skuid"}}, {"set": list(uids)})
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


def _networks_json(cidrs: tuple[str, ...]) -> dict[str, Any]:
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    return {"set": [{"prefix": {"addr": str(net.network_address), "len": net.prefixlen}} for net in networks]}


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
