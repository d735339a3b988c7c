from __future__ import annotations

import json

import pytest

from bench._figures import MEASURES, Figures, by_measure, document, ratios, spread

MACHINE = {"cpu": "A", "cores": 2}


def figures() -> Figures:
    made = Figures("http1_small", "netproxy")
    for ours, theirs in ((30.0, 20.0), (60.0, 30.0), (20.0, 20.0)):
        made.add("netproxy", {"rps": 1000.0, "cpu_us_per_request": ours, "failed": 0.0})
        made.add("haproxy", {"rps": 2000.0, "cpu_us_per_request": theirs, "failed": 0.0})
    return made


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([4.0, 1.0]) == {"median": 2.5, "min": 1.0, "max": 4.0}
    assert spread([7.0]) == {"median": 7.0, "min": 7.0, "max": 7.0}


def test_a_measure_counts_only_if_all_rounds_have_it() -> None:
    assert by_measure([{"rps": 1.0, "p50_us": 2.0}, {"rps": 3.0}]) == {"rps": [1.0, 3.0]}
    assert by_measure([]) == {}


def test_ratios_are_taken_per_round() -> None:
    """30:20, 60:30 and 20:20; the ratio of the medians would be another one, 30:20."""
    found = ratios(figures().rounds["netproxy"], figures().rounds["haproxy"])
    assert found["cpu_us_per_request"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert found["rps"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert "failed" not in found


def test_no_ratio_to_zero() -> None:
    assert ratios([{"rps": 1.0}, {"rps": 1.0}], [{"rps": 2.0}, {"rps": 0.0}]) == {}


def test_rounds_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios([{"rps": 1.0}], [{"rps": 2.0}, {"rps": 2.0}])


def test_document() -> None:
    made = figures()
    made.drop("envoy", "not installed")
    assert document(made, MACHINE) == {
        "name": "http1_small",
        "machine": MACHINE,
        "rounds": 3,
        "systems": {
            "netproxy": {"rps": 1000.0, "cpu_us_per_request": 30.0, "failed": 0.0},
            "haproxy": {"rps": 2000.0, "cpu_us_per_request": 20.0, "failed": 0.0},
        },
        "spread": {
            "netproxy": {
                "rps": {"median": 1000.0, "min": 1000.0, "max": 1000.0},
                "cpu_us_per_request": {"median": 30.0, "min": 20.0, "max": 60.0},
                "failed": {"median": 0.0, "min": 0.0, "max": 0.0},
            },
            "haproxy": {
                "rps": {"median": 2000.0, "min": 2000.0, "max": 2000.0},
                "cpu_us_per_request": {"median": 20.0, "min": 20.0, "max": 30.0},
                "failed": {"median": 0.0, "min": 0.0, "max": 0.0},
            },
        },
        "subject": "netproxy",
        "ratio_to": {
            "haproxy": {
                "rps": {"median": 0.5, "min": 0.5, "max": 0.5},
                "cpu_us_per_request": {"median": 1.5, "min": 1.0, "max": 2.0},
            }
        },
        "absent": {"envoy": "not installed"},
    }
    json.dumps(document(made, MACHINE))


def test_a_system_that_fails_in_a_round_has_no_figures_at_all() -> None:
    made = figures()
    made.drop("haproxy", "one of its processes ended during the round")
    found = document(made, MACHINE)
    assert list(found["systems"]) == ["netproxy"]
    assert found["ratio_to"] == {}
    assert "ended" in found["absent"]["haproxy"]


def test_without_the_subject_there_are_figures_and_no_ratios() -> None:
    made = figures()
    made.drop("netproxy", "no HTTP/2")
    found = document(made, MACHINE)
    assert list(found["systems"]) == ["haproxy"]
    assert found["ratio_to"] == {}
    assert found["rounds"] == 3


def test_measures_have_distinct_texts() -> None:
    assert len({measure.text for measure in MEASURES.values()}) == len(MEASURES)
