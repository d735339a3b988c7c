from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import dns.message
import dns.rcode
import dns.rrset
import pytest

from netproxy.config.shard import MeshShard
from netproxy.dns import resolve
from netproxy.dns.names import Names
from netproxy.dns.resolve import MAX_TTL_S, NEGATIVE_S, STALE_S, HostResolver
from netproxy.errors import Reason, UpstreamError
from tests.unit.dns.resolver import Counts, Resolver, answers, forwarder, resolver
from tests.unit.dns.shards import CLIENT, workload


class Bench:
    def __init__(self, there: Resolver) -> None:
        self.there = there
        self.now = 100.0
        self.counts = Counts()
        self.names = Names()
        self.names.put(workload(nameservers=("127.0.0.1",)))
        self.forwarder = forwarder(there.port, self.counts)
        self.resolver = HostResolver(self.forwarder, self.names, lambda: self.now, self.counts)

    async def ask(self, name: str = "outside.example", family: int = 4) -> list[str]:
        return sorted(await self.resolver.resolve(CLIENT, name, family))

    async def fails(self, match: str, name: str = "outside.example", family: int = 4) -> None:
        with pytest.raises(UpstreamError, match=match) as caught:
            await self.ask(name, family)
        assert caught.value.reason is Reason.DNS_FAILED

    @property
    def asked(self) -> int:
        return len(self.there.asked)


def run(main: Callable[[Bench], Awaitable[None]]) -> None:
    async def guarded() -> None:
        async with resolver() as there:
            await main(Bench(there))

    asyncio.run(guarded())


def test_what_the_workload_says_of_its_resolvers_is_no_way_around_the_policy() -> None:
    """Whoever writes its own resolv.conf, or listens on its loopback, could lead an allowed name anywhere."""

    async def main(bench: Bench) -> None:
        shard = workload(nameservers=("127.0.0.1", "127.0.0.7"))
        bench.names.put(shard)
        bench.there.reply = answers("192.0.2.66", ttl=60)
        assert await bench.ask() == ["192.0.2.66"]
        bench.names.put(MeshShard(outbound_policy="deny"))
        await bench.fails("trusts no resolver that the workload chose")
        assert bench.asked == 1
        bench.names.put(dataclasses.replace(shard, trusted_nameservers=("127.0.0.1",)))
        bench.there.reply = answers("192.0.2.1", ttl=60)
        assert await bench.ask() == ["192.0.2.1"]
        bench.names.put(MeshShard(outbound_policy="allow"))
        bench.names.put(workload(nameservers=()))
        await bench.fails("the workload has no resolver")

    run(main)


def test_addresses_are_kept_for_their_ttl() -> None:
    async def main(bench: Bench) -> None:
        bench.there.reply = answers("192.0.2.1", "192.0.2.2", ttl=30)
        assert await bench.ask() == ["192.0.2.1", "192.0.2.2"]
        bench.now += 29
        assert await bench.ask("Outside.EXAMPLE.") == ["192.0.2.1", "192.0.2.2"]
        assert bench.asked == 1
        bench.there.reply = answers("192.0.2.3")
        bench.now += 2
        assert await bench.ask() == ["192.0.2.3"]
        bench.there.reply = answers("2001:DB8:0::1")
        assert await bench.ask(family=6) == ["2001:db8::1"]
        assert [message.question[0].to_text() for message in bench.there.asked] == [
            "outside.example. IN A",
            "outside.example. IN A",
            "outside.example. IN AAAA",
        ]

    run(main)


@pytest.mark.parametrize(("ttl", "kept_s"), [(0, 1.0), (86400, MAX_TTL_S)])
def test_a_ttl_has_bounds(ttl: int, kept_s: float) -> None:
    async def main(bench: Bench) -> None:
        bench.there.reply = answers("192.0.2.1", ttl=ttl)
        await bench.ask()
        bench.now += kept_s - 0.1
        await bench.ask()
        assert bench.asked == 1
        bench.now += 0.2
        await bench.ask()
        assert bench.asked == 2

    run(main)


def test_aliases_are_followed_and_their_ttl_counts() -> None:
    async def main(bench: Bench) -> None:
        def reply(wire: bytes) -> list[bytes]:
            response = dns.message.make_response(dns.message.from_wire(wire))
            for line in ("outside.example. 9 IN CNAME b.example.", "b.example. 60 IN CNAME c.example."):
                name, ttl, *rest = line.split()
                response.answer.append(dns.rrset.from_text(name, int(ttl), *rest))
            response.answer.append(dns.rrset.from_text("c.example.", 60, "IN", "A", "192.0.2.5"))
            response.answer.append(dns.rrset.from_text("other.example.", 60, "IN", "A", "192.0.2.6"))
            return [response.to_wire()]

        bench.there.reply = reply
        assert await bench.ask() == ["192.0.2.5"]
        bench.now += 10
        await bench.ask()
        assert bench.asked == 2

    run(main)


