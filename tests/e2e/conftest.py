"""Stages with whole agents, for the end-to-end tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mesh import Mesh

_numbers = itertools.count()


@pytest.fixture
def mesh_of(tmp_path: Path) -> Iterator[Callable[..., Mesh]]:
    """Makes meshes (see `Mesh` for the arguments) that are gone after the test."""
    made: list[Mesh] = []

    def make(**options: object) -> Mesh:
        mesh = Mesh(f"e{os.getpid() % 100000}{next(_numbers)}", tmp_path / f"m{len(made)}", **options)  # type: ignore[arg-type]
        made.append(mesh)
        return mesh

    try:
        yield make
    finally:
        for mesh in made:
            mesh.close()
