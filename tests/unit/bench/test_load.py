from __future__ import annotations

import pytest

from bench._load import parse_h2load, parse_wrk
from bench._systems import Absent

WRK = """Running 4s test @ http://127.0.0.1:8000/api/small
  1 threads and 32 connections
  52138 requests in 4.00s, 12.33MB read
Requests/sec:  13034.50
{"requests":52138,"us":4001234,"bytes":12928734,"failed":3,"p50":1565,"p99":9461,"p999":12498}
"""
H2LOAD = """starting benchmark...
finished in 2.00s, 1203.50 req/s, 210.00KB/s
requests: 2407 total, 2410 started, 2407 done, {} succeeded, {} failed, {} errored, {} timeout
status codes: {} 2xx, 0 3xx, 0 4xx, {} 5xx
traffic: 420.00KB (430080) total
"""


def test_wrk() -> None:
    found = parse_wrk(WRK)
    assert (found.requests, found.failed) == (52138, 3)
    assert found.seconds == pytest.approx(4.001234)
    assert (found.p50_us, found.p99_us, found.p999_us) == (1565, 9461, 12498)
    assert found.rps == pytest.approx(52138 / 4.001234)


@pytest.mark.parametrize("text", ["", "unable to connect", WRK.replace("52138", "0")])
def test_wrk_without_a_result(text: str) -> None:
    with pytest.raises(Absent):
        parse_wrk(text)


def test_h2load() -> None:
    found = parse_h2load(H2LOAD.format(2407, 0, 0, 0, 2407, 0))
    assert found == (2407, 2.0, 0, 0.0, 0.0, 0.0)


def test_h2load_counts_what_failed() -> None:
    """Answers that are no 2xx succeed in its eyes; what errored is among the failed."""
    assert parse_h2load(H2LOAD.format(2400, 7, 5, 2, 2390, 10)).failed == 7 + 2 + 10


@pytest.mark.parametrize("unit, seconds", [("s", 2.0), ("ms", 0.002), ("us", 2e-6)])
def test_units_of_h2load(unit: str, seconds: float) -> None:
    text = H2LOAD.format(1, 0, 0, 0, 1, 0).replace("2.00s, ", f"2.00{unit}, ")
    assert parse_h2load(text).seconds == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "finished in 2.00s, 0 req/s", H2LOAD.format(0, 9, 9, 0, 0, 0)])
def test_h2load_without_a_result(text: str) -> None:
    with pytest.raises(Absent):
        parse_h2load(text)
