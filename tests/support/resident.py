"""A resident daemon, and restores through it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazypages.resident.client import Client
from tests.support.fake import Restored, restored_tasks, write_images
from tests.support.processes import Server, nothing_left

LAZYPAGES = (sys.executable, "-X", "faulthandler", "-m", "lazypages")


class Daemon(Server):
    """`lazypages daemon`, with its socket and log in `folder`."""

    def __init__(self, folder: Path, *options: str, before: Sequence[str] = ()) -> None:
        self.socket = folder / "daemon.socket"
        self.log = folder / "daemon.log"
        super().__init__(
            [*before, *LAZYPAGES, "daemon", "--socket", str(self.socket), "-o", str(self.log), *options],
            output=folder / "daemon.out",
            logs=[self.log],
        )

    def client(self) -> Client:
        return Client(self.socket)

    def request(self, do: str, **fields: Any) -> dict[str, Any]:
        """On a connection of its own."""
        with self.client() as client:
            return client.request(do, **fields)

    def serve(self, images: Path, **fields: Any) -> int:
        """The number of the restore, which can be started."""
        return int(self.request("serve", images=str(images), **fields)["restore"])

    def status(self) -> dict[int, dict[str, Any]]:
        return {restore["restore"]: restore for restore in self.request("status")["restores"]}

    def descriptors(self) -> list[str]:
        """What is open, without the numbers."""
        links = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                links.append(re.sub(r":\[\d+\]", "", os.readlink(f"/proc/{self.pid}/fd/{fd}")))
            except FileNotFoundError:  # closed since
                continue
        return sorted(links)

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def resident_kib(self) -> int:
        """Private memory (VmRSS without files that are mapped), in KiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
        raise AssertionError("no RssAnon")


@contextmanager
def daemon(folder: Path, *options: str, before: Sequence[str] = ()) -> Iterator[Daemon]:
    """A daemon that clients can connect to. On the way out it is ended, with all else that was started meanwhile."""
    with nothing_left(), Daemon(folder, *options, before=before) as started:
        started.wait_ready()
        yield started


@contextmanager
def restored(folder: Path, program: Path, tasks: int, pages: int) -> Iterator[Restored]:
    """Tasks, and images of them in the new directory `folder`; nothing serves them yet."""
    folder.mkdir()
    with restored_tasks(program, tasks, pages) as found:
        write_images(folder, found.pids, pages)
        yield found


def connect(tasks: Restored, folder: Path) -> None:
    tasks.say(f"connect {folder}/lazy-pages.socket")
    tasks.say("finish")
