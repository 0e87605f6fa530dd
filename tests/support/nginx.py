"""An nginx, and clients that keep their connections and know its right answers."""

from __future__ import annotations

import gzip
import random
import shutil
import socket
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

from tests.support.clients import Working
from tests.support.processes import wait_for

PORT = 8080
CLIENTS = 4
FILES = 20
LONG = 16 << 20
"""Bytes of the answer that is half read."""
READ = 100_000
"""Bytes of it that are read before the dump."""
TIMEOUT = 60.0

CONFIGURATION = """
user root;  # CRIU without CAP_SYS_RESOURCE dumps no process of another user (docs/backend.md)
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
events {{ worker_connections 100; }}
http {{
    access_log {folder}/access.log;
    {temporary}
    keepalive_requests 1000000;
    keepalive_timeout 1h;
    send_timeout 1h;
    gzip_types *;
    proxy_cache_path {folder}/cache keys_zone=cache:1m;
    upstream second {{
        server unix:{folder}/second;
        keepalive 4;
    }}
    server {{
        listen {listen};
        root {folder}/files;
        add_header Requests "$connection $connection_requests";
        location /compressed/ {{ alias {folder}/files/; gzip on; }}
        location /proxied/ {{
            proxy_pass http://second/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_cache cache;
        }}
    }}
    server {{
        listen unix:{folder}/second;
        root {folder}/files;
    }}
}}
"""
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def temporary(folder: Path) -> str:
    """The part of a configuration that has its temporary files in ``folder``."""
    return "".join(f"{kind}_temp_path {folder}/{kind};" for kind in TEMPORARY)


def content(name: str) -> bytes:
    """Of the file of that name: one that can be compressed, but not well."""
    chance = random.Random(name)
    size = LONG if name == "long" else chance.randrange(100, 200_000)
    return chance.randbytes(size // 2).hex().encode()


def names() -> list[str]:
    return [f"file{number}" for number in range(FILES)]


def server(folder: Path, address: str = "") -> list[str | Path]:
    """Makes its files in ``folder``: the command that starts it. It listens at ``address``, or a Unix socket there."""
    program = shutil.which("nginx")
    assert program is not None, "there is no nginx: install Debian's package nginx"
    files, configuration = folder / "files", folder / "nginx.conf"
    files.mkdir()
    for name in [*names(), "long"]:
        (files / name).write_bytes(content(name))
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder,
            listen=f"{address}:{PORT}" if address else f"unix:{folder}/first",
            temporary=temporary(folder),
        )
    )
    return [program, "-p", folder, "-e", folder / "error.log", "-c", configuration]


class Connection(HTTPConnection):
    """A connection that is made once: when it is lost, that is an error."""

    auto_open = 0

    def __init__(self, host: str) -> None:
        super().__init__(host, PORT, timeout=TIMEOUT)
        self._requests = 0
        self._number = ""

    def connect(self) -> None:
        if self.host.startswith("/"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(TIMEOUT)
            self.sock.connect(f"{self.host}/first")
        else:
            super().connect()

    def ask(self, path: str) -> HTTPResponse:
        """The beginning of the answer, of which nginx has said that it is the next one in this connection."""
        self.request("GET", path, headers={"Host": "server", "Accept-Encoding": "gzip"})
        answer = self.getresponse()
        assert answer.status == 200, answer.status
        number, _, requests = answer.headers["Requests"].partition(" ")
        self._requests += 1
        assert int(requests) == self._requests
        assert self._number in {"", number}
        self._number = number
        return answer


class Clients(Working):
    """See ``tests.support.clients.Clients``. One has read only the first bytes of a long answer."""

    def __init__(self, host: str) -> None:
        """``host``: the server's address, or the directory of its Unix socket."""
        super().__init__()
        self._connections = [Connection(host) for _ in range(CLIENTS + 1)]
        self._contents = {name: content(name) for name in names()}

    def open(self) -> None:
        for connection in self._connections:
            wait_for("nginx to listen", partial(_connects, connection))

    def load(self) -> None:
        self._half, *others = self._connections
        self._long = self._half.ask("/long")
        self._begin = self._long.read(READ)
        self.work([partial(self._get, connection) for connection in others])

    def _get(self, connection: Connection, number: int) -> None:
        name = names()[number % FILES]
        for place in ("", "compressed/", "proxied/"):
            answer = connection.ask(f"/{place}{name}")
            data = answer.read()
            if answer.headers["Content-Encoding"] == "gzip":
                data = gzip.decompress(data)
            else:
                assert place != "compressed/"
            assert data == self._contents[name], f"{place}{name}"

    def check(self) -> None:
        self.end_work()
        assert self._begin + self._long.read() == content("long")
        self._get(self._half, 0)

    def close(self) -> None:
        super().close()
        for connection in self._connections:
            connection.close()


def _connects(connection: Connection) -> bool:
    try:
        connection.connect()
    except OSError:
        return False
    return True
