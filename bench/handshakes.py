"""Mutual TLS 1.3 between two proxies with a full handshake for every connection, both ends of it counted.

Opaque octets in one TLS connection each, a request and its answer on it; no session is resumed, but by
netproxy-resuming, which is netproxy as it comes. 32 clients.
"""

from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._load import wrk
from bench._question import Options, Question, Standing, measure

NAMES = {"rps": "handshakes_s", "cpu_us_per_request": "cpu_us_per_handshake"}


def put(standing: Standing, options: Options) -> Round:
    system = standing.system
    close = {"connection": "close"}
    return measure(system, lambda: wrk(system.client, system.url + "/api/small", options.seconds, close), NAMES)


QUESTION = Question(
    "handshakes", first_line(__doc__), ("handshakes",), ("netproxy", "netproxy-resuming", *PROXIES), put
)
main = QUESTION.main
