"""The messages of the resident daemon."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.resident.protocol import (
    MAX_LINE,
    Complete,
    Fd,
    First,
    Lines,
    RequestError,
    Serve,
    Shutdown,
    Status,
    Stop,
    TlsNames,
    Wait,
    encode,
    id_of,
    parse,
)


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_serve() -> None:
    request = parse(line(id="x", do="serve", images="/a"))
    assert request.id == "x"
    assert request.command == Serve("/a", None, True, [], None, None, None, None, None)


def test_serve_with_everything() -> None:
    tls = {"cert": "/c", "key": "/k", "cacert": None, "check_name": False}
    command = parse(
        line(
            do="serve",
            images={"fd": True},
            work="/w",
            background=False,
            sources=["tcp://h:1", {"fd": True}],
            protocol="criu-4.2",
            source_deadline=2.5,
            tls=tls,
            trace="/t",
            log="info",
        )
    ).command
    assert isinstance(command, Serve)
    assert isinstance(command.images, Fd)
    assert command.sources[0] == "tcp://h:1"
    assert isinstance(command.sources[1], Fd)
    assert command._replace(images="", sources=[]) == Serve(
        "", "/w", False, [], "criu-4.2", 2.5, TlsNames(None, "/c", "/k", None, False), "/t", "info"
    )


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        ({"do": "status"}, Status(None)),
        ({"do": "status", "restore": 3}, Status(3)),
        ({"do": "complete", "restore": 3}, Complete(3)),
        ({"do": "wait", "restore": 3}, Wait(3)),
        ({"do": "stop", "restore": 3}, Stop(3, False)),
        ({"do": "stop", "restore": 3, "now": True}, Stop(3, True)),
        ({"do": "shutdown"}, Shutdown(False)),
        ({"do": "first", "restore": 3, "pid": 7, "start": 4096, "end": 8192}, First(3, 7, 4096, 8192)),
    ],
)
def test_commands(fields: dict[str, Any], command: object) -> None:
    assert parse(line(**fields)).command == command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"do": "status", "id": NaN}', "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (line(), '"do" must be one of: serve, status'),
        (line(do=["serve"]), '"do" must be one of'),
        (line(do="serve"), 'serve: "images" is missing'),
        (line(do="serve", images="a"), "must be an absolute path: 'a'"),
        (line(do="serve", images="/a\0"), "a character that a file name can't have"),
        (line(do="serve", images="/a\ud800"), "a character that a file name can't have"),
        (line(do="serve", images={"fd": 3}), '{"fd": true}'),
        (line(do="serve", images="/a", sources=[1]), 'each of "sources"'),
        (line(do="serve", images="/a", sources="tcp://h:1"), "a list of sources"),
        (line(do="serve", images="/a", background=1), "true or false"),
        (line(do="serve", images="/a", source_deadline=0), "above 0"),
        (line(do="serve", images="/a", log="loud"), '"log" must be one of'),
        (line(do="serve", images="/a", tls={}), '"cert" is missing'),
        (line(do="serve", images="/a", colour="red"), 'unknown field "colour"'),
        (line(do="wait"), '"restore" is missing'),
        (line(do="wait", restore=True), "must be a whole number"),
        (line(do="wait", restore=-1), "out of range"),
        (line(do="first", restore=1, pid=1, start=1, end=4096), "page addresses"),
        (line(do="first", restore=1, pid=1, start=8192, end=4096), "page addresses"),
        (line(do="first", restore=1, pid=1, start=0, end=1 << 50), "page addresses"),
    ],
)
def test_refused(text: bytes, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(text)
    assert message in str(refused.value)
    assert refused.value.code == "bad-request"
    assert "\n" not in str(refused.value)


def test_names_that_are_not_utf8() -> None:
    command = parse(line(do="serve", images="/\udcff")).command
    assert isinstance(command, Serve)
    assert command.images == "/\udcff"


def test_id_of_a_refused_request() -> None:
    assert id_of(b'{"id": [1], "do": "x"}') == [1]
    assert id_of(b"nonsense") is None


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        parse(data)
    except RequestError as error:
        encode({"id": id_of(data), "error": str(error)})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["do", "id", "images", "work", "sources", "tls", "restore", "now", "pid", "start", "end", "log"]
DOS = st.sampled_from(["serve", "status", "wait", "stop", "first", "shutdown", "complete"])


@given(st.dictionaries(st.sampled_from(NAMES), JSON), DOS)
def test_any_objects(fields: dict[str, Any], do: str) -> None:
    """Are understood, or refused."""
    with suppress(RequestError):
        parse(line(**fields | {"do": do}))


@given(
    st.lists(st.binary(max_size=20).filter(lambda text: b"\n" not in text and text.strip())),
    st.integers(1, 7),
)
def test_lines(texts: list[bytes], size: int) -> None:
    """The same lines, however the stream was cut."""
    stream = b"".join(text + b"\n" for text in texts) + b"rest"
    lines = Lines()
    found = [text for at in range(0, len(stream), size) for text in lines.feed(stream[at : at + size])]
    assert found == texts


def test_long_line() -> None:
    lines = Lines()
    assert lines.feed(b"x" * MAX_LINE) == []
    with pytest.raises(RequestError, match="longer than"):
        lines.feed(b"x")
