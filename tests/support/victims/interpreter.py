"""A Python interpreter with a busy heap: `interpreter.py interpreter DIRECTORY SEED`, like the victims in C.

Before the checkpoint it builds dictionaries, lists, big strings, a cyclic graph and raw buffers from the seed
and keeps running threads. After the go it builds everything once more and compares, from several threads,
with the garbage collector at work, and checks a mapping that nothing ever touched.
"""

import gc
import hashlib
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class Node:
    """A member of a cyclic graph: what the garbage collector walks over."""

    def __init__(self, number: int) -> None:
        self.number, self.label, self.next = number, f"node {number:08d}", self


def dictionaries(numbers: random.Random) -> object:
    return {f"key-{i}": {"i": i, "f": numbers.random(), "t": (i, str(i))} for i in range(15_000)}


def lists(numbers: random.Random) -> object:
    return [[numbers.getrandbits(64) for _ in range(200)] for _ in range(300)]


def strings(numbers: random.Random) -> object:
    return [numbers.randbytes(10_000).hex() for _ in range(300)]


def buffers(numbers: random.Random) -> object:
    return [bytearray(numbers.randbytes(100_000)) for _ in range(80)]


def graph(numbers: random.Random) -> list[Node]:
    nodes = [Node(i) for i in range(20_000)]
    targets = list(range(len(nodes)))
    numbers.shuffle(targets)
    for node, target in zip(nodes, targets, strict=True):
        node.next = nodes[target]
    return nodes


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def main() -> None:
    directory, seed = Path(sys.argv[2]), int(sys.argv[3])
    makers: list[Callable[[random.Random], object]] = [dictionaries, lists, strings, buffers]
    kept = [make(random.Random(seed + i)) for i, make in enumerate(makers)]
    nodes = graph(random.Random(seed))
    digests = [digest(value) for value in kept]
    untouched = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    waiting = threading.Barrier(len(makers) + 1)

    def say(name: str, data: int, wrong: list[str]) -> None:
        line = {"name": name, "pid": os.getpid(), "data": data, "zero": 0, "bad": len(wrong), "where": ""}
        with (directory / "verdict").open("a") as verdict:
            verdict.write(json.dumps(line | {"what": "; ".join(wrong)}) + "\n")

    def wait_go() -> None:
        while not (directory / "go").exists():
            time.sleep(0.002)

    def check(number: int) -> None:
        waiting.wait()
        wait_go()
        wrong = []
        if kept[number] != makers[number](random.Random(seed + number)):
            wrong.append("contents differ")
        gc.collect()
        if digest(kept[number]) != digests[number]:
            wrong.append("the digest differs")
        say(makers[number].__name__, len(repr(kept[number])) // 4096, wrong)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(len(makers))]
    for thread in threads:
        thread.start()
    waiting.wait()
    (directory / "ready").touch()
    wait_go()
    wrong = []
    gc.collect()
    fresh = graph(random.Random(seed))
    if [(node.number, node.label, node.next.number) for node in nodes] != [
        (node.number, node.label, node.next.number) for node in fresh
    ]:
        wrong.append("the graph differs")
    if untouched[:] != bytes(len(untouched)):
        wrong.append("a mapping that nobody touched is not zero")
    for thread in threads:
        thread.join()
    say("interpreter", len(nodes) // 32, wrong)


main()
