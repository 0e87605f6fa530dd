"""The messages of the resident daemon's socket. docs/daemon.md describes them. Pure.

A message is a JSON object on one line. Descriptors (SCM_RIGHTS) are sent with the line that names them, and belong to
the values ``{"fd": true}`` of the requests in the order in which they were sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lazypages.errors import LazyPagesError

#: Of the protocol. A new field or request does not change it; a changed meaning does.
VERSION = 1

#: Where the daemon listens if no other socket is named.
SOCKET = "/run/lazypages.socket"

#: Longest line in bytes that the daemon reads.
MAX_LINE = 1 << 20

#: Longest range of `first` in bytes.
LONGEST_RANGE = 1 << 40

#: Levels of log lines, as in the messages.
LEVELS = ("error", "warning", "info", "debug")


class RequestError(LazyPagesError):
    """A request that is refused. ``code``: as in the answer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _bad(message: str) -> RequestError:
    return RequestError("bad-request", message)


class Fd:
    """In a request: the next descriptor that the client has sent."""

    def __repr__(self) -> str:
        return "Fd()"


Place = str | Fd


class TlsNames(NamedTuple):
    """Files of TLS; as the options of `serve` with these names."""

    cacert: str | None
    cert: str
    key: str
    cacrl: str | None
    check_name: bool


class Serve(NamedTuple):
    """``sources``: URLs (lazypages.net.url), or a connected socket. ``protocol``: of page servers; None: detected.

    ``log``: level of the log lines that the client wants; None: none.
    """

    images: Place
    work: Place | None
    background: bool
    sources: Sequence[Place]
    protocol: str | None
    source_deadline: float | None
    tls: TlsNames | None
    trace: str | None
    log: str | None


class Status(NamedTuple):
    """``restore`` None: of all restores."""

    restore: int | None


class Complete(NamedTuple):
    restore: int


class Wait(NamedTuple):
    restore: int


class Stop(NamedTuple):
    """``now``: tasks that miss pages are killed, instead of completed."""

    restore: int
    now: bool


class Shutdown(NamedTuple):
    """``now``: as in Stop, for all restores."""

    now: bool


class First(NamedTuple):
    """Copy the pages of task ``pid`` in [start, end), current addresses in bytes, before all others."""

    restore: int
    pid: int
    start: int
    end: int


Command = Serve | Status | Complete | Wait | Stop | Shutdown | First


class Request(NamedTuple):
    """``id``: any JSON value, which comes back in the answers."""

    id: Any
    command: Command


