"""Which mechanism steers, how often is looked, and what a repair tells of its gap."""

from __future__ import annotations

import asyncio
import threading

import pytest

from netproxy.addr import ServiceKey
from netproxy.config.balanced import BalancedPort
from netproxy.config.snapshot import Traffic
from netproxy.steering import Balancing, Looks, Mechanisms, Vigil, scope_of
from redirect import RedirectError, Scope
from redirect.bpf import Balanced, Target
from redirect.probe import Choice, Preference, Probe, choose
from redirect.wanted import MECHANISMS, Family, Mechanism

ALL: frozenset[Family] = frozenset({4, 6})


def asked(*works: Mechanism) -> tuple[list[Mechanism], object]:
    seen: list[Mechanism] = []

    def probe(mechanism: Mechanism) -> Probe:
        seen.append(mechanism)
        return Probe(ALL if mechanism in works else frozenset(), "" if mechanism in works else "no module", mechanism)

    return seen, probe


@pytest.mark.parametrize(
    ("wanted", "works", "mechanism", "tried"),
    [
        ("auto", MECHANISMS, "ebpf", 1),
        ("auto", ("nftables", "iptables-nft", "iptables-legacy"), "nftables", 2),
        ("auto", ("iptables-nft", "iptables-legacy"), None, 3),
        ("auto", ("iptables-legacy",), "iptables-legacy", None),
        ("auto", (), "", 4),
        ("ebpf", ("nftables",), "", 1),
        ("nftables", ("nftables",), "nftables", 1),
        ("nftables", ("iptables-nft", "iptables-legacy"), "", 1),
        ("iptables", MECHANISMS, None, 1),
        ("iptables", ("nftables",), "", 2),
    ],
)
def test_choice(wanted: Preference, works: tuple[Mechanism, ...], mechanism: str | None, tried: int | None) -> None:
    """`mechanism` None: one of iptables, as this host has it; "": none."""
    seen, probe = asked(*works)
    found = choose(wanted, probe)  # type: ignore[arg-type]
    assert tried is None or len(seen) == tried
    if mechanism == "":
        assert found.mechanism is None
        assert found.reason.count("no module") == tried
    else:
        assert found.mechanism in (MECHANISMS[1:] if mechanism is None else [mechanism])
        assert (wanted == "auto") is ("is configured" not in found.reason)
    if wanted == "auto" and found.mechanism and found.mechanism != "ebpf":
        assert "ebpf can't be used: no module" in found.reason


def told(wanted: Preference) -> Choice:
    return Choice("nftables" if wanted == "auto" else "iptables-nft", "as told")


def test_probes_are_asked_once_and_not_in_the_loop() -> None:
    threads: list[int] = []

    def probe(wanted: Preference) -> Choice:
        threads.append(threading.get_ident())
        return told(wanted)

    async def main() -> None:
        mechanisms = Mechanisms(probe)
        assert mechanisms.choice() is None
        assert await asyncio.gather(*(mechanisms.get() for _ in range(5))) == ["nftables"] * 5
        assert len(threads) == 1 and threads[0] != threading.get_ident()
        mechanisms.want("auto")
        assert mechanisms.choice() == told("auto")
        mechanisms.want("iptables")
        assert mechanisms.choice() is None
        assert await mechanisms.get() == "iptables-nft"

    asyncio.run(main())


def test_a_workload_may_want_another_one_than_the_node() -> None:
    asked: list[Preference] = []

    def probe(wanted: Preference) -> Choice:
        asked.append(wanted)
        return told(wanted)

    async def main() -> None:
        mechanisms = Mechanisms(probe)
        mechanisms.want("auto", {"auto", "iptables"})
        assert await asyncio.gather(mechanisms.get(), mechanisms.get("iptables")) == ["nftables", "iptables-nft"]
        assert (mechanisms.choice(), mechanisms.choice("iptables")) == (told("auto"), told("iptables"))
        # As long as somebody wants it, nobody is asked again.
        mechanisms.want("nftables", {"auto", "iptables"})
        await mechanisms.get("iptables")
        assert sorted(asked) == ["auto", "iptables"]
        mechanisms.want("nftables", {"auto"})
        assert mechanisms.choice("iptables") is None
        assert mechanisms.choice("auto") == told("auto")

    asyncio.run(main())


