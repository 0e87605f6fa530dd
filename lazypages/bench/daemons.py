"""A measured daemon: starting it, watching it from outside, and its costs."""

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
#: Number of successive checks that find it asleep, and seconds between them.
ASLEEP_LOOKS = 3
ASLEEP_INTERVAL = 0.001
_CPUCLOCK_SCHED = 2
#: With this variable set a source tree is compiled at each start; an installation has compiled modules.
UNCOMPILED = "PYTHONDONTWRITEBYTECODE"


class Daemon:
    """A process that signals readiness on `--status-fd`. A context manager; kills the process on exit.

    ``ready``: seconds from start to readiness; ``settled``: seconds until it sleeps. `--status-fd N` is added to the
    command.
    """

    def __init__(self, command: Sequence[str], output: Path) -> None:
        """Start `command` with its output in the file `output`. Raises BenchError."""
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
        """The last 2000 characters of its output."""
        return self._output.read_text(errors="replace")[-2000:]

    def wait_ready(self) -> None:
        """Wait for readiness. Raises BenchError if it ends before, or after START_TIMEOUT."""
        readable, _, _ = select.select([self._status], [], [], START_TIMEOUT)
        if not readable or os.read(self._status, 1) != b"\0":
            raise BenchError(f"{' '.join(self._command)}: not ready\n{self.story()}")
        self.ready = self.settled = time.monotonic() - self._started
        self._cpu_before = self._cpu_now()

    def wait_settled(self) -> None:
        """After readiness, wait until its first thread sleeps at ASLEEP_LOOKS successive checks.

        A restore takes tens of ms before it needs the daemon, which may complete its start meanwhile.

        Raises BenchError.
        """
        deadline = time.monotonic() + START_TIMEOUT
        looks = 0
        while looks < ASLEEP_LOOKS:
            if self.has_ended() or time.monotonic() > deadline:
                raise BenchError(f"the daemon was ready, but does not wait for a restore\n{self.story()}")
            if not looks:
                self.settled = time.monotonic() - self._started
            looks = looks + 1 if self._sleeps() else 0
            time.sleep(ASLEEP_INTERVAL)
        self._cpu_before = self._cpu_now()

    def _sleeps(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def _cpu_now(self) -> float:
        # The CPU clock of the process (clock_getcpuclockid(3)), in ns; /proc/<pid>/stat counts in steps of 10 ms.
        return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED)

    def main_thread_cpu(self) -> float:
        """CPU seconds of its first thread (in our daemon: Python and the event loop), from schedstat, which has ns."""
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text()
        except OSError:
            return 0.0
        return int(text.split(maxsplit=1)[0]) / 1e9

    def look(self) -> None:
        """Sample its memory."""
        try:
            with Path(f"/proc/{self.pid}/status").open() as status:
                fields = dict(line.split(":", 1) for line in status)
        except OSError:
            return
        if "VmHWM" in fields:  # not of a zombie
            self._peak_rss = max(self._peak_rss, _kib(fields["VmHWM"]))
            self._peak_anon = max(self._peak_anon, _kib(fields["RssAnon"]))

    def end(self, timeout: float) -> int:
        """Wait for its end, and kill it after `timeout` seconds. Returns its exit code, negative for a signal."""
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
        """Whether it has exited. `end` reaps it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def watch(
        self, done: Callable[[], bool], interval: float, timeout: float, after_end: float = 60.0
    ) -> None:
        """Sample its memory every `interval` seconds until `done()` is true.

        Raises BenchError after `timeout` seconds, or `after_end` seconds after its end.
        """
        deadline = time.monotonic() + timeout
        while not done():
            self.look()
            time.sleep(interval)
            if time.monotonic() > deadline:
                raise BenchError(f"not done after {timeout:g} s")
            if self.has_ended():
                # It may have ended in order; the rest takes little time then.
                deadline = min(deadline, time.monotonic() + after_end)

    def metrics(self) -> dict[str, float]:
        """Seconds until ready; CPU seconds since it was ready or settled; context switches; peak memory in bytes."""
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
