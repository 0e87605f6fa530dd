"""``lazypages serve --via``: hands a restore over to the resident daemon, and behaves as if it served it itself."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lazypages.errors import LazyPagesError
from lazypages.logs import LEVELS, MESSAGE
from lazypages.resident import protocol
from lazypages.resident.client import Client, ClientError

if TYPE_CHECKING:
    from lazypages.cli.remote_options import Sources

log = logging.getLogger("lazypages")

#: The log level of the restore's lines by our verbosity.
_WANTED = (None, *protocol.LEVELS)

#: As lazypages.cli.serve._begin.
Begin = Callable[[Sequence[Callable[[], None]], Sequence[str]], None]


class Handed:
    """A restore that the resident daemon serves for us. The constructor raises LazyPagesError."""

    def __init__(
        self,
        via: Path,
        images_dir: Path,
        work_dir: Path,
        sources: Sources,
        *,
        background: bool,
        trace: Path | None,
        verbosity: int,
    ) -> None:
        self._signals = 0
        self._restore: int | None = None
        self._client = Client(via, _log)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        # A terminal that is closed must not take the exit status with it.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        places, fds = _places(sources)
        try:
            answer = self._client.request(
                "serve",
                fds,
                images=os.fspath(images_dir),
                work=os.fspath(work_dir),
                background=background,
                trace=trace and os.fspath(trace),
                log=_WANTED[verbosity],
                sources=places,
                **_remote(sources),
            )
        except BaseException:
            self._client.__exit__()
            raise
        finally:
            for fd in fds:  # the daemon's from here on, as is their end
                os.close(fd)
        self._restore = answer["restore"]
        self._invitation = answer["message"]
        self._problems = answer["problems"]
        for before in range(self._signals):  # those that came before we knew the restore's number
            self._stop(now=before > 0)

    def abandon(self) -> None:
        """End it: no restore can be started."""
        self._client.request("stop", restore=self._restore, now=True)

    def wait(self, begin: Begin, ready: Sequence[Callable[[], None]]) -> dict[str, Any]:
        """Signal readiness with `begin`, wait for the end; return its `exit` and `summary`. Raises LazyPagesError."""
        begin([lambda: log.log(MESSAGE, "%s", self._invitation), *ready], self._problems)
        result = self._client.request("wait", restore=self._restore)
        if result["error"]:
            raise LazyPagesError(result["error"])
        return result

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """As stand-alone: the first signal completes the tasks, the second kills them."""
        self._signals += 1
        if self._restore is not None:
            self._stop(now=self._signals > 1)

    def _stop(self, *, now: bool) -> None:
        try:
            self._client.send("stop", restore=self._restore, now=now)
        except ClientError as error:
            log.error("%s", error)


def _log(level: str, text: str) -> None:
    log.log(LEVELS.get(level, logging.ERROR), "%s", text)


def _places(sources: Sources) -> tuple[list[Any], list[int]]:
    """Sources as in the protocol, and the descriptors that belong to them."""
    from lazypages.net.url import ConnectedSocket, UnixServer  # noqa: PLC0415 - keeps the start short

    places: list[Any] = [f"local:{directory.absolute()}" for directory in sources.directories]
    fds: list[int] = []
    for server in sources.page_servers:
        if isinstance(server, ConnectedSocket):
            places.append({"fd": True})
            fds.append(server.fd)
        elif isinstance(server, UnixServer):
            places.append(f"unix:{server.path.absolute()}")
        else:
            places.append(str(server))
    return places, fds


def _remote(sources: Sources) -> dict[str, Any]:
    if sources.remote is None:
        return {}
    tls = sources.remote.tls
    return {
        "protocol": sources.remote.layout and sources.remote.layout.value,
        "source_deadline": sources.remote.deadline,
        "tls": tls
        and {
            "cacert": tls.cacert and os.fspath(tls.cacert.absolute()),
            "cert": os.fspath(tls.cert.absolute()),
            "key": os.fspath(tls.key.absolute()),
            "cacrl": tls.cacrl and os.fspath(tls.cacrl.absolute()),
            "check_name": tls.check_name,
        },
    }
