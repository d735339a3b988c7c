from __future__ import annotations

from collections import Counter

from netproxy.observe.spans import Span, Spans


def span(number: int) -> Span:
    return Span("1" * 32, f"{number:016x}", "", "shop/web", "client", 1.0, 0.5, {})


def test_the_oldest_go_and_are_counted() -> None:
    told: Counter[str] = Counter()
    spans = Spans(lambda name: told.update((name,)), limit=2)
    for number in range(5):
        spans.record(span(number))
    assert len(spans) == 2
    assert spans.take() == [span(3), span(4)]
    assert not spans.take()
    assert told == {"spans_recorded": 5, "spans_dropped": 3}
