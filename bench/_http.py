"""Questions in HTTP, which differ in what is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from bench._figures import Round
from bench._load import h2load, wrk
from bench._question import Options, Question, Standing, measure

PROXIES = ("nginx", "haproxy", "envoy")


def first_line(doc: str | None) -> str:
    return (doc or "").splitlines()[0]


def http1(
    name: str, doc: str | None, path: str, *, headers: Mapping[str, str] | None = None, reference: bool = False
) -> Question:
    """wrk, from plaintext to plaintext. `reference`: also netproxy with its reference engine."""

    def put(standing: Standing, options: Options) -> Round:
        system = standing.system
        return measure(system, lambda: wrk(system.client, system.url + path, options.seconds, headers))

    ours = ("netproxy", "netproxy-reference") if reference else ("netproxy",)
    return Question(name, first_line(doc), ("http",), ("origin", *ours, *PROXIES), put)


def http2(name: str, doc: str | None, path: str, *options: str, shape: str) -> Question:
    """h2load: 4 connections with 8 streams each."""

    def put(standing: Standing, asked: Options) -> Round:
        system = standing.system
        return measure(
            system, lambda: h2load(system.client, system.url + path, asked.seconds, "-m8", *options, clients=4)
        )

    return Question(
        name, first_line(doc), (shape,), ("origin", "netproxy", "netproxy-reference", *PROXIES, "nghttpx"), put
    )
