"""A transaction that waits in its middle for a file "go" here; then says what is in the database."""

import hashlib
import os
import sqlite3
import time

ROWS = 5_000

with sqlite3.connect("database", isolation_level=None) as database:
    # So that pages go to the file in the middle of the transaction.
    database.execute("pragma cache_size = 10")
    database.execute("create table texts (number integer primary key, text text)")
    database.execute("insert into texts values (-1, 'before')")
    database.execute("begin immediate")
    rows = ((number, "v" * (number % 300)) for number in range(ROWS))
    database.executemany("insert into texts values (?, ?)", rows)
    print("begun", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.001)
    database.execute("update texts set text = text || number where number % 7 = 0")
    database.execute("commit")
    print(*database.execute("pragma integrity_check").fetchone())
    digest = hashlib.sha256()
    for row in database.execute("select number, text from texts order by number"):
        digest.update(repr(row).encode())
    print(digest.hexdigest())
