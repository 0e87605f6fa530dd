"""``lazypages demo``: checkpoint a live task, restore it lazily, and let it check all its bytes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from lazypages.engine import kernel
from lazypages.errors import LazyPagesError
from lazypages.wording import duration, size

HERE = Path(__file__).parent
TASK = HERE / "demo_task.py"

#: Runs modules of this installation; -P: not those in the current directory.
PYTHON = (sys.executable, "-P")
SAME_CODE = {"PYTHONPATH": str(HERE.parent)}

#: Where CRIU may be if it is not in PATH: the places of packages and of .ci/fetch-criu.
CRIU_PLACES = (Path("/usr/sbin/criu"), Path("/usr/local/sbin/criu"))
FETCHED_CRIU = Path("/var/cache/lazypages/criu")

#: Seconds after which a step has failed.
TIMEOUT = 120

MIB = 1 << 20

PR_SET_CHILD_SUBREAPER = 36


class DemoError(LazyPagesError):
    """The demo can't run here, or one of its steps failed."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs that dump and restore: ``name``, and both commands without pid and directories."""

    name: str
    dump: Sequence[str]
    restore: Sequence[str]

    @classmethod
    def of_our_own(cls) -> Tools:
        return cls(
            "our own dumptool and restorer",
            [*PYTHON, "-m", "dumptool", "dump"],
            [*PYTHON, "-m", "lazypages", "restore"],
        )

    @classmethod
    def of_criu(cls, path: Path) -> Tools:
        version = next(
            (line for line in _output([str(path), "--version"]) if line.startswith("Version: ")), ""
        )
        return cls(
            f"CRIU {version.removeprefix('Version: ') or '?'} ({path})",
            [str(path), "dump"],
            [str(path), "restore"],
        )

    def take(self, pid: int, images: Path) -> None:
        """Checkpoint the task into the directory `images`; the task has ended then. Raises DemoError."""
        images.mkdir()
        self._run([*self.dump, "-t", str(pid), "-D", str(images)], images, "dump")

    def bring_back(self, images: Path, *, lazily: bool) -> None:
        """Restore the task; return when it runs. Raises DemoError."""
        mode = ["--lazy-pages"] if lazily else []
        self._run([*self.restore, "-D", str(images), "-d", *mode], images, "restore")

    def _run(self, command: list[str], images: Path, what: str) -> None:
        log = images / f"{what}.log"
        output = images / f"{what}.out"
        with output.open("wb") as stream:
            try:
                code = subprocess.run(
                    [*command, "-o", log.name, "-v4"],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=os.environ | SAME_CODE,
                    timeout=TIMEOUT,
                    check=False,
                ).returncode
            except (OSError, subprocess.TimeoutExpired) as error:
                raise DemoError(f"{self.name} cannot {what}: {error}") from error
        if code:
            raise DemoError(f"{self.name} cannot {what}: {_last_error(log, output) or f'exit status {code}'}")


def _typed(command: Sequence[str]) -> str:
    """The command as a user types it."""
    return " ".join(word for word in command if word not in {*PYTHON, "-m"})


