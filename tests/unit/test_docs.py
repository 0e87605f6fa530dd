"""No command in README.md and docs/ is there that no test executes; no link leads nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

import pytest

from tests.support.docs import EXECUTED_BY, NOT_EXECUTED, ROOT, Block, all_blocks, pages

DOCUMENTS = [*pages(), "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "images_spec/README.md"]


def to_execute(page: str) -> list[Block]:
    return [block for block in all_blocks(page) if (page, block.first) not in NOT_EXECUTED]


@pytest.mark.parametrize("page", pages())
def test_a_test_executes_every_block(page: str) -> None:
    """That test names the sections, takes their blocks by `tests.support.docs.blocks`, and counts them."""
    for block in to_execute(page):
        if page not in EXECUTED_BY:
            pytest.fail(
                f"{block}: no test executes it. Write one that takes the commands of the page with "
                "tests.support.docs.blocks, and add a line to EXECUTED_BY there; or add the block to NOT_EXECUTED, "
                "with a reason",
                pytrace=False,
            )
        test = EXECUTED_BY[page]
        if f'"{block.section}"' not in (ROOT / test).read_text():
            pytest.fail(f"{block}: {test} executes this page, but does not name this section", pytrace=False)


def test_the_tables_are_not_stale() -> None:
    for page, test in EXECUTED_BY.items():
        assert to_execute(page), f"EXECUTED_BY: {page} has no blocks"
        assert (ROOT / test).exists(), test
        assert page in (ROOT / test).read_text(), f"{test} does not name {page}"
    for (page, first), reason in NOT_EXECUTED.items():
        assert [block.first for block in all_blocks(page)].count(first) == 1, f"NOT_EXECUTED: {page}: {first}"
        assert reason


def links(page: str) -> Iterator[tuple[str, str]]:
    """Files and sections of this repository that a page leads to."""
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """Of its titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_no_link_leads_nowhere(page: str) -> None:
    for path, anchor in links(page):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{page}: {path}#{anchor}"


def test_public_names_exist() -> None:
    """Those that docs/images_spec.md says are public."""
    text = (ROOT / "docs" / "images_spec.md").read_text()
    rows = re.findall(r"^\| `(images_spec\.\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(import_module(module), name), f"{module}.{name}"
