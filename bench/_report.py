"""Figures as people read them: a table for a terminal, and RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench._figures import CPU, MEASURES

Document = Mapping[str, Any]


SIDE = ("rss_mib", "failed", "rate", "connections")
"""What a question has besides its answer."""


def measures_of(result: Document) -> list[str]:
    """Those that any system has, in the order of tables. Failures only if there were any."""
    spreads = result["spread"].values()
    found = [name for name in MEASURES if any(name in spread for spread in spreads)]
    if not any(spread.get("failed", {}).get("max") for spread in spreads):
        found = [name for name in found if name != "failed"]
    return found


def cell(values: Mapping[str, float] | None, digits: int) -> str:
    """Median (min..max)."""
    if values is None:
        return "-"
    median, low, high = (_number(values[key], digits) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}..{high})"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def rows(result: Document) -> list[list[str]]:
    """With a head. Systems are in the order of the run."""
    names = measures_of(result)
    head = ["system", *(MEASURES[name].text for name in names)]
    body = [
        [system, *(cell(spread.get(name), MEASURES[name].digits) for name in names)]
        for system, spread in result["spread"].items()
    ]
    return [head, *body]


def ratio_rows(result: Document) -> list[list[str]]:
    """Of the subject to each other system, measures that cost CPU or are the question's own; [] when there are none."""
    found = result["ratio_to"]
    names = [name for name in measures_of(result) if name not in SIDE]
    names = [name for name in names if any(name in ratios for ratios in found.values())]
    if not names:
        return []
    head = [f"{result['subject']} :", *(MEASURES[name].text for name in names)]
    return [head, *([system, *(_ratio(ratios.get(name)) for name in names)] for system, ratios in found.items())]


def _ratio(values: Mapping[str, float] | None) -> str:
    return cell(values, 3 if values is not None and values["median"] < 0.1 else 2)


def table(result: Document) -> str:
    """Plain text."""
    parts = [f"{result['name']}, {result['rounds']} rounds: median (min..max)"]
    parts += [_aligned(found) for found in (rows(result), ratio_rows(result)) if len(found) > 1]
    parts += [f"{system} is absent: {reason}" for system, reason in result["absent"].items()]
    return "\n\n".join(parts) + "\n"


def _aligned(found: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in found) for column in range(len(found[0]))]
    lines = []
    for first, *others in found:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def results(documents: Iterable[Document], texts: Mapping[str, str], command: str) -> str:
    """RESULTS.md. `texts`: what each question asks, by name."""
    documents = list(documents)
    versions: dict[str, str] = {}
    for result in documents:
        versions |= {name: text for name, text in result["machine"]["versions"].items() if text}
    lines = ["# Results", "", "Written by the run itself: figures as they came out, whatever they are.", ""]
    if documents:
        machine, last = documents[0]["machine"], documents[-1]["machine"]
        lines += [
            f"- Machine: {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}",
            f"- Command: `{command}`",
            f"- From {machine['date']} to {last['date']}",
            f"- Versions: {', '.join(f'{name} {text}' for name, text in sorted(versions.items()))}",
            "- Engines of HTTP/1 and HTTP/2: native, of the system `netproxy-reference` h11 and h2",
            "",
            "Each figure is the median of the rounds, with minimum and maximum. A ratio is taken within a round, where "
            "both systems met the same machine. CPU is user and system time of all processes of a system, client and "
            "origin excepted, by the driver's count of requests. How systems stand and what they are configured for is "
            "said in `bench/_systems.py` and in `bench/configs/`.",
            "",
        ]
    for result in documents:
        lines += [f"## {result['name']}", "", texts.get(result["name"], ""), ""]
        lines += [f"![{result['name']}](charts/{result['name']}.svg)", ""] if result["systems"] else []
        for found in (rows(result), ratio_rows(result)):
            if len(found) > 1:
                lines += [*_markdown(found), ""]
        lines += [f"- {system} is absent: {_escaped(reason)}" for system, reason in result["absent"].items()]
        lines += [""] if result["absent"] else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown(found: Sequence[Sequence[str]]) -> list[str]:
    head, *body = found
    return [
        f"| {' | '.join(head)} |",
        f"|---{'|---:' * (len(head) - 1)}|",
        *(f"| {' | '.join(_escaped(text) for text in row)} |" for row in body),
    ]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def charted(result: Document) -> list[str]:
    """The measures that a chart shows: latencies where a rate was asked for, else CPU if there is any, else all."""
    names = measures_of(result)
    if "rate" in names:
        return [name for name in names if name in ("p50_us", "p99_us", "p999_us")]
    return [name for name in names if name in CPU] or [name for name in names if name not in SIDE]
