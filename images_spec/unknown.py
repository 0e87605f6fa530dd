"""Rejects unknown fields of images that may change the meaning of known ones (images_spec/unknown.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.message import Message

from images_spec.errors import ImageError

NEWER = "which this lazypages does not know: written by a newer CRIU?"


def refuse_unknown_fields(messages: Iterable[Message], path: Path) -> None:
    """Raises ``ImageError`` if one of the messages, of the image at ``path``, has a field that its .proto lacks."""
    for message in messages:
        if has_unknown_fields(message):
            name, number = next(_unknown_fields(message, message.DESCRIPTOR.name))
            raise ImageError(path, f"{name} has field {number}, {NEWER}")


def has_unknown_fields(message: Message) -> bool:
    """A fast check of the whole message: an mm image may have 65,530 mappings (vm.max_map_count)."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return known.ByteSize() != message.ByteSize()


def _unknown_fields(message: Message, name: str) -> Iterator[tuple[str, int]]:
    from google.protobuf.unknown_fields import UnknownFieldSet  # noqa: PLC0415 - rarely needed

    for field in UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield name, field.field_number
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _unknown_fields(part, f"{name}.{descriptor.name}")
