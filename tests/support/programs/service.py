"""A service with asyncio, threads and sockets, and memory that it can check: `service.py SOCKET MIB [tcp]`.

Each request is one line: `write` rewrites the next 16 MiB of its memory in threads, `check` compares all of it with
what was written, `quit` ends it. A socket pair (with `tcp`: a connection to itself), a thread that waits at a
condition, and two timers, of the event loop and of the kernel, are there all the time.
"""

import asyncio
import mmap
import signal
import socket
import sys
import threading

MIB = 1 << 20
WRITTEN = 16
PAGE = 4096
EVERY = 0.02  # s


class Memory:
    """Private memory; each of its pages is different."""

    def __init__(self, mib: int) -> None:
        self._bytes = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._versions = [0] * mib
        self._next = 0
        for number in range(mib):
            self._bytes[number * MIB : (number + 1) * MIB] = self._content(number)

    def _content(self, number: int) -> bytes:
        version = self._versions[number]
        return b"".join(
            (b"%d %d %d " % (number, page, version)).ljust(PAGE, b"%d" % (version % 10))
            for page in range(MIB // PAGE)
        )

    def write(self, count: int = WRITTEN) -> list[int]:
        """The numbers of the next MiB, which have to be written now."""
        numbers = [(self._next + step) % len(self._versions) for step in range(count)]
        self._next += count
        for number in numbers:
            self._versions[number] += 1
        return numbers

    def fill(self, number: int) -> None:
        self._bytes[number * MIB : (number + 1) * MIB] = self._content(number)

    def is_right(self, number: int) -> bool:
        return self._bytes[number * MIB : (number + 1) * MIB] == self._content(number)

    def __len__(self) -> int:
        return len(self._versions)


class Timers:
    """Two that expire all the time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._ticks, self._expired = loop, 0, 0
        loop.add_signal_handler(signal.SIGALRM, self._expire)
        signal.setitimer(signal.ITIMER_REAL, EVERY, EVERY)
        self._tick()

    def _tick(self) -> None:
        self._ticks += 1
        self._loop.call_later(EVERY, self._tick)

    def _expire(self) -> None:
        self._expired += 1

    async def run(self) -> bool:
        """Whether both still expire."""
        before = self._ticks, self._expired
        await asyncio.sleep(3 * EVERY)
        return self._ticks > before[0] and self._expired > before[1]


def connected_to_itself() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


async def main(path: str, mib: int, *, tcp: bool) -> None:
    memory = Memory(mib)
    condition = threading.Condition()
    ended = asyncio.Event()
    one, other = connected_to_itself() if tcp else socket.socketpair()
    one.setblocking(False)
    loop = asyncio.get_running_loop()
    timers = Timers(loop)

    def echo() -> None:
        while data := other.recv(100):
            other.sendall(data.upper())

    def wait() -> None:
        with condition:
            condition.wait()

    threads = [threading.Thread(target=work, daemon=True) for work in (echo, wait)]
    for thread in threads:
        thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := (await reader.readline()).strip():
            answer = b"done"
            if request == b"write":
                await asyncio.gather(*(asyncio.to_thread(memory.fill, number) for number in memory.write()))
            elif request == b"check":
                every = await asyncio.gather(
                    *(asyncio.to_thread(memory.is_right, number) for number in range(len(memory)))
                )
                await loop.sock_sendall(one, b"ping")
                echoed = await loop.sock_recv(one, 100)
                good = all(every) and echoed == b"PING" and all(thread.is_alive() for thread in threads)
                good = await timers.run() and good
                answer = b"right" if good else b"wrong"
            elif request == b"quit":
                ended.set()
            writer.write(answer + b"\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), tcp="tcp" in sys.argv))
