"""That the measurements can be started; what they measure, nobody judges here."""

from __future__ import annotations

import importlib

import pytest

from bench.__main__ import names


def test_what_there_is_to_measure() -> None:
    assert "access_log" in names()
    assert not any(name.startswith("_") for name in names())


@pytest.mark.parametrize("name", names())
def test_each_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{name}").main(["--help"])
    assert ended.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out
