"""A daemon under measurement: started, watched from outside, and what it has cost."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lazypages.bench.errors import BenchError

START_TIMEOUT = 120.0
#: Looks in a row that find it asleep, and seconds between them.
ASLEEP_LOOKS = 3
ASLEEP_INTERVAL = 0.001
_CPUCLOCK_SCHED = 2
#: An installation has its modules compiled; with this set, a source tree is compiled anew at each start.
UNCOMPILED = "PYTHONDONTWRITEBYTECODE"


class Daemon:
    """A process that says on `--status-fd` when it is ready; a context manager, which ends it.

    ``ready``: seconds from start to ready; ``settled``: until it only waits. The command is started with
    `--status-fd N` added.
    """

    def __init__(self, command: Sequence[str], output: Path) -> None:
        """Starts `command`; `output` gets what it prints. Raises BenchError."""
        self._output = output
        self._command = command
        self._started = time.monotonic()
        self._status, status = os.pipe()
        try:
            with output.open("wb") as stream:
                self._process = subprocess.Popen(
                    [*command, "--status-fd", str(status)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    pass_fds=[status],
                    env={name: value for name, value in os.environ.items() if name != UNCOMPILED},
                )
        except OSError as error:
            os.close(self._status)
            raise BenchError(f"{command[0]}: {error.strerror}") from None
        finally:
            os.close(status)
        self.pid = self._process.pid
        self.ready = self.settled = self._cpu_before = 0.0
        self._usage: resource.struct_rusage | None = None
        self._peak_rss = self._peak_anon = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._status)
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def story(self) -> str:
        """The end of what it printed."""
        return self._output.read_text(errors="replace")[-2000:]

    def wait_ready(self) -> None:
        """Raises BenchError when it ends or stays silent instead."""
        readable, _, _ = select.select([self._status], [], [], START_TIMEOUT)
        if not readable or os.read(self._status, 1) != b"\0":
            raise BenchError(f"{' '.join(self._command)}: not ready\n{self.story()}")
        self.ready = self.settled = time.monotonic() - self._started
        self._cpu_before = self._cpu_now()

    def wait_settled(self) -> None:
        """After ready: until its first thread sleeps, some looks long.

        A restore takes tens of ms before it needs a daemon, and a daemon may use them for what is left of its start.
        """
        deadline = time.monotonic() + START_TIMEOUT
        looks = 0
        while looks < ASLEEP_LOOKS:
            if self.has_ended() or time.monotonic() > deadline:
                raise BenchError(f"it was ready, but does not wait for a restore\n{self.story()}")
            if not looks:
                self.settled = time.monotonic() - self._started
            looks = looks + 1 if self._sleeps() else 0
            time.sleep(ASLEEP_INTERVAL)
        self._cpu_before = self._cpu_now()

    def _sleeps(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def _cpu_now(self) -> float:
        # The clock of another process (clock_getcpuclockid(3)): exact, where /proc/<pid>/stat counts in 10 ms.
        return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED)

    def main_thread_cpu(self) -> float:
        """Seconds that its first thread has run (of ours: Python, the event loop); to the ns, where stat has 10 ms."""
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text()
        except OSError:
            return 0.0
        return int(text.split(maxsplit=1)[0]) / 1e9

    def look(self) -> None:
        """Takes note of its memory."""
        try:
            with Path(f"/proc/{self.pid}/status").open() as status:
                fields = dict(line.split(":", 1) for line in status)
        except OSError:
            return
        if "VmHWM" in fields:  # not of a zombie
            self._peak_rss = max(self._peak_rss, _kib(fields["VmHWM"]))
            self._peak_anon = max(self._peak_anon, _kib(fields["RssAnon"]))

    def end(self, timeout: float) -> int:
        """Waits for its end, kills it after `timeout` seconds: its exit code, negative for a signal."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                self._process.kill()
            time.sleep(0.002)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._usage = usage
        return self._process.returncode

    def has_ended(self) -> bool:
        """Whether it is only a zombie, to be reaped by `end`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def watch(
        self, done: Callable[[], bool], interval: float, timeout: float, after_end: float = 60.0
    ) -> None:
        """Looks at its memory every `interval` seconds until `done()`.

        Raises BenchError when that takes more than `timeout` seconds, or than `after_end` after its end.
        """
        deadline = time.monotonic() + timeout
        while not done():
            self.look()
            time.sleep(interval)
            if time.monotonic() > deadline:
                raise BenchError(f"not done after {timeout:g} s")
            if self.has_ended():
                # That may be the regular end: what is left to do is quick then.
                deadline = min(deadline, time.monotonic() + after_end)

    def metrics(self) -> dict[str, float]:
        """Seconds to ready, of CPU since it was ready or has settled; context switches; peak memory in bytes."""
        assert self._usage is not None
        return {
            "ready": self.ready,
            "cpu": self._usage.ru_utime + self._usage.ru_stime - self._cpu_before,
            "switches": self._usage.ru_nvcsw + self._usage.ru_nivcsw,
            "waits": self._usage.ru_nvcsw,
            "rss": self._peak_rss,
            "anon": self._peak_anon,
        }


def _kib(text: str) -> int:
    return int(text.split(maxsplit=1)[0]) << 10
