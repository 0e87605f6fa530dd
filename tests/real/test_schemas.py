"""What a daemon really says and takes is what docs/schemas describes. (Statistics: each test that reads them.)"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from tests.support import schemas
from tests.support.fake import BASE, PAGE
from tests.support.processes import wait_for
from tests.support.resident import connect, daemon, restored


class _Checked:
    """A connection on which all that is said has a schema. Lines of logs are counted."""

    def __init__(self, path: Path) -> None:
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.settimeout(60)
        self._peer.connect(str(path))
        self._stream = self._peer.makefile()
        self.logs = 0

    def ask(self, do: str, answer: str, fds: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
        """`answer`: the part of the schema that it must have."""
        request = {"id": [do], "do": do, **fields}
        schemas.check("daemon-request.json", request)
        socket.send_fds(self._peer, [json.dumps(request).encode() + b"\n"], fds)
        while True:
            line: dict[str, Any] = json.loads(self._stream.readline())
            if "log" not in line:
                break
            schemas.check("daemon-answer.json#/$defs/log", line)
            self.logs += 1
        schemas.check(f"daemon-answer.json#/$defs/{answer}", line)
        return line

    def close(self) -> None:
        self._stream.close()
        self._peer.close()


def test_all_requests_and_answers(restored_program: Path, tmp_path: Path) -> None:
    with daemon(tmp_path) as resident, restored(tmp_path / "r", restored_program, 2, 50) as tasks:
        client = _Checked(resident.socket)
        directory = os.open(tmp_path / "r", os.O_PATH)
        try:
            number = client.ask(
                "serve",
                "serve",
                fds=(directory,),
                images={"fd": True},
                work=str(tmp_path / "r"),
                background=False,
                sources=[f"local:{tmp_path}/r"],
                trace=str(tmp_path / "trace"),
                log="debug",
            )["restore"]
        finally:
            os.close(directory)
        client.ask("status", "status")
        client.ask("status", "one", restore=number)
        client.ask("first", "refusal", restore=number, pid=tasks.pids[0], start=BASE, end=BASE + PAGE)
        connect(tasks, tmp_path / "r")
        tasks.say("touch 5")
        wait_for("the end of the restore", lambda: resident.status()[number]["state"] == "serving")
        client.ask("first", "done", restore=number, pid=tasks.pids[0], start=BASE, end=BASE + PAGE)
        client.ask("status", "one", restore=number)
        client.ask("complete", "done", restore=number)
        assert client.ask("wait", "one", restore=number)["summary"]["ok"]
        client.ask("stop", "done", restore=number, now=False)
        client.ask("wait", "refusal", restore=number + 1)
        client.ask("serve", "refusal", images=str(tmp_path))
        client.ask("status", "status")
        assert client.logs > 2
        client.ask("shutdown", "shutdown")
        client.close()
        assert resident.wait() == 0
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