def _output(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def _last_error(*logs: Path) -> str:
    """The first line with an error, in a log of CRIU or of ours."""
    for log in logs:
        if log.exists():
            for line in log.read_text(errors="replace").splitlines():
                if "rror" in line:
                    return line.strip()
    return ""


class Task:
    """The task before the checkpoint and after the restore, under one pid. A context manager; kills the task on exit.

    A restored task is an orphan, and so becomes a child of this process, its nearest subreaper.
    """

    def __init__(self, folder: Path, nr_bytes: int) -> None:
        folder.mkdir()
        self._folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(TASK), str(folder), str(nr_bytes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self.pid = self.process.pid

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with suppress(ChildProcessError):  # not restored, or has ended already
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)

    def wait_filled(self) -> None:
        """Wait until the task has filled its memory. Raises DemoError if it ends instead."""
        _wait("the task to fill its memory", lambda: self._said("ready") or self.process.poll() is not None)
        if self.process.returncode is not None:
            raise DemoError(f"the task ended with {self.process.returncode}: is there enough memory for it?")

    def wait_taken(self) -> None:
        """Wait until the task has ended, after a checkpoint."""
        self.process.wait(TIMEOUT)

    def let_go(self) -> None:
        """Let the task touch and check its memory, as soon as it runs."""
        (self._folder / "go").touch()

    def verdict(self) -> dict[str, Any]:
        """What the restored task has found. Raises DemoError if it ends before."""
        _wait(
            "the restored task to check its memory", lambda: self._said("verdict") or self._restored_ended()
        )
        if not self._said("verdict"):
            raise DemoError("the restored task has ended without a verdict")
        found: dict[str, Any] = json.loads((self._folder / "verdict").read_text())
        return found

    def _said(self, name: str) -> bool:
        return (self._folder / name).exists()

    def _restored_ended(self) -> bool:
        try:
            return os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        except ChildProcessError:
            return True


def _wait(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        if time.monotonic() > deadline:
            raise DemoError(f"waited {TIMEOUT} s for {what}")
        time.sleep(0.005)


class Step:
    """A line with what is being done, then its result and how long it took."""

    def __init__(self, text: str) -> None:
        click.echo(f"{text} ... ", nl=False)
        self._started = time.monotonic()

    def done(self, what: str) -> None:
        click.echo(f"{what} ({duration((time.monotonic() - self._started) * 1e9)})")


@click.command()
@click.option(
    "--size",
    "mib",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Memory of the task, in MiB.",
)
@click.option("--criu", type=click.Path(path_type=Path), help="Use this CRIU, and no other.")
def demo(mib: int, criu: Path | None) -> None:
    """See it work: checkpoint a live task, restore it lazily, and let it check every byte.

    Takes a few seconds, needs root, and leaves nothing behind. `lazypages serve` serves the memory. CRIU dumps
    and restores if a CRIU that works is found (in PATH, in the environment variable LAZYPAGES_CRIU, or in the
    directory of .ci/fetch-criu); else dumptool and `lazypages restore` do.
    """
    _check_kernel()
    # Whatever still runs has ended before the directory is removed: a file created meanwhile would keep it there.
    with TemporaryDirectory(prefix="lazypages-demo-") as folder, _subreaper():
        tools = choose(criu, Path(folder))
        show(tools, Path(folder), mib * MIB)


def _check_kernel() -> None:
    error = kernel.try_userfaultfd()
    if error == errno.ENOSYS:
        raise DemoError(kernel.NO_USERFAULTFD)
    if os.geteuid():
        raise DemoError("checkpoint and restore need root: run it as root, for example with sudo")
    if error:
        raise DemoError(
            f"userfaultfd is forbidden here, even for root ({os.strerror(error)}): start the container with "
            "--privileged, or with CAP_SYS_PTRACE and a seccomp profile that allows userfaultfd"
        )


@contextmanager
def _subreaper() -> Iterator[None]:
    """Become the parent of restored tasks (prctl(2), PR_SET_CHILD_SUBREAPER), and kill them on exit."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        while children := Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            for child in children:
                os.waitpid(int(child), 0)


def choose(wanted: Path | None, folder: Path) -> Tools:
    """Try tools until a pair works here; print why others fail. Raises DemoError."""
    choices = [Tools.of_criu(path) for path in candidates(wanted)]
    if wanted is None:
        choices.append(Tools.of_our_own())
    for tools in choices:
        step = Step(f"Trying {tools.name}")
        try:
            try_out(tools, folder / "trial")
        except DemoError as error:
            step.done("does not work here")
            if tools is choices[-1]:
                raise
            click.echo(f"  {error}")
        else:
            step.done("works")
            return tools
        finally:
            shutil.rmtree(folder / "trial", ignore_errors=True)
    raise AssertionError("the list of tools is never empty")


def candidates(wanted: Path | None) -> list[Path]:
    """Paths of CRIU, in order of preference."""
    if wanted is not None:
        return [wanted]
    fetched = Path(os.environ.get("LAZYPAGES_CRIU_DIR", FETCHED_CRIU))
    found = [os.environ.get("LAZYPAGES_CRIU"), shutil.which("criu"), *CRIU_PLACES]
    found += sorted(fetched.glob("*/criu"), reverse=True)
    return list(dict.fromkeys(Path(path) for path in found if path and os.access(path, os.X_OK)))


def try_out(tools: Tools, folder: Path) -> None:
    """Dump and restore a small task, not lazily. Raises DemoError if that fails."""
    folder.mkdir()
    with Task(folder / "task", MIB) as task:
        task.wait_filled()
        tools.take(task.pid, folder / "images")
        task.wait_taken()
        task.let_go()
        tools.bring_back(folder / "images", lazily=False)
        if task.verdict()["wrong"]:
            raise DemoError(f"{tools.name} restores memory with wrong contents")


@contextmanager
def serving(images: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``lazypages serve`` on that directory, ready for a restore, with our standard output and error."""
    ready, status = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, ready)
        try:
            server = subprocess.Popen(
                [*PYTHON, "-m", "lazypages", "serve", "-D", str(images), "--status-fd", str(status)],
                stdin=subprocess.DEVNULL,
                pass_fds=[status],
                env=os.environ | SAME_CODE,
                process_group=0,  # Ctrl-C is for us, who end it: before it can catch SIGINT it prints a traceback
            )
        finally:
            os.close(status)
        try:
            if os.read(ready, 1) != b"\0":
                raise DemoError("lazypages serve did not start")
            yield server
        finally:
            if server.poll() is None:
                server.terminate()
                try:
                    server.wait(TIMEOUT)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def show(tools: Tools, folder: Path, nr_bytes: int) -> None:
    """The demo itself. Raises DemoError."""
    images = folder / "images"
    with ExitStack() as stack:
        step = Step(f"1. A task fills {size(nr_bytes)} of memory")
        # On exit the task ends before the server, so that the server is not left with an incomplete task.
        server_stack = stack.enter_context(ExitStack())
        task = stack.enter_context(Task(folder / "task", nr_bytes))
        task.wait_filled()
        step.done(f"it is process {task.pid}")

        step = Step(f"2. {_typed(tools.dump)} -t {task.pid} -D {images}")
        tools.take(task.pid, images)
        task.wait_taken()
        stored = sum(path.stat().st_size for path in images.iterdir())
        step.done(f"{size(stored)} of images, the task is gone")
        task.let_go()

        click.echo(f"3. lazypages serve -D {images} &")
        server = server_stack.enter_context(serving(images))

        click.echo(f"4. {_typed(tools.restore)} -D {images} --lazy-pages -d")
        started = time.time()
        tools.bring_back(images, lazily=True)
        verdict = task.verdict()
        code = server.wait(TIMEOUT)
    report(verdict, code, started, nr_bytes)


def report(verdict: dict[str, Any], code: int, started: float, nr_bytes: int) -> None:
    """Print what the task measured. Raises DemoError if it found a wrong page, or if the server failed."""
    touched = (verdict["touched"] - verdict["awake"]) * 1e9
    click.echo(
        f"\n5. The task ran again {duration((verdict['awake'] - started) * 1e9)} after the restore began. "
        f"{verdict['touches']:,} first touches all over its memory\n"
        f"   took {duration(touched)}: median {duration(verdict['median_touch'] * 1e9)}, "
        f"at most {duration(verdict['worst_touch'] * 1e9)}. "
        f"All its {size(nr_bytes)} were read and compared {duration((verdict['checked'] - started) * 1e9)} "
        "after the restore began."
    )
    if verdict["wrong"]:
        raise DemoError(f"{len(verdict['wrong'])} pages are wrong, the first is page {verdict['wrong'][0]}")
    if code:
        raise DemoError(f"lazypages serve failed with exit status {code}")
    click.secho("Every byte is the same as at the checkpoint.", fg="green", bold=True)
