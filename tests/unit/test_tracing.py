"""Traces without a kernel: the ring, and files that are none, or not whole."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.trace import Ring
from lazypages.observe.tracing import MAGIC, RECORD, REMOTE, ZERO, Kind, Trace, TraceError, Tracer, read_trace


def put(ring: Ring, number: int, thread: int = 0) -> bool:
    record = ffi.new("struct lp_trace_record *", {"addr": number, "task": thread, "kind": Kind.FAULT})
    return bool(lib.lp_trace_put(ring.handle, record))


def drained(ring: Ring, path: Path) -> list[tuple[int, int]]:
    """(kind, address, or pages where records were dropped) of what the ring had."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        assert lib.lp_trace_drain(ring.handle, fd) >= 0
    finally:
        os.close(fd)
    records = Trace(path, {}, memoryview(path.read_bytes()))
    return [(r.kind, r.pages if r.kind == Kind.DROPPED else r.addr) for r in records]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file with ten faults of task 7."""
    path = tmp_path / "trace"
    with Tracer(path, tmp_path, {7: ("local", "parent-1")}) as tracer:
        for number in range(10):
            assert put(tracer.ring, number, 7)
    return path


def test_a_ring_gives_back_what_was_put_in_order(tmp_path: Path) -> None:
    ring = Ring(8)
    for turn in range(5):  # round and round
        assert all(put(ring, 10 * turn + i) for i in range(7))
        assert drained(ring, tmp_path / "out") == [(Kind.FAULT, 10 * turn + i) for i in range(7)]
    assert drained(ring, tmp_path / "out") == []
    assert (ring.written, ring.dropped) == (35, 0)


def test_a_full_ring_drops_counts_and_says_so(tmp_path: Path) -> None:
    ring = Ring(4)
    assert [put(ring, i) for i in range(7)] == [True] * 4 + [False] * 3
    assert ring.dropped == 3
    assert drained(ring, tmp_path / "out") == [*((Kind.FAULT, i) for i in range(4)), (Kind.DROPPED, 3)]
    assert put(ring, 7)
    assert drained(ring, tmp_path / "out") == [(Kind.FAULT, 7)]  # said once


@pytest.mark.parametrize("size", [4, 1 << 12])
def test_threads_put_while_another_one_drains(size: int, tmp_path: Path) -> None:
    """Each thread's records come in its order, none twice; those that do not come are counted."""
    ring, threads, each = Ring(size), 3, 3000
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    drain = threading.Thread(target=lib.lp_trace_run, args=(ring.handle, fd))
    puts = [
        threading.Thread(target=lambda thread=thread: [put(ring, i, thread) for i in range(each)])
        for thread in range(threads)
    ]
    for thread in (drain, *puts):
        thread.start()
    for thread in puts:
        thread.join(60)
    lib.lp_trace_stop(ring.handle)
    drain.join(60)
    os.close(fd)
    records = list(Trace(tmp_path / "out", {}, memoryview((tmp_path / "out").read_bytes())))
    faults = [record for record in records if record.kind == Kind.FAULT]
    for thread_number in range(threads):
        numbers = [record.addr for record in faults if record.task == thread_number]
        assert numbers == sorted(set(numbers))
    assert len(faults) == ring.written
    assert ring.written + ring.dropped == threads * each
    assert records[-1].kind == Kind.END
    assert records[-1].pages == ring.dropped


def test_a_disk_that_is_full_ends_the_trace_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = Ring(8)
    assert put(ring, 1)
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        assert lib.lp_trace_drain(ring.handle, fd) == -errno.ENOSPC
    finally:
        os.close(fd)
    assert (ring.written, ring.dropped) == (0, 1)
    with pytest.raises(TraceError, match="No space left"):
        Tracer(Path("/dev/full"), tmp_path, {})


def test_a_trace_is_read_as_it_was_written(trace: Path) -> None:
    read = read_trace(trace)
    assert [record.addr for record in read if record.kind == Kind.FAULT] == list(range(10))
    assert read.complete
    assert read.dropped == 0
    assert [read.source_name(7, source) for source in (0, 1, REMOTE, ZERO, 9)] == [
        "local",
        "parent-1",
        "remote",
        "zero",
        "level 9",
    ]
    assert read.header["clock"] == "CLOCK_MONOTONIC"
    assert trace.stat().st_mode & 0o777 == 0o600


def test_what_a_daemon_that_died_has_left_is_read_up_to_there(trace: Path) -> None:
    whole = trace.read_bytes()
    trace.write_bytes(whole[: -RECORD.size - 5])  # in the middle of the last fault
    read = read_trace(trace)
    assert [record.addr for record in read] == list(range(9))
    assert not read.complete
    dropped = RECORD.pack(0, 0, 12, 0, 0, 0, Kind.DROPPED, 0, 0)
    trace.write_bytes(whole[: -RECORD.size] + dropped)
    assert read_trace(trace).dropped == 12


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "is not a trace"),
        (lambda data: b"\x7fELF" + data[4:], "is not a trace"),
        (lambda data: data[:5], "is not a trace"),
        (lambda data: data[:12], "cut short"),
        (lambda data: data[:100], "cut short"),
        (
            lambda data: MAGIC + struct.pack("<I", 2) + data[12:],
            "format 2; this lazypages reads format 1 only",
        ),
        (lambda data: data[:12] + b"\xff\xff\xff\xff" + data[16:], "cut short"),
        (lambda data: data[:16] + b"?" + data[17:], "damaged"),
        (lambda data: data.replace(b'"record_bytes": 48', b'"record_bytes": 47'), "damaged"),
        (lambda data: data.replace(b'"pid"', b'"dip"'), "damaged"),
    ],
)
def test_other_files_are_one_clear_error(damage, said: str, trace: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_bytes(damage(trace.read_bytes()))
    with pytest.raises(TraceError, match=said) as caught:
        read_trace(trace)
    assert str(trace) in str(caught.value)


def test_what_is_no_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)
