"""The task of ``lazypages demo``: run as a program, ``python demo_task.py FOLDER BYTES``, by any Python 3.11.

It fills its memory, says ``ready`` in FOLDER, waits for ``go``, then touches pages here and there and checks
every byte of its memory, and leaves what it saw in ``verdict``. Checkpointed while it waits, it never knows.
"""

from __future__ import annotations

import json
import mmap
import random
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PAGE_SIZE = 4096
TOUCHES = 5000
SEED = 20_231_123

_NUMBER = struct.Struct("<Q")


def contents(nr_pages: int) -> Iterator[bytes]:
    """What each page holds: its number, then bytes that no neighbour has in the same place."""
    noise = random.Random(SEED).randbytes(1 << 20)  # noqa: S311 - the same every time is the point
    length = PAGE_SIZE - _NUMBER.size
    for page in range(nr_pages):
        start = page * 2654435761 % (len(noise) - length)
        yield _NUMBER.pack(page) + noise[start : start + length]


def touch(memory: mmap.mmap, nr_pages: int) -> list[float]:
    """Seconds that the first touches of pages all over the memory took; what is read is checked later."""
    pages = random.Random(SEED + 1).sample(range(nr_pages), min(TOUCHES, nr_pages))  # noqa: S311
    seconds = []
    for page in pages:
        started = time.perf_counter()
        memory[page * PAGE_SIZE]
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    nr_pages = size // PAGE_SIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for content in contents(nr_pages):
        memory.write(content)
    (folder / "ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)

    awake = (
        time.time()
    )  # the one clock that is the same for whoever restores it, whatever time namespace this is
    touches = touch(memory, nr_pages)
    touched = time.time()
    memory.seek(0)
    wrong = [page for page, content in enumerate(contents(nr_pages)) if memory.read(PAGE_SIZE) != content]
    verdict = {
        "wrong": wrong,
        "touches": len(touches),
        "median_touch": touches[len(touches) // 2],
        "worst_touch": touches[-1],
        "awake": awake,
        "touched": touched,
        "checked": time.time(),
    }
    draft = folder / "draft"
    draft.write_text(json.dumps(verdict))
    draft.rename(folder / "verdict")


if __name__ == "__main__":
    main()
