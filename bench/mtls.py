"""Mutual TLS 1.3 between two proxies, both legs counted: HTTP/1.1, 64 octets of answer, 32 connections that are kept.

netproxy's one agent does both legs with one worker; netproxy-http1 is the same with `meshHttp: http1`, where netproxy
has HTTP/2 in between. Of a peer one instance stands at the client and one at the origin, with a worker each. CPU
compares, requests per second do not.
"""

from bench._figures import Round
from bench._http import PROXIES, first_line
from bench._load import wrk
from bench._question import Options, Question, Standing, measure


def put(standing: Standing, options: Options) -> Round:
    system = standing.system
    return measure(system, lambda: wrk(system.client, system.url + "/api/small", options.seconds))


QUESTION = Question("mtls", first_line(__doc__), ("mtls",), ("netproxy", "netproxy-http1", *PROXIES), put)
main = QUESTION.main
