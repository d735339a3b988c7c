"""Every test of this folder runs over each HTTP/1 engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netproxy.codec import h1


@pytest.fixture(autouse=True, scope="module", params=["reference", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    before = h1.engine()
    h1.use(request.param)
    yield request.param
    h1.use(before)
