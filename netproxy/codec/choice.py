"""Which engine speaks a protocol in this process: the native one where it was compiled, unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

Server = TypeVar("Server")
Client = TypeVar("Client")
Limits = TypeVar("Limits")


class Kind(NamedTuple, Generic[Server, Client, Limits]):
    """One engine, as what makes its two sides. Limits None: the usual ones."""

    server: Callable[[Limits | None], Server]
    client: Callable[[Limits | None], Client]


class EngineChoice(Generic[Server, Client, Limits]):
    """The engines that there are for `protocol`, and the one in use. `native` is None where it was not compiled."""

    def __init__(
        self,
        protocol: str,
        *,
        native: Kind[Server, Client, Limits] | None,
        reference: Kind[Server, Client, Limits],
    ) -> None:
        self._protocol = protocol
        self._kinds = {"reference": reference} if native is None else {"native": native, "reference": reference}
        self._engine = self.names[0]

    def __repr__(self) -> str:
        return f"<EngineChoice {self._protocol}: {self._engine} of {', '.join(self.names)}>"

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are, the preferred one first."""
        return tuple(self._kinds)

    def engine(self) -> str:
        """Which one is in use."""
        return self._engine

    def chosen(self, wanted: str) -> str:
        """The engine that this means: ``auto``, or one of `names`. ValueError when there is no such engine."""
        name = self.names[0] if wanted == "auto" else wanted
        if name not in self._kinds:
            raise ValueError(f"no {self._protocol} engine {str(name)!r} here, there is: {', '.join(self.names)}")
        return name

    def use(self, wanted: str) -> None:
        """Every engine that is made from now on is of this kind, see `chosen`."""
        self._engine = self.chosen(wanted)

    def server(self, limits: Limits | None = None) -> Server:
        return self._kinds[self._engine].server(limits)

    def client(self, limits: Limits | None = None) -> Client:
        return self._kinds[self._engine].client(limits)
