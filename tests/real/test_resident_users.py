"""Users of the resident daemon who are not root: what they may have served, see and stop, and what not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazypages.resident.client import Client, RefusedError
from tests.support.fake import Restored, restored_tasks, write_images
from tests.support.processes import wait_for
from tests.support.resident import Daemon, connect, daemon

ALICE, BOB = 61_001, 61_002
PAGES = 50

#: A restorer needs CAP_SYS_PTRACE for a userfaultfd that reports forks (userfaultfd(2)), as CRIU does for its own work.
AS_ALICE = f"""#!/bin/sh
exec setpriv --reuid {ALICE} --regid {ALICE} --clear-groups --inh-caps +sys_ptrace --ambient-caps +sys_ptrace \
    %s "$@"
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def resident(place: Path) -> Iterator[Daemon]:
    with daemon(place, "--all-users", "--max-restores", "8") as started:
        yield started


def as_user(uid: int, act: Callable[[], Any]) -> Any:
    """What `act` returns in a process of that user, or the code of the daemon's refusal and its text."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            try:
                said = act()
            except RefusedError as error:
                said = [error.code, str(error)]
            os.write(writer, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def ask(resident: Daemon, uid: int, do: str, fds: tuple[int, ...] = (), **fields: Any) -> Any:
    def act() -> Any:
        with Client(resident.socket) as client:
            return client.request(do, fds, **fields)

    return as_user(uid, act)


def images(folder: Path, pids: list[int], uid: int, mode: int = 0o700) -> Path:
    """A checkpoint that belongs to this user."""
    folder.mkdir()
    write_images(folder, pids, PAGES)
    for path in (folder, *folder.iterdir()):
        os.chown(path, uid, uid)
    folder.chmod(mode)
    return folder


@pytest.fixture
def tasks(place: Path, restored_program: Path) -> Iterator[Restored]:
    """Alice's."""
    shutil.copy(restored_program, place / "restored")
    script = place / "as-alice"
    script.write_text(AS_ALICE % (place / "restored"))
    for path in (script, place / "restored"):
        path.chmod(0o755)
    with restored_tasks(script, 2, PAGES) as found:
        yield found


@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_a_restore_of_a_user(by: str, resident: Daemon, tasks: Restored, place: Path) -> None:
    """Only this user and root see it; and this user does not see those of others."""
    folder = images(place / "alice", tasks.pids, ALICE)
    other = images(place / "other", [4711], 0)
    roots = resident.serve(other)
    if by == "path":
        served = ask(resident, ALICE, "serve", images=str(folder), background=False)
    else:
        fd = os.open(folder, os.O_PATH)
        served = ask(resident, ALICE, "serve", (fd,), images={"fd": True}, background=False)
        os.close(fd)
    number = served["restore"]
    path = folder / "lazy-pages.socket"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (ALICE, 0o600)

    for uid, theirs, mine in ((BOB, number, []), (ALICE, roots, [number])):
        assert [one["restore"] for one in ask(resident, uid, "status")["restores"]] == mine
        for do, fields in (
            ("status", {}),
            ("wait", {}),
            ("complete", {}),
            ("stop", {"now": True}),
            ("first", {"pid": 1, "start": 0, "end": 4096}),
        ):
            assert ask(resident, uid, do, restore=theirs, **fields)[0] == "not-found"
        assert ask(resident, uid, "shutdown")[0] == "refused"

    connect(tasks, folder)
    tasks.say("touch 10")
    assert resident.status()[number]["user"] == ALICE
    assert ask(resident, ALICE, "complete", restore=number)["ok"]
    tasks.say("check")
    assert tasks.statuses() == [0, 0]
    assert ask(resident, ALICE, "wait", restore=number)["exit"] == 0
    resident.request("stop", restore=roots)


def test_another_user_s_restorer(resident: Daemon, place: Path) -> None:
    """Is not accepted, even where permissions would let it in."""
    folder = images(place / "alice", [4711], ALICE, 0o755)
    number = ask(resident, ALICE, "serve", images=str(folder))["restore"]
    (folder / "lazy-pages.socket").chmod(0o666)

    def connect() -> str:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(folder / "lazy-pages.socket"))
            peer.settimeout(30)
            return peer.recv(1).decode()

    assert as_user(BOB, connect) == ""
    assert ask(resident, ALICE, "status", restore=number)["state"] == "waiting"
    ask(resident, ALICE, "stop", restore=number)


