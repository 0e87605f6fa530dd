"""Writes tests/fuzz/corpus: what each target begins with, from golden vectors and from what we write ourselves.

``python -m tests.fuzz.seeds``, after a change of what is fuzzed. Inputs that broke something are there, too: crash-*.
"""

from __future__ import annotations

import os
import signal
import struct
import tomllib
from pathlib import Path

import images_spec
from images_spec.placement import Span
from lazypages.net.wire import Command, Header, Layout
from lazypages.restore.plan import NONE, TAKE_EAGER, FillRange, Plan

CORPUS = Path(__file__).parent / "corpus"
GOLDEN = Path(images_spec.__file__).parent / "golden"


def pagemaps() -> dict[str, bytes]:
    """Those among the golden vectors."""
    found = {}
    for path in sorted(GOLDEN.glob("*.toml")):
        vector = tomllib.loads(path.read_text())
        if vector["kind"] == "PAGEMAP":
            parts = [vector["magics"], *(item["hex"] for item in vector["message"])]
            found[path.stem] = bytes.fromhex("".join(parts))
    return found


def chains() -> dict[str, bytes]:
    """See placement.c."""
    lazy = bytes([1 | 2 << 1, 4, 0, 3, 6, 1, 1, 1, 0, 0, 2, 3, 3, 2, 0, 3, 4, 2, 3, 6, 1, 0, 3, 4])
    return {"empty": bytes(2), "lazy": lazy + bytes([1, 0, 3, 4, 2, 1, 2, 3, 1])}


def clients() -> dict[str, bytes]:
    """See pageserver.c."""
    found = {}
    for number, layout in enumerate((Layout.CRIU_4_2, Layout.CRIU_4_1)):
        requests = [(0x10000, 2), (0x10000, 8), (0x13000, 1), (0x1A000, 1), (0x1C000, 4), (0x30000, 1)]
        packed = [layout.pack(Header(Command.GET, nr, vaddr, 7)) for vaddr, nr in requests]
        for options in (0, 2, 4, 6):
            for piece in (0, 13):
                head = bytes([options | number, piece])
                found[f"gets-{options | number}-{piece}"] = head + b"".join(packed[: 6 if options else 3])
        found[f"other-{number}"] = bytes([number, 0]) + layout.pack(Header(Command.CLOSE, 0, 0, 0))
    return found


def servers() -> dict[str, bytes]:
    """See channel.c; the steps: 0 fault, 1 ask, 3 answer, 4 busy, 5 turn, 6 hold, 7 take, 8 finish, 9 hang up."""
    return {
        "plain": bytes([0, 0, 2, 3, 3, 0, 8, 7, 0, 40, 1, 3, 1, 8, 7]),
        "short": bytes([1, 0, 2, 7, 3, 0, 2, 3, 0, 8, 7, 9]),
        "background": bytes([8, 5, 30, 3, 0, 32, 3, 0, 32, 3, 0, 32, 7]),
        "busy": bytes([4, 4, 0, 2, 3, 3, 0, 8, 4, 7, 0, 1, 2, 3, 1, 2, 7]),
        "held": bytes([0, 1, 2, 3, 6, 1, 3, 0, 8, 7, 6, 0, 8, 2, 4, 0, 0, 0, 0, 7]),
        "lies": bytes([0, 0, 2, 3, 3, 8, 32, 7]),
    }


def plans() -> dict[str, bytes]:
    """Two, with every kind of op in one of them; the answers that follow say that all went well."""
    plan = Plan(0x10000)
    root = plan.spawn(NONE, 100, 0, "make the root")
    helper = plan.spawn(root, 101, 0, "make a helper")
    thread = plan.spawn(root, 102, 0x00010000, "make a thread")
    file = plan.open(b"/pages-1.img", os.O_RDONLY, 4096, "open pages")
    plan.pipe(65536, b"contents", "make a pipe")
    plan.reopen(file, os.O_RDONLY, "open it again")
    shared = plan.shared(8192, "map shared memory")
    extents = struct.pack("<QQQII", 0, 2, 0, 0, 0)
    plan.fill(NONE, [file], [FillRange(0, 8192, TAKE_EAGER)], extents=extents, shared=shared, label="fill it")
    plan.write("/proc/sys/x", os.O_WRONLY, "text", "write")
    plan.call(root, "a call", 39, 1, 2, data=b"12345678", exact=None)
    plan.give(root, file, 3, cloexec=True, label="give")
    plan.switch(root, [(0x7FFF00000000, 0x4000), (0x7FFF00004000, 0x2000)])
    extents = struct.pack("<QQQII", 0x400000, 2, 0, 0, 0)
    plan.fill(root, [file, NONE], [FillRange(0x400000, 0x402000, TAKE_EAGER)], extents=extents, label="fill")
    plan.reap(root, helper)
    plan.drain(root)
    for each in (root, thread):
        plan.regs(
            each,
            bytes(216),
            blocked=0,
            stop=False,
            xstate_bv=7,
            fxsave=bytes(512),
            components=[(2, bytes(256))],
        )
    plan.uffd(root, 100, [Span(0x400000, 0x402000)])
    plan.announce(7)
    plan.finish()
    plan.close(file)
    plan.go()
    plan.wait(root)
    dead = Plan(0x10000)
    ends = [dead.spawn(NONE, 100 + n, 0, "make a process") for n in range(2)]
    dead.exit(ends[0], 3 << 8)
    dead.exit(ends[1], signal.SIGKILL)
    dead.go()
    return {
        name: made.encode(parking=0x10000, link_fd=1000, control_fd=9) + bytes(200)
        for name, made in (("all", plan), ("dead", dead))
    }


def main() -> None:
    targets = {
        "pagemap": pagemaps(),
        "placement": chains(),
        "pageserver": clients(),
        "channel": servers(),
        "plan": plans(),
    }
    for target, seeds in targets.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
