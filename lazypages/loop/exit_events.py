"""Reads the kernel's process events connector: which signal killed a process. For kernels before 6.15.

On these kernels only the parent can get the exit status of a process, and only once. The connector reports exits to
root, in the first PID and user namespaces, if CONFIG_PROC_EVENTS is set, as in distributions (docs/kernel.md, "How a
task ended"). A filter on the socket passes only exits by signals, so that a busy machine does not wake the daemon.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Self

from lazypages.engine._uffd import ffi, lib

_NETLINK_CONNECTOR = 11
_CN_IDX_PROC, _CN_VAL_PROC = 1, 1
_LISTEN, _IGNORE = 1, 2
_NLMSG_DONE = 3
_SO_ATTACH_FILTER = 26

#: struct nlmsghdr, struct cn_msg.
_HEADER = struct.Struct("=IHHII IIIIHH")

#: struct proc_event of an exit: what, cpu, timestamp; pid, tgid, exit_code. An answer has an errno in place of the pid.
_EVENT = struct.Struct("=IIQ iiI")
_EXIT = 0x80000000
_ACK = 0

_WHAT = _HEADER.size
_CODE = _HEADER.size + _EVENT.size - 4

#: Classic BPF, whose words are big-endian: code, jump if true, jump if false, constant.
_FILTER = (
    (0x20, 0, 0, _WHAT),  # load the word "what"
    (0x15, 3, 0, _ACK),  # if it is an answer: pass
    (0x15, 0, 3, struct.unpack(">I", struct.pack("=I", _EXIT))[0]),  # unless it is an exit: drop
    (0x30, 0, 0, _CODE),  # load the first byte of the exit code
    (0x45, 0, 1, 0x7F),  # unless it has a signal: drop
    (0x06, 0, 0, 0xFFFFFFFF),  # pass
    (0x06, 0, 0, 0),  # drop
)


def needed() -> bool:
    """Whether this kernel can't report the exit status by a pidfd."""
    return not lib.lp_exit_status_works()


class ExitEvents:
    """Records which of the watched processes were killed by signals. A context manager."""

    def __init__(self) -> None:
        """Raises OSError where the connector is not available."""
        self._watched: dict[int, int] = {}
        self._whole = True  # no event was lost (ENOBUFS)
        self._answers = 0  # the `ack` of the last message
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_CONNECTOR
        )
        try:
            program = ffi.from_buffer(b"".join(struct.pack("=HBBI", *step) for step in _FILTER))
            self._socket.setsockopt(
                socket.SOL_SOCKET,
                _SO_ATTACH_FILTER,
                struct.pack("@HP", len(_FILTER), int(ffi.cast("uintptr_t", program))),
            )
            self._socket.bind((0, _CN_IDX_PROC))
            self._send(_LISTEN)
            self._check_answer()
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def open(cls) -> ExitEvents | None:
        """None where it is not needed or not available."""
        if not needed():
            return None
        try:
            return cls()
        except OSError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._socket:
            self._send(_IGNORE)

    def _send(self, what: int) -> None:
        body = struct.pack("=I", what)
        size = _HEADER.size + len(body)
        number = os.getpid()  # the answer, which all listeners receive, has this number plus one in `ack`
        head = _HEADER.pack(size, _NLMSG_DONE, 0, 0, 0, _CN_IDX_PROC, _CN_VAL_PROC, 0, number, len(body), 0)
        self._socket.send(head + body)

    def _check_answer(self) -> None:
        """The answer is available at once; outside of the first namespaces there is none (cn_proc_mcast_ctl)."""
        while event := self._receive():
            what, _cpu, _time, error, _process, _code = event
            if what == _ACK and self._answers == os.getpid() + 1:
                if error:
                    raise OSError(error, os.strerror(error))
                return
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def watch(self, pid: int) -> None:
        """Record the end of this process from now on."""
        self._watched[pid] = 0

    def signal_of(self, pid: int) -> int | None:
        """The signal that killed a watched process that has exited; 0: none did; None: unknown."""
        self.take()
        return self._watched.get(pid) if self._whole else None

    def take(self) -> None:
        """Read all events. Call it regularly, so that the socket's buffer does not overflow."""
        while event := self._receive():
            what, _cpu, _time, _pid, process, code = event
            if what == _EXIT and process in self._watched and code & 0x7F:
                self._watched[process] = code & 0x7F

    def _receive(self) -> tuple[int, ...] | None:
        """The fields of the next event; None if there is none."""
        while True:
            try:
                message = self._socket.recv(4096)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._whole = False
            else:
                if len(message) >= _HEADER.size + _EVENT.size:
                    self._answers = _HEADER.unpack_from(message)[8]
                    return _EVENT.unpack_from(message, _HEADER.size)
