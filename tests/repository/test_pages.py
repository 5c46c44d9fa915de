"""Every page of docs/: its blocks run, its links lead somewhere, its names exist."""

import functools
import re

import pytest

import muonclip_jax as mc
from tests.support.by_day import by_day
from tests.support.pages import BLOCK, ROOT, run_page

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# The code of the guides runs at night, and before a change lands.
BY_DAY = [page for page in PAGES if not page.startswith("guides/")]

every_page = pytest.mark.parametrize("page", PAGES)


@pytest.mark.parametrize("page", by_day(PAGES, *BY_DAY))
def test_blocks_run_and_print_what_the_page_shows(page):
    text = (DOCS / page).read_text()
    assert len(BLOCK.findall(text)) == text.count("```python")
    run_page(page)


@every_page
def test_links_lead_somewhere(page):
    path = DOCS / page
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text()):
        if target.startswith("https://"):
            continue
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked.read_text()), f"{target}#{anchor}"


def _anchors(text):
    """The heads of a page as GitHub makes them anchors."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_names_exist(page):
    text = (DOCS / page).read_text()
    for name in set(re.findall(r"\bmc\.(\w+(?:\.\w+)?)", text)):
        functools.reduce(getattr, name.split("."), mc)
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in set(re.findall(r"\btest_\w+(?:\.py)?", text)):
        is_file = name.endswith(".py")
        found = [*(ROOT / "tests").rglob(name)] if is_file else f"def {name}(" in tests
        assert found, name
    for name in set(re.findall(r"(?<!tests/)\bbenchmarks/[\w/.-]+\w", text)):
        assert (ROOT / name).exists(), name


# --- qk_clip.md -----------------------------------------------------------------------------------
