"""Talking to iptables in the calling thread's current network namespace: its variants ``nft`` and ``legacy``.

Rules go through ``iptables-<variant>-restore --noflush``, which commits each table as a whole, and are read by
``iptables-<variant>-save``; IPv6 likewise by ip6tables. Five milliseconds a call.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

from redirect.errors import RedirectError
from redirect.netfilter import iptables
from redirect.wanted import Family, Mechanism, Table, Wanted

_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
_LOCK_S = 5
"""How long another user of the lock of legacy iptables is waited for."""
_TIMEOUT_S = 20.0
_COMMAND: dict[Family, str] = {4: "iptables", 6: "ip6tables"}


def host_variant() -> Mechanism:
    """What the host's own `iptables` is. Rules of the other one would not see those of Docker and the like."""
    path = shutil.which("iptables", path=_PATH)
    try:
        said = subprocess.run(
            [path or "iptables", "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return "iptables-legacy" if "legacy" in said else "iptables-nft"


class Variant:
    """One of the two, as a `Backend`."""

    def __init__(self, mechanism: Mechanism) -> None:
        self.mechanism = mechanism
        self._variant = mechanism.partition("-")[2]

    def tables(self, node: str) -> list[Table]:
        """This node's generations, with what they hold. Without the commands there are none."""
        found = iptables.read_listings(node, {family: self._save(family) for family in iptables.FAMILIES})
        return [
            Table(name, iptables.generation_of(name), None, listing, self.mechanism) for name, listing in found.items()
        ]

    def create(self, name: str, wanted: Wanted, _listeners: object = ()) -> int | None:
        """All of it or nothing."""
        if wanted.failure_policy == "open":
            raise RedirectError("iptables has no rules that go with their owner")
        made: list[Family] = []
        try:
            for family in iptables.FAMILIES:
                if text := iptables.create(name, wanted, family):
                    if iptables.delete(self._save(family), (name,)):
                        raise RedirectError(f"chains of {name} exist already (IPv{family})")
                    made.append(family)
                    self._restore(family, text)
        except RedirectError as exc:
            try:
                self._delete(made, (name,))
            except RedirectError as second:
                raise RedirectError(f"{exc}; not undone: {second}") from exc
            raise
        return None

    def delete(self, names: tuple[str, ...]) -> None:
        """One family after the other. RedirectError: some of it may still be there."""
        self._delete(iptables.FAMILIES, names)

    def saved(self) -> Iterator[tuple[str, str]]:
        """All rules, whoever's, by ``iptables`` and ``ip6tables``."""
        for family in iptables.FAMILIES:
            yield _COMMAND[family], self._save(family)

    def _delete(self, families: tuple[Family, ...] | list[Family], names: tuple[str, ...]) -> None:
        for family in families:
            if text := iptables.delete(self._save(family), names):
                self._restore(family, text)

    def _save(self, family: Family) -> str:
        path = self._path(family, "save")
        return self._call([path]) if path else ""

    def _restore(self, family: Family, text: str) -> None:
        path = self._path(family, "restore")
        if not path:
            raise RedirectError(f"{_COMMAND[family]}-{self._variant}-restore is not installed (Debian: iptables)")
        self._call([path, "--noflush", "--wait", str(_LOCK_S)], text)

    def _path(self, family: Family, verb: str) -> str | None:
        return shutil.which(f"{_COMMAND[family]}-{self._variant}-{verb}", path=_PATH)

    def _call(self, command: list[str], text: str = "") -> str:
        name = os.path.basename(command[0])
        try:
            done = subprocess.run(
                command,
                input=text,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",  # comments in rules of others are any octets
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise RedirectError(f"{name}: {exc}") from exc
        if done.returncode != 0:
            said = (
                " ".join(done.stderr.encode(errors="replace").decode().split()) or f"it failed with {done.returncode}"
            )
            raise RedirectError(f"{name}: {_line(said, text)}")
        return done.stdout


def _line(said: str, text: str) -> str:
    """With the line of the input that is meant, when one is."""
    number = next((int(found) for found in re.findall(r"line:? (\d+)", said)), 0)
    lines = text.splitlines()
    return f"{said} [{lines[number - 1]}]" if 0 < number <= len(lines) else said
