"""``lazypages demo``: a live task, checkpointed and brought back lazily, that checks all its bytes itself."""

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
from lazypages.observe.summary import duration, size

HERE = Path(__file__).parent
TASK = HERE / "demo_task.py"

#: For `-m`: this lazypages and its kin, not what lies in the current directory (-P).
PYTHON = (sys.executable, "-P")
SAME_CODE = {"PYTHONPATH": str(HERE.parent)}

#: Where CRIU may be beside PATH: where packages put it, and where .ci/fetch-criu does.
CRIU_PLACES = (Path("/usr/sbin/criu"), Path("/usr/local/sbin/criu"))
FETCHED_CRIU = Path("/var/cache/lazypages/criu")

#: Seconds after which something is wrong.
PATIENCE = 120

MIB = 1 << 20

PR_SET_CHILD_SUBREAPER = 36


class DemoError(LazyPagesError):
    """The demo can't be given here, or something in it went wrong."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What takes the checkpoint and what restores it: ``name``, and the commands without directories."""

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
        """Checkpoints the task into the directory `images`; it is gone then. Raises DemoError."""
        images.mkdir()
        self._run([*self.dump, "-t", str(pid), "-D", str(images)], images, "dump")

    def bring_back(self, images: Path, *, lazily: bool) -> None:
        """Returns when the task runs again. Raises DemoError."""
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
                    timeout=PATIENCE,
                    check=False,
                ).returncode
            except (OSError, subprocess.TimeoutExpired) as error:
                raise DemoError(f"{self.name} can't {what}: {error}") from error
        if code:
            raise DemoError(f"{self.name} can't {what}: {_last_error(log, output) or f'exit status {code}'}")


def _typed(command: Sequence[str]) -> str:
    """As a person would type it."""
    return " ".join(word for word in command if word not in {*PYTHON, "-m"})


def _output(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def _last_error(*logs: Path) -> str:
    """The first line that says so, of a log of CRIU or of us."""
    for log in logs:
        if log.exists():
            for line in log.read_text(errors="replace").splitlines():
                if "rror" in line:
                    return line.strip()
    return ""


class Task:
    """The task, before the checkpoint and after the restore, under one pid. A context manager that ends it.

    Restored, it is an orphan, and so the child of its nearest subreaper: us.
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
        with suppress(ChildProcessError):  # not restored, or at its end already
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)

    def wait_filled(self) -> None:
        """Until its memory is as it wants it. Raises DemoError if it ends instead."""
        _wait("the task to fill its memory", lambda: self._said("ready") or self.process.poll() is not None)
        if self.process.returncode is not None:
            raise DemoError(f"the task ended with {self.process.returncode}: is there enough memory for it?")

    def wait_taken(self) -> None:
        """Until it is gone, after a checkpoint."""
        self.process.wait(PATIENCE)

    def let_go(self) -> None:
        """When it runs (again), it touches and checks its memory."""
        (self._folder / "go").touch()

    def verdict(self) -> dict[str, Any]:
        """What the restored task has found. Raises DemoError if it does not get that far."""
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
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            raise DemoError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.005)


class Step:
    """A line that says what is being done, then how long it took."""

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
    """See it work: checkpoint a live task, bring it back lazily, have it check every byte.

    Takes a few seconds, needs root, and leaves nothing behind. CRIU takes the checkpoint and restores it if
    one is found that works here (in PATH, by the environment variable LAZYPAGES_CRIU, or where .ci/fetch-criu
    puts it), else our own dumptool and `lazypages restore` do. The memory is served by `lazypages serve`.
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
    """Tasks that a restore leaves behind become our children (prctl(2)); none of them outlives us."""
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
    """Tools that have shown to work here; says why others have not. Raises DemoError."""
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
    raise AssertionError("there is always one to try")


def candidates(wanted: Path | None) -> list[Path]:
    """Where a CRIU is, the preferred one first."""
    if wanted is not None:
        return [wanted]
    fetched = Path(os.environ.get("LAZYPAGES_CRIU_DIR", FETCHED_CRIU))
    found = [os.environ.get("LAZYPAGES_CRIU"), shutil.which("criu"), *CRIU_PLACES]
    found += sorted(fetched.glob("*/criu"), reverse=True)
    return list(dict.fromkeys(Path(path) for path in found if path and os.access(path, os.X_OK)))


def try_out(tools: Tools, folder: Path) -> None:
    """A small task there and back again, without laziness. Raises DemoError if that does not work."""
    folder.mkdir()
    with Task(folder / "task", MIB) as task:
        task.wait_filled()
        tools.take(task.pid, folder / "images")
        task.wait_taken()
        task.let_go()
        tools.bring_back(folder / "images", lazily=False)
        if task.verdict()["wrong"]:
            raise DemoError(f"{tools.name} restores other bytes than it has dumped")


@contextmanager
def serving(images: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``lazypages serve`` on that directory, ready for a restore; what it says goes where ours goes."""
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
                    server.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def show(tools: Tools, folder: Path, nr_bytes: int) -> None:
    """The demo itself. Raises DemoError."""
    images = folder / "images"
    with ExitStack() as stack:
        step = Step(f"1. A task fills {size(nr_bytes)} of memory")
        # Ended before the server on the way out: a task that is gone needs nothing from it.
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
        code = server.wait(PATIENCE)
    report(verdict, code, started, nr_bytes)


def report(verdict: dict[str, Any], code: int, started: float, nr_bytes: int) -> None:
    """The task's words. Raises DemoError if it found anything wrong, or the server did."""
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
        raise DemoError(f"lazypages serve ended with {code}")
    click.secho("Every byte is what it was when the task was checkpointed.", fg="green", bold=True)
