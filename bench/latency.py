"""Latency of small HTTP/1.1 requests at half of the highest rate that each system was seen to do.

First wrk finds that rate, as fast as it goes with 32 connections; then a driver of our own asks at half of it, evenly
(see `_pace.py`). Times are from the moment at which a request was due. The driver is Python: some 50 us are its own.
"""

from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._load import CONNECTIONS, pace, wrk
from bench._question import Options, Question, Standing, measure


def find_rate(standing: Standing, options: Options) -> None:
    system = standing.system
    wrk(system.client, system.url + "/api/small", 1)
    standing.notes["rate"] = wrk(system.client, system.url + "/api/small", options.seconds).rps / 2


def put(standing: Standing, options: Options) -> Round:
    system, rate = standing.system, standing.notes["rate"]
    asked = measure(system, lambda: pace(system.client, system.url + "/api/small", options.seconds, CONNECTIONS, rate))
    return {**asked, "rate": rate}


QUESTION = Question("latency", first_line(__doc__), ("http",), ("netproxy", *PROXIES), put, prepare=find_rate)
main = QUESTION.main
