"""What threads wait for in the kernel: evidence that something does not happen, without waiting a while for it.

A thread in handle_userfault() or userfaultfd_event_wait_completion() (fs/userfaultfd.c) sleeps until somebody answers
its page fault, reads its event, or closes the userfaultfd. Its kernel stack shows that (proc_pid_stack(5), for root).
"""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import descendants, wait_for

USERFAULT = ("handle_userfault", "userfaultfd_event_wait_completion", "dup_userfaultfd_complete")
POLLS = ("ep_poll", "do_epoll_wait", "do_sys_poll", "do_select", "do_poll")


def threads(pid: int) -> list[Path]:
    """/proc/PID/task/TID of each; none when it is gone."""
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def sleeps_in(thread: Path, functions: tuple[str, ...]) -> bool:
    """Whether a thread sleeps in one of these functions of the kernel."""
    try:
        asleep = (thread / "stat").read_text().rpartition(") ")[2][0] in "SD"
        stack = (thread / "stack").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return asleep and any(f" {name}" in stack for name in functions)


def misses_a_page(pid: int) -> bool:
    """Whether a thread of the process sleeps until its fault is answered, or its event read."""
    return any(sleeps_in(thread, USERFAULT) for thread in threads(pid))


def wait_for_faults(*pids: int) -> None:
    """Until each of the processes has such a thread: without an answer it goes no further."""
    for pid in pids:
        wait_for(f"a fault of {pid}", lambda pid=pid: misses_a_page(pid))


def runs(pid: int) -> bool:
    """Whether any thread of the process runs or could."""
    for thread in threads(pid):
        try:
            if (thread / "stat").read_text().rpartition(") ")[2][0] == "R":
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def wait_for_rest(*pids: int) -> None:
    """Until no thread of the processes could run: each waits for something, is stopped, or has ended."""
    wait_for(f"{pids} to wait", lambda: not any(map(runs, pids)))


def wait_for_rest_of_all() -> None:
    """The same for all that we have started."""
    wait_for("all to wait", lambda: not any(map(runs, descendants())))
