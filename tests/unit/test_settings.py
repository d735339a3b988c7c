from __future__ import annotations

import dataclasses

import pytest

from netproxy.settings import NodeSettings

SETTINGS = NodeSettings("node-a", "/etc/mesh", "/run/netproxy/node-a", "/var/lib/netproxy/node-a", "/ca", workers=3)


def test_they_travel_as_json() -> None:
    changed = dataclasses.replace(SETTINGS, drain_s=1.5, mark=7, metrics_address="::")
    assert NodeSettings.from_json(changed.to_json()) == changed


def test_unknown_ones_are_refused() -> None:
    with pytest.raises(TypeError):
        NodeSettings.from_json('{"node": "a", "nonsense": 1}')


def test_paths_lie_in_the_run_folder() -> None:
    paths = {SETTINGS.admin_socket, SETTINGS.journal, SETTINGS.pid_file}
    assert len(paths) == 3
    assert all(path.startswith("/run/netproxy/node-a/") for path in paths)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.node = "other"  # type: ignore[misc]


def test_ports_as_documented() -> None:
    assert (SETTINGS.outbound_port, SETTINGS.inbound_port) == (15001, 15006)
    assert (SETTINGS.admin_port, SETTINGS.metrics_port, SETTINGS.mark) == (15000, 15020, 0x539)
