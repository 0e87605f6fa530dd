"""The schemas of docs/schemas agree with the daemon about requests, and are strict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.resident.protocol import _PARSERS, RequestError, parse
from tests.support.schemas import FOLDER, validator
from tests.unit.reports import pages, report, summary, times

FIELDS = ("images", "work", "background", "sources", "protocol", "source_deadline", "tls", "trace", "log")
FIELDS += ("restore", "now", "pid", "start", "end", "other")

WORDS = (None, True, False, -1, 3, 4096, 8192, 1 << 64, "", "/a", "a", "info", [], [3], {}, {"fd": 3})
SOURCES = ({"fd": True}, ["tcp://h:1", {"fd": True}])
TLS = ({"cert": "/c", "key": "/k"}, {"cert": "/c", "key": "/k", "check_name": False})
VALUES = st.sampled_from([*WORDS, *SOURCES, *TLS])


def is_accepted(request: dict[str, Any]) -> bool:
    try:
        parse(json.dumps(request).encode())
    except RequestError as error:
        # a rule about two fields, which a schema can't have
        return "1 TiB" in str(error) and (request["start"] | request["end"]) % 4096 == 0
    return True


@given(
    st.sampled_from([*_PARSERS, "other"]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    st.booleans(),
)
def test_the_schema_allows_what_the_daemon_accepts(do: str, fields: dict[str, Any], with_all: bool) -> None:
    request = {"do": do, **fields}
    if with_all:  # else hardly any would be accepted
        request = {"images": "/a"} | request if do == "serve" else {"restore": 3} | request
        request = {"pid": 3, "start": 4096, "end": 8192} | request if do == "first" else request
        if do in {"shutdown", "other"}:
            del request["restore"]
    assert validator("daemon-request.json").is_valid(request) == is_accepted(request)


def test_all_requests_have_a_schema() -> None:
    schema = json.loads((FOLDER / "daemon-request.json").read_text())
    assert {part["$ref"].rpartition("/")[2] for part in schema["oneOf"]} == set(_PARSERS)


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(inner)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.json")))
def test_no_object_may_have_another_field(name: str) -> None:
    for schema in objects(json.loads((FOLDER / name).read_text())):
        if schema.get("type") == "object":
            assert schema["additionalProperties"] is False, schema


def test_a_new_field_needs_a_schema() -> None:
    """In whatever object of the statistics it is."""
    stats = validator("stats.json")
    task = report(
        sources=("local", "parent-1"), copied=pages((5, 1), remote=2), times=times({3: 1}), zero_faults=1
    )
    whole = summary(task).as_dict()
    stats.validate(whole)
    for inner in objects(whole):
        inner["new"] = 1
        assert not stats.is_valid(whole), inner
        del inner["new"]
    stats.validate(whole)
