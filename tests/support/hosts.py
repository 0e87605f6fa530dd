"""Two hosts on one machine: network namespaces, and between them a link that delays every packet.

`tc netem` would be the tool for the delay, but not every kernel has it (CONFIG_NET_SCH_NETEM is not set in the
6.18 that this was written on). So each namespace has a TUN device instead (Documentation/networking/tuntap.rst), and a
thread of ours carries the packets from one to the other, each after its delay.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x0001 | 0x1000
DEVICE = "link"
LARGEST = 1 << 16  # bytes of a packet, at most


@dataclass(frozen=True)
class Host:
    """Where commands run, and by which address others reach it: in a network namespace, or right here."""

    address: str = "127.0.0.1"
    namespace: str | None = None

    def command(self, *words: str | Path | int) -> list[str]:
        """What to execute: nothing but `nsenter` comes before it, and that keeps the pid."""
        enter = [] if self.namespace is None else ["nsenter", f"--net=/run/netns/{self.namespace}"]
        return [*enter, *map(str, words)]

    def run(self, *words: str | Path | int) -> None:
        """A command that must succeed."""
        result = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, f"{result.args}: {result.returncode}\n{result.stderr}"


@contextmanager
def two_hosts(delay: float) -> Iterator[tuple[Host, Host]]:
    """Hosts whose packets to each other take `delay` seconds. Nothing of them is left afterwards."""
    names = [f"lazypages-{os.getpid()}-{letter}" for letter in "ab"]
    here, hosts = Host(), [Host(f"10.77.0.{number}", name) for number, name in enumerate(names, start=1)]
    with ExitStack() as stack:
        ends = []
        for host in hosts:
            assert host.namespace is not None
            here.run("ip", "netns", "add", host.namespace)
            stack.callback(here.run, "ip", "netns", "del", host.namespace)
            end = _open_device(Path("/run/netns", host.namespace))
            stack.callback(os.close, end)
            ends.append(end)
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                host.run("ip", "link", "set", "dev", device, "up")
        stack.enter_context(_carried(ends[0], ends[1], delay))
        yield hosts[0], hosts[1]


def _open_device(namespace: Path) -> int:
    """A new TUN device of that namespace, which lasts as long as its descriptor."""
    found: list[int] = []

    def make() -> None:
        """In a thread: only it goes into the namespace."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {namespace}")
        finally:
            os.close(fd)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN_NO_PI))
        found.append(tun)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return found[0]


@contextmanager
def _carried(one: int, other: int, delay: float) -> Iterator[None]:
    """Packets go from each of the devices to the other one meanwhile."""
    over = os.eventfd(0, os.EFD_CLOEXEC)
    thread = threading.Thread(target=_carry, args=({one: other, other: one}, delay, over))
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(over, 1)
        thread.join()
        os.close(over)


def _carry(across: dict[int, int], delay: float, over: int) -> None:
    waiting: deque[tuple[float, int, bytes]] = deque()  # when, where to, what; the delay is always the same
    with select.epoll() as poll:
        for fd in (*across, over):
            poll.register(fd, select.EPOLLIN)
        while True:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            for fd, _ in poll.poll(pause):
                if fd == over:
                    return
                waiting.append((time.monotonic() + delay, across[fd], os.read(fd, LARGEST)))
            while waiting and waiting[0][0] <= time.monotonic():
                _, fd, packet = waiting.popleft()
                os.write(fd, packet)