def test_a_loop_of_aliases_and_other_nonsense() -> None:
    async def main(bench: Bench) -> None:
        def reply(wire: bytes) -> list[bytes]:
            response = dns.message.make_response(dns.message.from_wire(wire))
            response.answer.append(dns.rrset.from_text("outside.example.", 9, "IN", "CNAME", "outside.example."))
            return [response.to_wire()]

        bench.there.reply = reply
        await bench.fails("no usable answer")
        bench.now += NEGATIVE_S + 1
        bench.there.reply = lambda wire: [answers("192.0.2.1")(wire)[0][:-1]]
        await bench.fails("no usable answer")
        for name in ("x" * 64 + ".example", "a..b", "é" * 300):
            await bench.fails("no usable answer", name)

    run(main)


def test_an_answer_that_was_cut_is_asked_for_by_tcp() -> None:
    async def main(bench: Bench) -> None:
        def reply(wire: bytes) -> list[bytes]:
            (good,) = answers()(wire)
            return [good[:2] + bytes([good[2] | 2]) + good[3:]]

        bench.there.reply, bench.there.by_tcp = reply, answers("192.0.2.8")
        assert await bench.ask() == ["192.0.2.8"]

    run(main)


@pytest.mark.parametrize("rcode", [dns.rcode.NXDOMAIN, dns.rcode.NOERROR, dns.rcode.SERVFAIL])
def test_a_failure_is_remembered_for_a_moment(rcode: dns.rcode.Rcode) -> None:
    async def main(bench: Bench) -> None:
        bench.there.reply = answers(rcode=rcode)
        await bench.fails("SERVFAIL" if rcode == dns.rcode.SERVFAIL else "no address of family IPv4")
        asked = bench.asked
        await bench.fails("outside.example")
        assert bench.asked == asked
        bench.now += NEGATIVE_S + 0.1
        bench.there.reply = answers("192.0.2.1")
        assert await bench.ask() == ["192.0.2.1"]

    run(main)


def test_while_the_resolvers_fail_what_was_good_is_used() -> None:
    async def main(bench: Bench) -> None:
        bench.there.reply = answers("192.0.2.1", ttl=30)
        await bench.ask()
        bench.there.reply = answers(rcode=dns.rcode.SERVFAIL)
        bench.now += 31
        assert await bench.ask() == ["192.0.2.1"]
        asked = bench.asked
        assert await bench.ask() == ["192.0.2.1"]
        assert bench.asked == asked, "not for every call"
        bench.now += NEGATIVE_S + 0.1
        assert await bench.ask() == ["192.0.2.1"]
        assert bench.asked > asked
        assert bench.counts["dns_stale"] == 2
        bench.now += STALE_S
        await bench.fails("SERVFAIL")

    run(main)


def test_a_name_that_is_gone_is_forgotten() -> None:
    async def main(bench: Bench) -> None:
        bench.there.reply = answers("192.0.2.1", ttl=1)
        await bench.ask()
        bench.there.reply = answers(rcode=dns.rcode.NXDOMAIN)
        bench.now += 2
        await bench.fails("no address")

    run(main)


def test_who_asks_for_the_same_waits_for_the_same() -> None:
    async def main(bench: Bench) -> None:
        tasks = [asyncio.create_task(bench.ask()) for _ in range(10)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        assert [await task for task in tasks[1:]] == [["192.0.2.1"]] * 9
        assert tasks[0].cancelled()
        assert bench.asked == 1

    run(main)


def test_a_workload_that_goes() -> None:
    async def main(bench: Bench) -> None:
        await bench.ask("known.example")
        bench.there.reply = lambda wire: []
        task = asyncio.create_task(bench.ask())
        while bench.asked < 2:
            await asyncio.sleep(0)
        bench.resolver.drop(CLIENT)
        with pytest.raises(UpstreamError, match="gone"):
            await task
        assert bench.forwarder.outstanding == 0
        bench.names.drop("workload/shop/client")
        await bench.fails("no resolver", "known.example")

    run(main)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bench: Bench) -> None:
        monkeypatch.setattr(resolve, "MAX_NAMES", 3)
        for name in ("a.example", "b.example", "c.example"):
            await bench.ask(name)
        await bench.ask("a.example")
        await bench.ask("d.example")
        assert bench.asked == 4
        for name in ("a.example", "c.example", "d.example"):
            await bench.ask(name)
        assert bench.asked == 4, "the one that was used longest ago went"
        await bench.ask("b.example")
        assert bench.asked == 5

    run(main)