def test_what_a_user_can_t_read(resident: Daemon, place: Path) -> None:
    """Directly, by links in a directory of this user, by descriptors of directories, and by those of the daemon."""
    (place / "hidden").mkdir(mode=0o700)  # only this hides the files in it
    secret = images(place / "hidden" / "secret", [4711], 0, 0o755)
    for path in secret.iterdir():
        path.chmod(0o644)
    private = images(place / "private", [4711], 0, 0o755)
    for path in private.iterdir():
        path.chmod(0o600)
    own = images(place / "own", [4711], ALICE)
    with resident.client() as client:
        directory = os.open(secret, os.O_PATH)
        hidden = client.request("serve", [directory], images={"fd": True})["restore"]
        os.close(directory)

    def refused(text: str, *requests: dict[str, Any]) -> None:
        def act() -> list[list[str]]:
            said = []
            with Client(resident.socket) as client:
                for request in requests:
                    try:
                        said.append(["served", str(client.request("serve", **request))])
                    except RefusedError as error:
                        said.append([error.code, str(error)])
            return said

        for code, message in as_user(ALICE, act):
            assert code in {"failed", "refused"}, message
            assert text in message

    refused("ermission denied", {"images": str(secret)}, {"images": str(private)})
    fd = os.open(private, os.O_PATH)
    code, message = ask(resident, ALICE, "serve", (fd,), images={"fd": True})
    assert (code, "ermission denied" in message) == ("failed", True)
    os.close(fd)
    # the directory of another user, whose files anybody could read who gets there
    ours = [
        f"/proc/self/fd/{fd}"
        for fd in os.listdir(f"/proc/{resident.pid}/fd")
        if os.path.realpath(f"/proc/{resident.pid}/fd/{fd}") == str(secret)
    ]
    assert ours
    for name in ("inventory.img", "pages-1.img", "pagemap-4711.img", "mm-4711.img"):
        file = own / name
        file.rename(own / "kept")
        file.symlink_to(private / name)
        refused("ermission denied", {"images": str(own)})
        file.unlink()
        file.symlink_to(f"{ours[0]}/{name}")
        refused("Too many levels of symbolic links", {"images": str(own)})
        file.unlink()
        (own / "kept").rename(file)
    refused("Too many levels", *({"images": path} for path in ours))
    refused("Too many levels", *({"images": str(own), "work": path} for path in ours))
    parent = own / "parent"
    parent.symlink_to(secret)
    refused("ermission denied", {"images": str(own)})
    parent.unlink()
    refused("cannot create", {"images": str(own), "work": str(private)})
    refused("ermission denied", {"images": str(own), "sources": [f"local:{secret}"]})
    refused("Too many levels", *({"images": str(own), "sources": [f"local:{path}"]} for path in ours))
    refused(
        "connects to no page server",
        {"images": str(own), "sources": ["tcp://127.0.0.1:1"]},
        {"images": str(own), "sources": ["unix:/run/x"]},
    )
    refused("writes no trace", {"images": str(own), "trace": "/etc/trace"})
    os.mkfifo(place / "fifo")
    (place / "fifo").chmod(0o666)
    (own / "pstree.img").unlink()
    (own / "pstree.img").symlink_to(place / "fifo")
    refused("not a regular file", {"images": str(own)})
    assert resident.status()[hidden]["state"] == "waiting"
    resident.request("stop", restore=hidden)
    resident.request("wait", restore=hidden)
    assert resident.request("status")["limits"]["restores"]["used"] == 0


def test_paths_that_change(resident: Daemon, place: Path) -> None:
    """While the daemon opens files, their names lead to those of root and back: none of root's is ever opened."""
    private = images(place / "private", [4711], 0, 0o755)
    for path in private.iterdir():
        path.chmod(0o600)
    own = images(place / "own", [4711], ALICE)
    path, link = place / "images", place / "link"
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for target in (private, own):
                link.symlink_to(target)
                link.rename(path)

    path.symlink_to(own)
    swapping = threading.Thread(target=swap)
    swapping.start()
    served = 0

    def attempt() -> int:
        """Whether the last one was served."""
        number = 0
        with Client(resident.socket) as client:
            for _ in range(20):
                try:
                    number = client.request("serve", images=str(path), work=str(own))["restore"]
                    break
                except RefusedError:
                    continue
        return number

    try:
        for _ in range(10):
            if number := as_user(ALICE, attempt):
                served += 1
                assert not [name for name in resident.descriptors() if name.startswith(str(private))]
                resident.request("stop", restore=number)
                resident.request("wait", restore=number)
    finally:
        over.set()
        swapping.join()
    assert served


def test_one_user_can_t_take_all(resident: Daemon, place: Path) -> None:
    """A quarter of the restores and of the clients; root has the rest."""
    folder = images(place / "alice", [4711], ALICE)
    works = [place / f"w{number}" for number in range(4)]
    for work in works:
        work.mkdir()
        os.chown(work, ALICE, ALICE)
    for work in works[:2]:
        assert ask(resident, ALICE, "serve", images=str(folder), work=str(work))["ok"]
    code, text = ask(resident, ALICE, "serve", images=str(folder), work=str(works[2]))
    assert (code, text) == ("limit", f"user {ALICE} has 2 restores: try again when one of them has ended")
    resident.serve(folder, work=str(works[3]))

    def many() -> Any:
        clients = [Client(resident.socket) for _ in range(17)]
        return clients[-1].request("status")

    assert as_user(ALICE, many)[0] == "limit"
    wait_for("its clients to be gone", lambda: isinstance(ask(resident, ALICE, "status"), dict))
    assert resident.request("status")["limits"]["restores"] == {"used": 3, "max": 8}
    for number in (1, 2, 3):
        resident.request("stop", restore=number)


def test_too_much_memory(place: Path, restored_program: Path) -> None:
    with daemon(place, "--max-memory", "1") as resident, restored_tasks(restored_program, 70, 1) as found:
        folder = images(place / "many", found.pids, 0)
        with pytest.raises(RefusedError, match=r"needs 1\.\d MiB, 0 B of 1.0 MiB .* --max-memory") as refused:
            resident.serve(folder)
        assert refused.value.code == "limit"
        memory = resident.request("status")["limits"]["memory"]
        assert memory == {"used": 0, "max": 1 << 20}


def test_a_daemon_that_can_t_act_as_users(place: Path) -> None:
    """As the systemd unit bounds its capabilities. The daemon ended at its first client, and the guard killed tasks."""
    command = [sys.executable, "-m", "lazypages", "daemon", "--all-users", "--socket", str(place / "socket")]
    ended = subprocess.run(
        ["setpriv", "--bounding-set", "-setuid,-setgid", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "start it with CAP_SETUID and CAP_SETGID" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
