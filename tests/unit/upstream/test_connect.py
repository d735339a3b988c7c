"""The stock of sockets. No supervisor: what it would hand over is made here."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from netproxy.addr import WorkloadKey
from netproxy.errors import Reason, UpstreamError
from netproxy.upstream import connect
from netproxy.upstream.connect import BATCH, LOW_WATER, SocketStock, StockKey

ONE, TWO = WorkloadKey("shop/one"), WorkloadKey("shop/two")


class Bench:
    def __init__(self) -> None:
        self.asks: list[tuple[WorkloadKey, int, int]] = []
        self.stock = SocketStock(lambda key, n: self.asks.append((key.workload, key.family, n)))
        self.made: list[int] = []

    def deliver(self, n: int, error: str = "", workload: WorkloadKey = ONE) -> list[int]:
        fds = [socket.socket().detach() for _ in range(n)]
        self.made += fds
        self.stock.deliver(StockKey(workload, 4), fds, error)
        return fds

    def take(self, workload: WorkloadKey = ONE) -> asyncio.Task[socket.socket]:
        return asyncio.get_running_loop().create_task(self.stock.take(workload, 4))


def run(main: Callable[[Bench], Awaitable[None]]) -> None:
    """No descriptor may be left but those that the test itself took."""
    errors: list[object] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        bench = Bench()
        await main(bench)
        bench.stock.drop(ONE)
        bench.stock.drop(TWO)

    with asyncio.Runner() as runner:
        runner.get_loop()
        gc.collect()  # what other tests left
        before = len(os.listdir("/proc/self/fd"))
        runner.run(guarded())
        assert len(os.listdir("/proc/self/fd")) == before
    assert not errors


async def turns(n: int = 3) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


def test_who_waits_is_served_in_order() -> None:
    async def main(bench: Bench) -> None:
        tasks = [bench.take() for _ in range(3)]
        await turns()
        assert bench.asks == [(ONE, 4, BATCH)]
        fds = bench.deliver(BATCH)
        socks = [await task for task in tasks]
        assert [sock.fileno() for sock in socks] == fds[:3]
        (await bench.stock.take(ONE, 4)).close()
        assert len(bench.asks) == 1
        for sock in socks:
            sock.close()

    run(main)


def test_more_are_ordered_before_the_stock_is_empty_and_once() -> None:
    async def main(bench: Bench) -> None:
        first = bench.take()
        await turns()
        bench.deliver(BATCH)
        (await first).close()
        for left in range(BATCH - 2, -1, -1):
            (await bench.stock.take(ONE, 4)).close()
            assert len(bench.asks) == 1 + (left < LOW_WATER)

    run(main)


def test_orders_are_bounded_by_those_who_wait() -> None:
    async def main(bench: Bench) -> None:
        tasks = [bench.take() for _ in range(3 * BATCH + 1)]
        await turns()
        assert bench.asks == [(ONE, 4, BATCH)] * 4
        for _ in range(4):
            bench.deliver(BATCH)
        for task in tasks:
            (await task).close()
        assert len(bench.asks) == 4
        # What was asked for has come: the next one who finds the stock empty asks again.
        for _ in range(BATCH - 1):
            (await bench.stock.take(ONE, 4)).close()
        assert len(bench.asks) == 5

    run(main)


def test_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bench: Bench) -> None:
        monkeypatch.setattr(connect, "MAX_WAITING", 2)
        tasks = [bench.take() for _ in range(3)]
        await turns()
        with pytest.raises(UpstreamError) as caught:
            await tasks[2]
        assert caught.value.reason is Reason.OVERLOADED
        bench.deliver(2)
        for task in tasks[:2]:
            (await task).close()

    run(main)


def test_an_error_fails_all_who_get_nothing() -> None:
    async def main(bench: Bench) -> None:
        tasks = [bench.take() for _ in range(3)]
        await turns()
        bench.deliver(1, "out of descriptors")
        (await tasks[0]).close()
        for task in tasks[1:]:
            with pytest.raises(UpstreamError, match="out of descriptors") as caught:
                await task
            assert caught.value.reason is Reason.CONNECT_FAILED
        again = bench.take()
        await turns()
        assert len(bench.asks) == 2
        bench.deliver(1)
        (await again).close()

    run(main)


def test_half_a_delivery_is_ordered_again() -> None:
    async def main(bench: Bench) -> None:
        tasks = [bench.take() for _ in range(3)]
        await turns()
        bench.deliver(1)
        assert len(bench.asks) == 2
        bench.deliver(2)
        for task in tasks:
            (await task).close()

    run(main)


def test_a_workload_that_goes() -> None:
    async def main(bench: Bench) -> None:
        task, other = bench.take(), bench.take(TWO)
        await turns()
        bench.stock.drop(ONE)
        with pytest.raises(UpstreamError, match="gone"):
            await task
        bench.deliver(2, workload=TWO)
        (await other).close()
        bench.stock.drop(TWO)
        # It may come back.
        task = bench.take()
        await turns()
        assert bench.asks[-1] == (ONE, 4, BATCH)
        bench.deliver(1)
        (await task).close()

    run(main)


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bench: Bench) -> None:
        monkeypatch.setattr(connect, "STOCK_TIMEOUT_S", 0.001)
        for _ in range(2 * BATCH):
            with pytest.raises(UpstreamError, match="in time") as caught:
                await bench.stock.take(ONE, 4)
            assert caught.value.reason is Reason.INTERNAL
        # Those who gave up are not asked for again and again.
        assert bench.asks == [(ONE, 4, BATCH)]
        bench.deliver(1)
        (await bench.stock.take(ONE, 4)).close()

    run(main)


def test_who_gives_up_before_the_delivery_gets_nothing() -> None:
    async def main(bench: Bench) -> None:
        tasks = [bench.take() for _ in range(2)]
        await turns()
        tasks[0].cancel()
        await turns()
        bench.deliver(1)
        (await tasks[1]).close()
        assert tasks[0].cancelled()

    run(main)


@pytest.mark.parametrize("next_one", ["waits", "comes"])
def test_who_gives_up_in_the_moment_of_the_delivery_passes_it_on(next_one: str) -> None:
    async def main(bench: Bench) -> None:
        task = bench.take()
        waiting = bench.take() if next_one == "waits" else None
        await turns()
        (fd,) = bench.deliver(1)
        task.cancel()
        await turns()
        assert task.cancelled()
        sock = await (waiting or bench.take())
        assert sock.fileno() == fd
        sock.close()

    run(main)


def test_a_socket_given_back_to_a_workload_that_is_gone_is_closed() -> None:
    """It would keep the namespace alive."""

    async def main(bench: Bench) -> None:
        task = bench.take()
        await turns()
        (fd,) = bench.deliver(1)
        task.cancel()
        bench.stock.drop(ONE)
        await turns()
        with pytest.raises(OSError):
            os.fstat(fd)

    run(main)


def test_kinds_are_stocks_of_their_own() -> None:
    async def main(bench: Bench) -> None:
        stream = bench.take()
        dgram = asyncio.get_running_loop().create_task(bench.stock.take(ONE, 4, "dgram"))
        await turns()
        assert bench.asks == [(ONE, 4, BATCH)] * 2
        (fd,) = bench.deliver(1)
        assert (await stream).fileno() == fd
        assert not dgram.done()
        made = socket.socket(type=socket.SOCK_DGRAM)
        bench.stock.deliver(StockKey(ONE, 4, "dgram"), [made.detach()], "")
        (await dgram).close()
        (await stream).close()

    run(main)
