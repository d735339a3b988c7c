from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench._chart import draw, write_chart
from bench._figures import Figures, document
from bench._machine import cpu_model
from bench._report import cell, charted, ratio_rows, results, rows, table
from bench._systems import first_version

MACHINE = {
    "cpu": "A CPU", "cores": 2, "kernel": "6.1", "date": "2026-01-02 03:04 UTC",
    "versions": {"nginx": "1.22.1", "envoy": ""},
}  # fmt: skip


def made(**absent: str) -> dict[str, Any]:
    figures = Figures("http1_small", "netproxy")
    for cpu in (25.04, 1234.0, 30.0):
        figures.add("netproxy", {"rps": 1000.0, "cpu_us_per_request": cpu, "failed": 0.0})
        figures.add("haproxy", {"rps": 4000.0, "cpu_us_per_request": 20.0, "p50_us": 7.0})
    for name, reason in absent.items():
        figures.drop(name, reason)
    return document(figures, MACHINE)


def test_cell() -> None:
    assert cell({"median": 1234.56, "min": 1.0, "max": 20000.0}, 1) == "1,234.6 (1.0..20,000.0)"
    assert cell({"median": 2.0, "min": 2.01, "max": 1.99}, 0) == "2"
    assert cell(None, 1) == "-"


def test_rows() -> None:
    assert rows(made()) == [
        ["system", "requests/s", "CPU us/request", "p50 us"],
        ["netproxy", "1,000", "30.0 (25.0..1,234.0)", "-"],
        ["haproxy", "4,000", "20.0", "7"],
    ]
    assert ratio_rows(made()) == [
        ["netproxy :", "requests/s", "CPU us/request"],
        ["haproxy", "0.25", "1.50 (1.25..61.70)"],
    ]


def test_small_ratios_keep_their_digits() -> None:
    figures = Figures("x", "netproxy")
    figures.add("netproxy", {"rps": 1.0})
    figures.add("haproxy", {"rps": 80.0})
    assert ratio_rows(document(figures, MACHINE))[1] == ["haproxy", "0.013"]


def test_failures_have_a_column_only_if_there_were_any() -> None:
    figures = Figures("x", "netproxy")
    figures.add("netproxy", {"rps": 1.0, "failed": 0.0})
    figures.add("netproxy", {"rps": 1.0, "failed": 9.0})
    assert rows(document(figures, MACHINE))[0][-1] == "failed"


def test_table_names_who_is_absent() -> None:
    text = table(made(envoy="not installed"))
    assert "envoy is absent: not installed" in text
    assert "netproxy  " in text
    assert table(made(netproxy="no", haproxy="neither")).count("absent") == 2


def test_results() -> None:
    text = results([made(envoy="said a|b\nand more")], {"http1_small": "What it asks."}, "make bench FULL=1")
    assert "- Machine: A CPU, 2 cores, Linux 6.1" in text
    assert "- Command: `make bench FULL=1`" in text
    assert "2026-01-02 03:04 UTC" in text
    assert "- Versions: nginx 1.22.1\n" in text
    assert "Engines of HTTP/1 and HTTP/2: native" in text
    assert "What it asks." in text
    assert "| haproxy | 0.25 | 1.50 (1.25..61.70) |" in text
    assert "![http1_small](charts/http1_small.svg)" in text
    assert "- envoy is absent: said a\\|b and more" in text
    assert results([], {}, "x").startswith("# Results")


def test_chart(tmp_path: Path) -> None:
    path = write_chart(made(), tmp_path / "charts")
    assert path == tmp_path / "charts" / "http1_small.svg"
    root = ET.fromstring(path.read_text())
    texts = [item.text for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.find(".//{*}tspan").text == "http1_small"  # type: ignore[union-attr]
    assert {"CPU us/request, lower is better", "netproxy", "haproxy", "30.0", "20.0"} <= set(texts)
    width = int(root.attrib["width"])
    for bar in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(bar.attrib.get("x", 0)) + float(bar.attrib["width"]) <= width


def test_what_a_chart_shows() -> None:
    figures = Figures("x", "netproxy")
    figures.add("netproxy", {"rps": 1.0, "cpu_us_per_request": 2.0, "p50_us": 3.0, "rate": 1.0})
    assert charted(document(figures, MACHINE)) == ["p50_us"]
    figures = Figures("x", "netproxy")
    figures.add("netproxy", {"plain_kib": 1.0, "tls_kib": 2.0, "rss_mib": 3.0, "connections": 4.0})
    assert charted(document(figures, MACHINE)) == ["plain_kib", "tls_kib"]
    assert charted(made()) == ["cpu_us_per_request"]


def test_no_chart_of_nothing(tmp_path: Path) -> None:
    nothing = made(netproxy="no", haproxy="neither")
    assert draw(nothing) is None
    assert write_chart(nothing, tmp_path / "charts") is None
    assert not (tmp_path / "charts").exists()


@pytest.mark.parametrize(
    "text, found",
    [
        ("nginx version: nginx/1.22.1\n", "1.22.1"),
        ("HAProxy version 2.6.12-1+deb12u4 2026/01/01 - https://haproxy.org/", "2.6.12-1+deb12u4"),
        ("envoy  version: 0a1b2c/1.40.0/Clean/RELEASE/BoringSSL", "1.40.0"),
        ("h2load nghttp2/1.52.0", "1.52.0"),
        ("wrk debian/4.1.0-3+b2 [epoll] Copyright (C) 2012", "4.1.0-3+b2"),
        ("no such thing", ""),
    ],
)
def test_versions(text: str, found: str) -> None:
    assert first_version(text) == found


def test_cpu_model() -> None:
    assert cpu_model("processor\t: 0\nmodel name\t: A CPU @ 3 GHz\nflags\t: x\nmodel name\t: B\n") == "A CPU @ 3 GHz"
    assert cpu_model("")
