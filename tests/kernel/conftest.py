"""Hooks of eBPF that the tests of steering share: loading them takes longer than a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redirect.bpf import clean
from redirect.bpf.bpffs import nodes
from redirect.ebpf import ENTRIES


@pytest.fixture(scope="package", autouse=True)
def no_hooks_left() -> Iterator[None]:
    before = set(nodes())
    yield
    for node in set(nodes()) - before:
        ENTRIES.release(node)
        clean(node)
