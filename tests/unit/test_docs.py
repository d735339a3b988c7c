"""The pages in docs/ say what the code says, and lead to pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import pages
from netproxy.observe import metrics

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "ARCHITECTURE.md"]


@pytest.mark.parametrize(("path", "text"), pages.pages().items(), ids=lambda value: getattr(value, "name", ""))
def test_what_is_taken_from_the_code_is_up_to_date(path: Path, text: str) -> None:
    assert path.read_text() == text, "run make docs"


def test_every_part_stands_somewhere() -> None:
    text = "".join(path.read_text() for path in PAGES)
    for name in pages.PARTS:
        assert f"<!-- /{name} -->" in text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    headings = {}
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        if anchor:
            text = headings.setdefault(file, file.read_text())
            slugs = {
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in text.splitlines()
                if line.startswith("#")
            }
            assert anchor in slugs, f"{target}#{anchor}"


def test_every_metric_is_explained() -> None:
    source = Path(metrics.__file__).read_text()
    names = set(re.findall(r'"(netproxy_[a-z_0-9]+)"', source))
    assert names
    text = (ROOT / "docs" / "operating.md").read_text()
    missing = {name for name in names if name not in text}
    assert not missing
