"""Every test of this folder runs over each engine, of HTTP/1 and of HTTP/2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netproxy.codec import h1, h2


@pytest.fixture(autouse=True, scope="module", params=["reference", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    before = h1.engine(), h2.engine()
    h1.use(request.param)
    h2.use(request.param)
    yield request.param
    h1.use(before[0])
    h2.use(before[1])
