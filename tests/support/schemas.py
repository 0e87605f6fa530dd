"""The schemas of docs/schemas, for what programs write and read."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"

_SCHEMAS: dict[str, Any] = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
_REGISTRY = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in _SCHEMAS.items()
)


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """`name`: of the file, with #/$defs/... for a part of it."""
    Draft202012Validator.check_schema(_SCHEMAS[name.partition("#")[0]])
    return Draft202012Validator({"$ref": name}, registry=_REGISTRY)


def check(name: str, value: Any) -> None:
    validator(name).validate(value)
