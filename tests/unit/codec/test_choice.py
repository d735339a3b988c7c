"""Which engine is used: what there is, what is asked for."""

from __future__ import annotations

import enum

import pytest

from netproxy.codec import h1, h2
from netproxy.codec.choice import EngineChoice, Kind
from netproxy.codec.h1_native import H1NativeClient, H1NativeServer
from netproxy.codec.h1_reference import H1ReferenceClient, H1ReferenceServer
from netproxy.codec.h2_native import H2NativeClient, H2NativeServer
from netproxy.codec.h2_reference import H2ReferenceClient, H2ReferenceServer

NATIVE: Kind[str, str, int] = Kind(lambda limits: f"native server {limits}", lambda limits: f"native client {limits}")
REFERENCE: Kind[str, str, int] = Kind(lambda limits: f"server {limits}", lambda limits: f"client {limits}")


def test_the_native_one_is_preferred() -> None:
    choice = EngineChoice("HTTP/7", native=NATIVE, reference=REFERENCE)
    assert choice.names == ("native", "reference")
    assert (choice.engine(), choice.server(1), choice.client()) == ("native", "native server 1", "native client None")
    choice.use("reference")
    assert (choice.engine(), choice.server(1), choice.client()) == ("reference", "server 1", "client None")
    assert choice.chosen("auto") == "native" and choice.engine() == "reference"
    choice.use("auto")
    assert choice.engine() == "native"


def test_where_it_was_not_compiled() -> None:
    choice = EngineChoice("HTTP/7", native=None, reference=REFERENCE)
    assert choice.names == ("reference",)
    assert (choice.engine(), choice.chosen("auto"), choice.server()) == ("reference", "reference", "server None")
    with pytest.raises(ValueError, match="no HTTP/7 engine 'native' here, there is: reference"):
        choice.use("native")
    assert choice.engine() == "reference"


def test_what_is_made_is_of_the_engine_in_use(engine: str) -> None:
    """Of both protocols: the rest of this folder counts on it."""
    made = [h1.server_engine(), h1.client_engine(), h2.server_engine(), h2.client_engine()]
    assert [type(one) for one in made] == {
        "native": [H1NativeServer, H1NativeClient, H2NativeServer, H2NativeClient],
        "reference": [H1ReferenceServer, H1ReferenceClient, H2ReferenceServer, H2ReferenceClient],
    }[engine]


def test_what_is_wanted_is_called_by_its_name() -> None:
    class Option(enum.StrEnum):
        native = "native"

    choice = EngineChoice("HTTP/7", native=None, reference=REFERENCE)
    with pytest.raises(ValueError, match="no HTTP/7 engine 'native' here"):
        choice.chosen(Option.native)
