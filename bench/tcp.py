"""Opaque TCP: round trips of small messages, throughput in answers of 1 MiB; 32 connections, half of the time each."""

from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._load import wrk
from bench._question import Options, Question, Standing, measure

TRIPS = {"rps": "round_trips_s", "cpu_us_per_request": "cpu_us_per_round_trip"}
BYTES = {"rps": "mib_s", "cpu_us_per_request": "cpu_us_per_mib"}


def put(standing: Standing, options: Options) -> Round:
    system = standing.system
    trips = measure(system, lambda: wrk(system.client, system.url + "/api/small", options.seconds), TRIPS)
    # Latencies are those of the round trips.
    large = measure(system, lambda: wrk(system.client, system.url + "/api/1m", options.seconds), BYTES)
    return {**large, **trips, "failed": trips["failed"] + large["failed"]}


QUESTION = Question(
    "tcp", first_line(__doc__), ("tcp",), ("netproxy", *PROXIES), put, share_of_seconds=0.5
)  # fmt: skip
main = QUESTION.main