def test_without_a_mechanism_the_reason_is_told() -> None:
    async def main() -> None:
        mechanisms = Mechanisms(lambda _wanted: Choice(None, "iptables-nft can't be used: no module"))
        for _ in range(2):
            with pytest.raises(RedirectError, match="no module"):
                await mechanisms.get()

    asyncio.run(main())


def test_balanced_ports_that_could_not_be_put_are_put_again() -> None:
    """One that is impossible does not keep the others from it."""
    shop, mixed = ServiceKey("shop/db"), ("240.240.0.2", 1)
    good = BalancedPort(shop, "240.240.0.1", 1, (("10.0.0.1", 2),))
    bad = BalancedPort(shop, *mixed, (("fd00::1", 2),))
    asked: list[list[Balanced]] = []

    def put(node: str, services: list[Balanced]) -> dict[tuple[str, int], str]:
        asked.append(services)
        if len(asked) == 1:
            raise RedirectError("no memory")
        return {("240.240.0.1", 1): "the map is full"} if len(asked) == 3 else {}

    async def main() -> None:
        balancing = Balancing("node", put)
        await balancing.want((good, bad))
        assert len(asked) == 1 and balancing.failed == {}
        keeping = asyncio.create_task(balancing.keep(0.001))
        async with asyncio.timeout(5):
            while not balancing.failed:
                await asyncio.sleep(0.001)
        assert asked[0] == asked[1] == [Balanced("240.240.0.1", 1, (Target("10.0.0.1", 2),))]
        assert "another IP family" in balancing.failed[mixed]
        await balancing.want((good, bad))
        assert len(asked) == 2  # in force already
        await balancing.want((good,))
        assert balancing.failed == {("240.240.0.1", 1): "the map is full"}
        keeping.cancel()

    asyncio.run(main())


def test_looks_are_bounded() -> None:
    looks = Looks()
    assert [looks.take(100.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [looks.take(100.06), looks.take(100.06)] == [True, False]
    taken = sum(looks.take(101 + step / 1000) for step in range(1000))
    assert 20 <= taken <= 24


class Changing:
    """Somebody else changes rules just while they are read, the first time."""

    def __init__(self) -> None:
        self.asked = 0

    def drain(self) -> bool:
        return True

    def fingerprint(self, _mechanism: Mechanism) -> bytes:
        self.asked += 1
        if self.asked == 1:
            raise RedirectError("iptables: Resource temporarily unavailable")
        return b"1"


def test_rules_that_change_while_they_are_read_are_looked_at_again() -> None:
    vigil = Vigil(watch=Changing())  # type: ignore[arg-type]
    vigil.found_good(vigil.begin_look("iptables-legacy"), 10.0)
    assert not vigil.is_unchanged("iptables-legacy", 11.0)
    vigil.found_good(vigil.begin_look("iptables-legacy"), 11.0)
    assert vigil.is_unchanged("iptables-legacy", 12.0)


def test_a_gap_is_told_with_its_bound() -> None:
    vigil = Vigil(good_at=100.0)
    assert vigil.repaired("nftables", 101.5) == "at most 1.500 s after it was changed"
    vigil.found_good(b"", 102.0)
    vigil.event_at = 102.5
    told = "0.250 s after the event was seen, at most 0.750 s after it was changed"
    assert vigil.repaired("iptables-nft", 102.75) == told
    assert (vigil.gap_s, vigil.last_gap_s) == (1.75, 0.25)
    # No event is about rules of legacy iptables: this one was something else.
    assert vigil.repaired("iptables-legacy", 102.75) == "at most 0.750 s after it was changed"
    assert (vigil.gap_s, vigil.last_gap_s) == (2.5, 0.75)


def test_a_scope_is_the_traffic_of_the_configuration() -> None:
    assert scope_of(Traffic()) == Scope()
    traffic = Traffic(out_exclude_ports=(22,), in_exclude_cidrs=("10.0.0.0/8",))
    assert scope_of(traffic) == Scope(out_exclude_ports=(22,), in_exclude_cidrs=("10.0.0.0/8",))
