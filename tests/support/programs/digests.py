"""Threads that compute, slowly until there is a file "go" here; what it prints depends on nothing."""

import hashlib
import os
import threading
import time

rows: list[list[str]] = [[] for _ in range(4)]


def work(number: int) -> None:
    digest = str(number).encode()
    for turn in range(4_000):
        for _ in range(10):
            digest = hashlib.sha256(digest).digest()
        if turn % 100 == 0:
            rows[number].append(digest.hex())
        if not os.path.exists("go"):
            time.sleep(0.005)


threads = [threading.Thread(target=work, args=[number]) for number in range(len(rows))]
for thread in threads:
    thread.start()
while not all(rows):
    time.sleep(0.001)
print("begun", flush=True)
for thread in threads:
    thread.join()
for row in rows:
    print(*row)