class _Fields:
    """The fields of a JSON object; each is taken once, with its type. What is left over at the end is an error."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self._where = where

    def take(self, name: str, kind: type | tuple[type, ...], what: str, *default: Any) -> Any:
        if name not in self._values or (default and self._values[name] is None):
            self._values.pop(name, None)
            if default:
                return default[0]
            raise _bad(f'{self._where}: "{name}" is missing: {what}')
        value = self._values.pop(name)
        # bool is an int
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _bad(f'{self._where}: "{name}" must be {what}')
        return value

    def text(self, name: str, *default: str | None) -> Any:
        value = self.take(name, str, "a string", *default)
        if isinstance(value, str):
            _check_text(value, f'{self._where}: "{name}"')
        return value

    def path(self, name: str, *default: str | None) -> Any:
        value = self.text(name, *default)
        if value is not None and not value.startswith("/"):
            raise _bad(f'{self._where}: "{name}" must be an absolute path: {value!r}')
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.take(name, bool, "true or false", default))

    def number(self, name: str) -> int:
        value = self.take(name, int, "a whole number")
        if value < 0 or value >= 1 << 64:
            raise _bad(f'{self._where}: "{name}" is out of range')
        return int(value)

    def place(self, name: str, *default: None) -> Place | None:
        value = self._values.get(name)
        if isinstance(value, dict):
            return _fd(self._values.pop(name), f'{self._where}: "{name}"')
        path: str | None = self.path(name, *default)
        return path

    def finish(self) -> None:
        if self._values:
            raise _bad(f'{self._where}: unknown field "{next(iter(self._values))}"')


def _check_text(value: str, where: str) -> None:
    """Bytes of a file name that are not UTF-8 come as lone surrogates U+DC80 to U+DCFF (PEP 383)."""
    try:
        bad = b"\0" in os.fsencode(value)
    except UnicodeEncodeError:
        bad = True
    if bad:
        raise _bad(f"{where} has a character that a file name can't have")


def _fd(value: Any, where: str) -> Fd:
    if value != {"fd": True}:
        raise _bad(f'{where} must be a string, or {{"fd": true}}')
    return Fd()


def parse(line: bytes) -> Request:
    """The request on a line. Raises RequestError."""
    values = _object(line)
    if values is None:
        raise _bad("the line is not a JSON object in UTF-8")
    number = values.pop("id", None)
    name = values.pop("do", None)
    parser = _PARSERS.get(name) if isinstance(name, str) else None
    if parser is None:
        raise _bad(f'"do" must be one of: {", ".join(_PARSERS)}')
    fields = _Fields(values, name)
    command = parser(fields)
    fields.finish()
    return Request(number, command)


def id_of(line: bytes) -> Any:
    """The id of a request that parse() refuses, if it has one."""
    return (_object(line) or {}).get("id")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _no_number(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _serve(fields: _Fields) -> Serve:
    images = fields.place("images")
    assert images is not None
    sources: list[Place] = []
    for source in fields.take("sources", list, "a list of sources", []):
        if not isinstance(source, str | dict):
            raise _bad('serve: each of "sources" must be a string, or {"fd": true}')
        if isinstance(source, str):
            _check_text(source, 'serve: each of "sources"')
        sources.append(source if isinstance(source, str) else _fd(source, 'serve: each of "sources"'))
    work = fields.place("work", None)
    deadline = fields.take("source_deadline", (int, float), "seconds", None)
    if deadline is not None and not 0 < deadline < float("inf"):
        raise _bad('serve: "source_deadline" must be above 0')
    tls = fields.take("tls", dict, "an object", None)
    level = fields.text("log", None)
    if level is not None and level not in LEVELS:
        raise _bad(f'serve: "log" must be one of: {", ".join(LEVELS)}')
    return Serve(
        images,
        work,
        fields.flag("background", True),
        sources,
        fields.text("protocol", None),
        deadline,
        None if tls is None else _tls(tls),
        fields.path("trace", None),
        level,
    )


def _tls(values: Mapping[str, Any]) -> TlsNames:
    fields = _Fields(values, 'serve: "tls"')
    names = TlsNames(
        fields.path("cacert", None),
        fields.path("cert"),
        fields.path("key"),
        fields.path("cacrl", None),
        fields.flag("check_name", True),
    )
    fields.finish()
    return names


def _first(fields: _Fields) -> First:
    first = First(*(fields.number(name) for name in First._fields))
    if (first.start | first.end) & 0xFFF or not 0 < first.end - first.start <= LONGEST_RANGE:
        raise _bad('first: "start" and "end" must be page addresses, up to 1 TiB apart')
    return first


_PARSERS: dict[str, Callable[[_Fields], Command]] = {
    "serve": _serve,
    "status": lambda fields: Status(fields.take("restore", int, "a whole number", None)),
    "complete": lambda fields: Complete(fields.number("restore")),
    "wait": lambda fields: Wait(fields.number("restore")),
    "stop": lambda fields: Stop(fields.number("restore"), fields.flag("now", False)),
    "first": _first,
    "shutdown": lambda fields: Shutdown(fields.flag("now", False)),
}


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


def answer(number: Any, **fields: Any) -> dict[str, Any]:
    return {"id": number, "ok": True, **fields}


def refusal(number: Any, error: RequestError) -> dict[str, Any]:
    return {"id": number, "ok": False, "error": {"code": error.code, "message": str(error)}}


def log_line(number: Any, level: str, text: str) -> dict[str, Any]:
    return {"id": number, "log": {"level": level, "text": text}}


class Lines:
    """Splits a stream into lines. Raises RequestError for one that is too long; the rest of the stream is useless."""

    def __init__(self, longest: int = MAX_LINE) -> None:
        self._longest = longest
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their newline."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if any(len(line) > self._longest for line in (*lines, self._rest)):
            raise _bad(f"a line is longer than {self._longest} bytes")
        return [line for line in lines if line.strip()]
