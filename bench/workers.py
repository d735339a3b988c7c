"""From one worker to two: small HTTP/1.1 requests, 32 connections. `gain` is two workers' rate to one's.

Driver and origin run on the same cores, so that of 2 cores no system can gain much; CPU per request compares anyway.
"""

from functools import partial

from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._load import wrk
from bench._question import Options, Question, Standing, measure


def put(standing: Standing, options: Options) -> Round:
    found: dict[str, float] = {"failed": 0.0}
    for number, system in enumerate(standing.systems, 1):
        names = {"rps": f"rps_{number}", "cpu_us_per_request": f"cpu_us_per_request_{number}"}
        one = measure(system, partial(wrk, system.client, system.url + "/api/small", options.seconds), names)
        found |= {name: one[name] for name in names.values()}
        found["failed"] += one["failed"]
    return found | {"gain": found["rps_2"] / found["rps_1"]}


QUESTION = Question(
    "workers", first_line(__doc__), ("http",), ("netproxy", *PROXIES), put, workers=(1, 2), share_of_seconds=0.5
)  # fmt: skip
main = QUESTION.main
