"""A PostgreSQL, and clients that write and know what has to be in it."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import psycopg

from tests.support.clients import Working
from tests.support.compiling import PROGRAMS, compiled
from tests.support.processes import wait_for

PORT = 5432
NOBODY = 65534
WRITERS = 3
BULK = 20_000
"""Rows that do not change."""
OPEN = 1000
"""Rows of the transaction that is in progress."""

TABLES = f"""
create table bulk as select n, md5(n::text) || repeat('x', n % 500) as text from generate_series(1, {BULK}) n;
create table counters (writer int primary key, n int not null);
insert into counters select writer, 0 from generate_series(0, {WRITERS - 1}) writer;
create table lines (writer int, n int, text text, primary key (writer, n));
create extension amcheck;
"""
DIGEST = "select md5(string_agg(n || text, ',' order by n)) from bulk"
LINES = "select count(*) from lines"
WRONG_LINES = "select count(*) from lines where text <> repeat(md5(writer || '-' || n), 5)"
NEXT = "update counters set n = n + 1 where writer = %s returning n"
LINE = """
insert into lines select %(writer)s, n, repeat(md5(%(writer)s::int || '-' || n), 5)
from generate_series(%(first)s::int, %(last)s::int) n
"""
CHECK_INDEXES = """
select bt_index_check(c.oid, true) from pg_class c join pg_am on pg_am.oid = relam
where amname = 'btree' and relpersistence = 'p'
"""
WRONG_TABLES = """
select relname, msg from pg_class, verify_heapam(pg_class.oid::regclass) where relkind = 'r' and relpersistence = 'p'
"""


def server(folder: Path, address: str = "") -> list[str | Path]:
    """Makes a database in ``folder``: the command that starts its server.

    It listens at ``address``, or at a Unix socket in ``folder`` only. PostgreSQL refuses to run as root, but CRIU
    without CAP_SYS_RESOURCE dumps no process of another user (docs/backend.md): so we only say that it is another user.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    assert found, "there is no PostgreSQL: install Debian's package postgresql"
    programs, data = found[-1], folder / "data"
    start = ["env", "-i", f"LD_PRELOAD={compiled(PROGRAMS / 'not_root.c', '-shared', '-fPIC')}", "LC_ALL=C"]
    data.mkdir(0o700)
    os.chown(data, NOBODY, NOBODY)
    initdb = [programs / "initdb", "-D", data, "-U", "test", "-A", "trust", "-k", "-N", "--no-locale"]
    made = subprocess.run(
        [*start, *initdb], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stderr.decode()
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet trust\n")
    settings = {
        "listen_addresses": address,
        "unix_socket_directories": "" if address else folder,
        "port": PORT,
        "shared_buffers": "32MB",
        "huge_pages": "off",
        "fsync": "off",
        "autovacuum_naptime": "1s",
    }
    return [
        *start,
        programs / "postgres",
        "-D",
        data,
        *(f"--{name}={value}" for name, value in settings.items()),
    ]


class Clients(Working):
    """See ``tests.support.clients.Clients``. One is in the middle of a transaction."""

    counted = WRITERS

    def __init__(self, host: str) -> None:
        """``host``: the server's address, or the directory of its Unix socket."""
        super().__init__()
        self._where = f"host={host} port={PORT} user=test dbname=postgres"
        self._connections: list[psycopg.Connection] = []

    def open(self) -> None:
        wait_for("PostgreSQL to answer", self._connect)
        while len(self._connections) < WRITERS + 2:
            assert self._connect()
        self._reader, self._open, *self._writers = self._connections
        self._reader.execute(TABLES)
        self._digest = self._ask(DIGEST)

    def _connect(self) -> bool:
        try:
            self._connections.append(psycopg.connect(self._where, autocommit=True))
        except psycopg.OperationalError:
            return False
        return True

    def load(self) -> None:
        self._open.execute("begin")
        self._open.execute(LINE, {"writer": -1, "first": 1, "last": OPEN})
        writers = [partial(self._write, writer) for writer in range(WRITERS)]
        self.work([*writers, self._come_and_go])

    def _write(self, writer: int, written: int) -> None:
        """One transaction. ``NEXT`` counts those that the server has committed."""
        connection, line = self._writers[writer], written + 1
        with connection.transaction():
            assert connection.execute(NEXT, [writer]).fetchone() == (line,)
            connection.execute(LINE, {"writer": writer, "first": line, "last": line})

    def _come_and_go(self, _: int) -> None:
        """A connection, and so a process of the server, that is over soon. One that is being made may be lost."""
        where = f"{self._where} connect_timeout=2"
        with suppress(psycopg.OperationalError), psycopg.connect(where) as connection:
            assert connection.execute("select n from bulk where n = 1").fetchone() == (1,)

    def check(self) -> None:
        self.end_work()
        lines = self.answered()
        assert self._ask(LINES) == lines
        assert self._ask(LINES, self._open) == lines + OPEN
        self._open.execute("commit")
        assert self._ask(LINES) == lines + OPEN
        assert self._connect()
        self._reader = self._connections[-1]
        assert self._ask(WRONG_LINES) == 0
        assert self._ask(DIGEST) == self._digest
        self._reader.execute("checkpoint")
        self._reader.execute(CHECK_INDEXES)
        assert self._reader.execute(WRONG_TABLES).fetchall() == []

    def _ask(self, query: str, connection: psycopg.Connection | None = None) -> object:
        (answer,) = (connection or self._reader).execute(query).fetchone()
        return answer

    def close(self) -> None:
        for connection in self._connections:
            hang_up(connection)  # wakes up a thread that waits for an answer
        super().close()
        for connection in self._connections:
            connection.close()


def hang_up(connection: psycopg.Connection) -> None:
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)
