"""Each message that docs/troubleshooting.md quotes is in the source, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.docs import ROOT

PAGE = "docs/troubleshooting.md"
#: A part of a message that differs: `<...>` on the page, a field of a format in the source.
FIELD = "\0"
#: Names that are constants where a message uses them.
CONSTANTS = {"NEWER": "images_spec/unknown.py"}


def quoted() -> list[str]:
    """The messages of the page: its indented lines."""
    return re.findall(r"^    (\S.*)$", (ROOT / PAGE).read_text(), re.MULTILINE)


def in_source() -> Iterator[str]:
    """All texts of the Python code, with FIELD where something is filled in."""
    constants = {
        name: next(
            node.value.value
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == name
            and isinstance(node.value, ast.Constant)
        )
        for name, path in CONSTANTS.items()
    }
    for package in ("lazypages", "dumptool", "images_spec"):
        for path in sorted((ROOT / package).rglob("*.py")):
            generated = path.name.endswith("_pb2.py")
            for node in ast.walk(ast.parse("" if generated else path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(_part(part, constants) for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[-#0-9.]*[sdfxr]", FIELD, node.value)


def _part(part: ast.expr, constants: dict[str, object]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    name = part.value.id if isinstance(part.value, ast.Name) else ""
    return str(constants.get(name, FIELD))


@pytest.fixture(scope="module")
def source() -> str:
    return "\n".join(re.sub(f"{FIELD}+", FIELD, text) for text in in_source())


@pytest.mark.parametrize("message", quoted())
def test_a_message_is_in_the_source(message: str, source: str) -> None:
    """Also without the fields at its ends, which another part of the code may fill in front of it."""
    text = re.sub(f"{FIELD}+", FIELD, re.sub(r"<[^<>]*>", FIELD, message))
    # what is before the first ": " may be put there by whoever reports it: the path of an image, a client
    forms = {text, text.removeprefix(f"{FIELD}: "), re.sub(f"^{FIELD}/lazy-pages.socket", FIELD, text)}
    assert any(form in source for form in forms), f"{PAGE} quotes what no code says: {message}"
