"""No command in README.md and docs/ is there that no test executes; no link leads nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

import click
import pytest

from dumptool.cli import cli as dumptool
from lazypages.cli.main import COMMANDS
from lazypages.cli.main import cli as lazypages
from tests.support.docs import EXECUTED_BY, NOT_EXECUTED, ROOT, Block, all_blocks, pages

DOCUMENTS = [*pages(), "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "images_spec/README.md"]

#: Options that the documents name and that are of other programs.
OF_OTHERS = {
    "criu": {"--action-script", "--feature", "--freeze-cgroup"},
    "pip": {"--force-reinstall", "--no-deps"},
    "podman": {"--export", "--format", "--import", "--rootfs", "--runtime", "--ulimit"},
    "runc": {"--work-path"},
    "systemctl": {"--kill-who", "--kill-whom"},
    "unshare": {"--fork", "--ipc", "--kill-child", "--mount-proc"},
}


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


def options(command: click.Command, context: click.Context) -> set[str]:
    """All options of a command and of those below it."""
    found = {"--help"}.union(*(param.opts for param in command.params))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= options(below, context)
    return found


def test_every_option_that_is_named_exists() -> None:
    ours = set().union(*(options(cli, click.Context(cli)) for cli in (lazypages, dumptool)))
    foreign = set().union(*OF_OTHERS.values())
    named: dict[str, str] = {}
    for page in DOCUMENTS:
        text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            named |= dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code), f"{page}: {code}")
    wrong = {option: where for option, where in named.items() if option not in ours | foreign}
    assert not wrong, f"options that no command has, or that OF_OTHERS lacks: {wrong}"
    assert foreign <= named.keys(), "OF_OTHERS is stale"


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"lazypages {name}" in text, name
