"""Two hosts on one machine: network namespaces, and between them a link that delays, loses and is only so fast.

A veth pair, with `tc netem` for what is wrong with it (tc-netem(8)). But not every kernel has netem
(CONFIG_NET_SCH_NETEM is not set in the 6.18 that this was written on). Then each namespace has a TUN device instead
(Documentation/networking/tuntap.rst), and a thread of ours carries the packets from one to the other.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
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
LONGEST_QUEUE = 0.5  # s; what would wait longer is dropped


@dataclass(frozen=True)
class Link:
    """`delay`: s, each way. `loss`: how probable it is for a packet. `rate`: bytes/s, each way; None: no limit."""

    delay: float = 0.0
    loss: float = 0.0
    rate: float | None = None

    def netem(self) -> list[str]:
        """The words of `tc qdisc`; none for a link that only carries."""
        words = []
        if self.delay:
            words += ["delay", f"{self.delay * 1e3:g}ms"]
        if self.loss:
            words += ["loss", f"{self.loss * 100:g}%"]
        if self.rate is not None:
            words += ["rate", f"{round(self.rate * 8)}bit"]
        return ["netem", *words] if words else []


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
    def inside(self) -> Iterator[None]:
        """This thread is on that host meanwhile, and so is what it starts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(Path(f"/run/netns/{self.namespace}"))
            try:
                yield
            finally:
                _enter(Path(f"/proc/self/fd/{before}"))
        finally:
            os.close(before)

    def take_over(self, other: Host) -> None:
        """The other host's end of the link becomes this host's; it must not be one with a delay, loss or rate."""
        assert other.namespace is not None
        self.run("ip", "-n", other.namespace, "link", "set", "dev", DEVICE, "netns", self.namespace)
        self.set_up()

    def set_up(self) -> None:
        """The address of its end of the link."""
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            self.run("ip", "link", "set", "dev", device, "up")

    def sent(self) -> int:
        """Bytes that it has sent to the other host so far, headers and all."""
        assert self.namespace is not None
        command = ["ip", "-n", self.namespace, "-json", "-s", "link", "show", "dev", DEVICE]
        (found,) = json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout)
        sent: int = found["stats64"]["tx"]["bytes"]
        return sent


@contextmanager
def two_hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """Hosts with that link between them. Nothing of them is left afterwards."""
    names = [f"lazypages-{os.getpid()}-{letter}" for letter in "ab"]
    here, hosts = Host(), [Host(f"10.77.0.{number}", name) for number, name in enumerate(names, start=1)]
    with ExitStack() as stack:
        for name in names:
            here.run("ip", "netns", "add", name)
            stack.callback(here.run, "ip", "netns", "del", name)
        ends: list[int] = []
        if _can_do(hosts[0], link):
            peer = ("peer", "name", DEVICE, "netns", names[1])
            here.run("ip", "-n", names[0], "link", "add", "name", DEVICE, "type", "veth", *peer)
        else:
            for name in names:
                ends.append(_open_device(Path("/run/netns", name)))
                stack.callback(os.close, ends[-1])
        for host in hosts:
            host.set_up()
            if not ends and link.netem():
                host.run("tc", "qdisc", "add", "dev", DEVICE, "root", *link.netem())
        if ends:
            stack.enter_context(_carried(ends[0], ends[1], link))
        yield hosts[0], hosts[1]


@contextmanager
def successor(host: Host) -> Iterator[Host]:
    """A host with the same address, which has no link until it takes over that of ``host``."""
    here, name = Host(), f"{host.namespace}-next"
    here.run("ip", "netns", "add", name)
    try:
        yield Host(host.address, name)
    finally:
        here.run("ip", "netns", "del", name)


def _enter(namespace: Path) -> None:
    """With this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(fd)


def _can_do(host: Host, link: Link) -> bool:
    """Whether the kernel has what the link needs; tried on the loopback device of that namespace."""
    if not link.netem():
        return True
    tried = [
        subprocess.run(
            host.command("tc", "qdisc", action, "dev", "lo", "root", "netem", "delay", "1ms"),
            capture_output=True,
            timeout=60,
            check=False,
        ).returncode
        for action in ("add", "del")
    ]
    return tried == [0, 0]


def _open_device(namespace: Path) -> int:
    """A new TUN device of that namespace, which lasts as long as its descriptor."""
    found: list[int] = []

    def make() -> None:
        """In a thread: only it goes into the namespace."""
        _enter(namespace)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN_NO_PI))
        found.append(tun)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return found[0]


@contextmanager
def _carried(one: int, other: int, link: Link) -> Iterator[None]:
    """Packets go from each of the devices to the other one meanwhile."""
    over = os.eventfd(0, os.EFD_CLOEXEC)
    directions = {fd: Direction(link, seed, to) for seed, (fd, to) in enumerate(((one, other), (other, one)))}
    thread = threading.Thread(target=_carry, args=(directions, over))
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(over, 1)
        thread.join()
        os.close(over)


class Direction:
    """What happens to packets on their way in one direction, to the device `to`."""

    def __init__(self, link: Link, seed: int, to: int) -> None:
        self.to = to
        self._link, self._chance = link, random.Random(seed)
        self._waiting: deque[tuple[float, bytes]] = deque()  # when it arrives
        self._free_at = 0.0  # when the packet before has left

    def send(self, packet: bytes, now: float) -> None:
        """It may be lost, also because too many others wait already."""
        if self._chance.random() < self._link.loss:
            return
        leaves = now
        if self._link.rate is not None:
            leaves = max(now, self._free_at) + len(packet) / self._link.rate
            if leaves - now > LONGEST_QUEUE:
                return
            self._free_at = leaves
        self._waiting.append((leaves + self._link.delay, packet))

    def next_at(self) -> float | None:
        """When the next one arrives, if any."""
        return self._waiting[0][0] if self._waiting else None

    def arrived(self, now: float) -> Iterator[bytes]:
        """Those that are there by now."""
        while self._waiting and self._waiting[0][0] <= now:
            yield self._waiting.popleft()[1]


def _carry(directions: dict[int, Direction], over: int) -> None:
    with select.epoll() as poll:
        for fd in (*directions, over):
            poll.register(fd, select.EPOLLIN)
        while True:
            due = [at for one in directions.values() if (at := one.next_at()) is not None]
            for fd, _ in poll.poll(max(0.0, min(due) - time.monotonic()) if due else None):
                if fd == over:
                    return
                directions[fd].send(os.read(fd, LARGEST), time.monotonic())
            for one in directions.values():
                for packet in one.arrived(time.monotonic()):
                    os.write(one.to, packet)
