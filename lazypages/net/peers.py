"""Access control: of this host, only processes of our own user and of root may connect.

Every user of this host, and every container that shares its network namespace, can connect to a socket at loopback, and
a page server sends the memory of tasks. The kernel knows the user of the socket at the other end: SO_PEERCRED
for unix sockets (unix(7)), NETLINK_SOCK_DIAG for TCP (sock_diag(7)). A peer in another network namespace counts as
another host, also if it is a container of this host behind a veth: this namespace has no socket of it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from lazypages.errors import LazyPagesError

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_DUMP: Final = 0x300
ALL_STATES: Final = 0xFFFFFFFF
NO_COOKIE: Final = b"\xff" * 8
TIMEOUT: Final = 10.0  # s to wait for the kernel's answer

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2, up to the socket's name
_NAME = struct.Struct("!HH16s16s4s8s")  # struct inet_diag_sockid; ports are in network order
_MESSAGE = struct.Struct("=BBBB48sIIIII")  # struct inet_diag_msg
_CREDENTIALS = struct.Struct("=iII")  # struct ucred

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
End = tuple[Address, int]  # address and port


class StrangerError(LazyPagesError):
    """The peer is not allowed to connect."""


class Owner(NamedTuple):
    """The owner of a socket. `inode` is 0 if no process has the socket open any more; `uid` is undefined then."""

    uid: int
    inode: int


def check_peer(sock: socket.socket) -> None:
    """Raises StrangerError unless the process at the other end is of our user, of root, or on another host."""
    try:
        if sock.family == socket.AF_UNIX:
            _, uid, _ = _CREDENTIALS.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            _check_uid(uid)
            return
        here, peer = connection_end(sock.getsockname()), connection_end(sock.getpeername())
    except OSError as error:
        raise StrangerError(f"disconnected before its user could be checked: {error.strerror}") from None
    try:
        owner = find_owner(peer, here)
    except OSError as error:
        raise StrangerError(
            f"cannot find the user of its socket ({error.strerror}): use unix:PATH, --tls, or --insecure"
        ) from None
    if owner is not None and owner.inode:
        _check_uid(owner.uid)
    elif owner is not None or peer[0].is_loopback or here[0].is_loopback or peer[0] == here[0]:
        raise StrangerError("disconnected on this host before its user could be checked")


def _check_uid(uid: int) -> None:
    if uid not in {0, os.geteuid()}:
        raise StrangerError(
            f"refused: user {uid}; from this host only user {os.geteuid()} and root may connect "
            "(--insecure allows all users)"
        )


def connection_end(name: tuple[Any, ...]) -> End:
    """Address and port of a socket name. An IPv4 address that is mapped into IPv6 is returned as IPv4."""
    address = ipaddress.ip_address(name[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address, name[1]


def find_owner(here: End, there: End) -> Owner | None:
    """The owner of the TCP socket that is bound to `here` and connected to `there`, in this network namespace.

    None if there is no such socket. Raises OSError.
    """
    try:
        return owner_from_kernel(here, there)
    except OSError:  # no CONFIG_INET_DIAG, or forbidden by a sandbox
        return owner_from_proc(here, there)


def owner_from_kernel(here: End, there: End) -> Owner | None:
    """Look the owner up by sock_diag. Raises OSError.

    The first request names one socket. The kernel does not find a socket that is bound to a device this way
    (inet_sk_bound_dev_eq()), and from Linux 5.7 on any user may bind one (SO_BINDTODEVICE). So a second request dumps
    all sockets with these ports (docs/kernel.md, "Page servers").
    """
    family = socket.AF_INET if here[0].version == 4 else socket.AF_INET6
    name = _NAME.pack(here[1], there[1], _packed(here[0]), _packed(there[0]), bytes(4), NO_COOKIE)
    try:
        found = _ask(family, name, dump=False)
    except FileNotFoundError:
        found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        if not found:
            name = _NAME.pack(here[1], there[1], bytes(16), bytes(16), bytes(4), NO_COOKIE)
            found = [one for one in _ask(family, name, dump=True) if one[:2] == (here, there)]
    return found[0][2] if found else None


def _packed(address: Address) -> bytes:
    return address.packed.ljust(16, b"\0")


_Found = tuple[End, End, Owner]


class _Netlink:
    """One netlink socket for all threads. It is opened when the server starts, while descriptors are free."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._asked = 0

    def open(self) -> socket.socket:
        """Raises OSError."""
        if self._sock is None:
            self._sock = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
            )
            self._sock.settimeout(TIMEOUT)
        return self._sock

    def number(self) -> int:
        """The sequence number of the next request."""
        self._asked = (self._asked + 1) & 0xFFFFFFFF
        return self._asked


_netlink = _Netlink()


def get_ready() -> None:
    """Open the netlink socket. Call it before the first client can connect."""
    with _netlink.lock, suppress(OSError):
        _netlink.open()


def _ask(family: int, name: bytes, *, dump: bool) -> list[_Found]:
    """Raises OSError; without `dump`, FileNotFoundError if there is no such socket."""
    with _netlink.lock:
        return _ask_on(_netlink.open(), _netlink.number(), family, name, dump=dump)


def _ask_on(netlink: socket.socket, number: int, family: int, name: bytes, *, dump: bool) -> list[_Found]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, ALL_STATES) + name
    flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else 0)
    netlink.send(_HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, flags, number, 0) + body)
    found: list[_Found] = []
    while True:
        data = netlink.recv(1 << 16)
        while len(data) >= _HEADER.size:
            length, kind, _, question, _ = _HEADER.unpack_from(data)
            message, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
            if question != number:  # the rest of an earlier answer, after a time-out
                continue
            if kind == NLMSG_DONE:
                return found
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", message)[0]
                raise OSError(code, os.strerror(code))
            found.append(_found(message))
            if not dump:
                return found


def _found(message: bytes) -> _Found:
    family, _, _, _, name, _, _, _, uid, inode = _MESSAGE.unpack_from(message)
    port, to_port, address, to_address, _, _ = _NAME.unpack(name)
    size = 4 if family == socket.AF_INET else 16
    here, there = (
        connection_end((socket.inet_ntop(family, packed[:size]), number))
        for packed, number in ((address, port), (to_address, to_port))
    )
    return here, there, Owner(uid, inode)


def owner_from_proc(here: End, there: End) -> Owner | None:
    """Look the owner up in /proc/net/tcp and tcp6 (proc_pid_net(5)). Raises OSError."""
    for name in ("tcp", "tcp6"):
        path = Path("/proc/self/net", name)
        if name == "tcp6" and not path.exists():  # a kernel without IPv6
            continue
        for line in path.read_text().splitlines()[1:]:
            fields = line.split()
            if (_read_end(fields[1]), _read_end(fields[2])) == (here, there):
                return Owner(int(fields[7]), int(fields[9]))
    return None


def _read_end(text: str) -> End:
    """Parse "0100007F:1F90": words of 32 bits in native byte order, and the port."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return connection_end((socket.inet_ntop(family, packed), int(port, 16)))
