"""The documents: links lead somewhere, every verb is described, the README stays short."""

import re
from pathlib import Path

import pytest

from fastvlm.common.verbs import verbs

VERBS = verbs()
ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = re.compile(r"`(?:fastvlm|make) ([a-z][a-z-]+)")


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    if page.name == "LOG.md":  # tells what was
        pytest.skip("tells what was")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in NAMES.findall(page.read_text()) if name not in {*VERBS, *targets, "download"}] == []


def test_every_verb_is_described():
    text = (ROOT / "docs/COMMANDS.md").read_text()
    assert [name for name in VERBS if not re.search(rf"`{name}[ `]", text)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 6000
