"""A tree of processes that grows: `family.py SOCKET MIB`.

Requests and answers are those of service.py, and all processes of the tree take part. `fork`: each of them has a child
more, which shares its memory until one of both writes.
"""

from __future__ import annotations

import os
import socket
import sys

from service import Memory

WRITTEN = 2
"""MiB that each process writes at a time."""


class Member:
    """One process; ``children``: sockets to those that it has had."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.children = memory, []

    def do(self, request: bytes) -> bool:
        """Returns whether all went right, here and below."""
        told = [_ask(child, request) for child in self.children]
        if request == b"fork":
            self._fork()
        elif request == b"write":
            self._write()
        elif request == b"check":
            return all(told) and all(map(self.memory.is_right, range(len(self.memory))))
        return all(told)

    def _write(self) -> None:
        for number in self.memory.write(WRITTEN):
            self.memory.fill(number)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            self.children.append(ours)
            return
        ours.close()
        for child in self.children:
            child.close()
        self.children = []
        self._write()
        while request := theirs.recv(100):
            theirs.sendall(b"1" if self.do(request) else b"0")
        os._exit(0)


def _ask(child: socket.socket, request: bytes) -> bool:
    child.sendall(request)
    return child.recv(1) == b"1"


def main(path: str, mib: int) -> None:
    root = Member(Memory(mib))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    request = b""
    while request != b"quit":
        connection, _ = listener.accept()
        with connection:
            request = connection.recv(100).strip()
            right = request == b"quit" or root.do(request)
            connection.sendall((b"right" if right else b"wrong") if request == b"check" else b"done")


main(sys.argv[1], int(sys.argv[2]))
