"""A transaction that takes its time: `database.py FILE ROWS SECONDS GO`; says what is in the database at its end.

It rests after each row until there is a file of the name GO.
"""

import os
import sqlite3
import sys
import time

path, rows, pause, go = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
with sqlite3.connect(path, isolation_level=None) as database:
    database.execute(
        "pragma cache_size = 10"
    )  # so that pages go to the file in the middle of the transaction
    database.execute("create table numbers (number integer primary key, text text)")
    database.execute("insert into numbers values (-1, 'before')")
    database.execute("begin immediate")
    print("begun", flush=True)
    for row in range(rows):
        database.execute("insert into numbers values (?, ?)", (row, f"{row:0200d}"))
        if not os.path.exists(go):
            time.sleep(pause)
    database.execute("commit")
    print(database.execute("select count(*), sum(number), sum(length(text)) from numbers").fetchone())
    print(database.execute("pragma integrity_check").fetchone())
