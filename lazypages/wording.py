"""Numbers as text, the same in every message."""

from __future__ import annotations


def count(number: int, noun: str, plural: str = "") -> str:
    """1 page, 2,000 pages. ``plural``: where it is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size(nr_bytes: float) -> str:
    """Bytes in binary units: 256.0 MiB."""
    if nr_bytes < 1024:
        return f"{nr_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nr_bytes /= 1024
        if nr_bytes < 1023.95:
            return f"{nr_bytes:.1f} {unit}"
    return f"{nr_bytes / 1024:.1f} TiB"


def duration(nanoseconds: float) -> str:
    """A time with three digits: 9.70 us, 120 us, 1.05 ms, 2.50 s."""
    for unit, scale in (("ns", 1), ("us", 1e3), ("ms", 1e6)):
        value = nanoseconds / scale
        if value < 999.5:
            return f"{value:.3g} {unit}" if unit == "ns" else f"{_three_digits(value)} {unit}"
    seconds = nanoseconds / 1e9
    return f"{_three_digits(seconds)} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def printable(name: bytes) -> str:
    """A name that is safe to print: control characters and undecodable bytes are escaped."""
    text = name.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
