"""Real stores for packed checkpoints, and a proxy that does to their answers what bad stores do."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import obstore
from obstore.store import S3Store

from tests.support.nginx import temporary
from tests.support.processes import tail, wait_for
from tests.support.remote import free_port

WEED = Path(sys.executable).parent / "weed"
KEYS = {"accessKey": "lazypages", "secretKey": "only for tests"}
BUCKET = "checkpoints"


@dataclass(frozen=True)
class Store:
    """An S3 API at a port of this machine. ``environment``: as a program needs it to use that."""

    port: int

    def environment(self, port: int | None = None) -> dict[str, str]:
        """`port`: of a proxy before it."""
        return {
            "AWS_ACCESS_KEY_ID": KEYS["accessKey"],
            "AWS_SECRET_ACCESS_KEY": KEYS["secretKey"],
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    @property
    def bucket(self) -> S3Store:
        return S3Store(
            BUCKET,
            endpoint=f"http://127.0.0.1:{self.port}",
            access_key_id=KEYS["accessKey"],
            secret_access_key=KEYS["secretKey"],
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def put(self, key: str, data: bytes) -> str:
        """Its address."""
        obstore.put(self.bucket, key, data)
        return f"s3://{BUCKET}/{key}"

    def delete(self, key: str) -> None:
        obstore.delete(self.bucket, key)


@contextmanager
def started(command: list[str], log: Path, port: int) -> Iterator[None]:
    """A server that runs until the end of the block; it has no --status-fd."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def answers() -> bool:
        assert process.poll() is None, tail(log)
        time.sleep(0.02)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status > 0
        except OSError:
            return False
        finally:
            connection.close()

    try:
        wait_for(f"an answer of {command[0]}", answers, timeout=60)
        yield
    finally:
        process.kill()  # it would take seconds to end by itself
        process.wait()


@contextmanager
def seaweed(folder: Path) -> Iterator[Store]:
    """SeaweedFS, with its S3 API: a whole object store in one process, ready in one to three seconds."""
    config = folder / "s3.json"
    who = {"name": "tests", "credentials": [KEYS], "actions": ["Admin", "Read", "Write", "List"]}
    config.write_text(json.dumps({"identities": [who]}))
    (data := folder / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    ports = {name: free_port() for part in names for name in (f"{part}.port", f"{part}.port.grpc")}
    command = [str(WEED), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [f"-s3.config={config}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=16"]
    with started(command, folder / "log", ports["s3.port"]):
        yield Store(ports["s3.port"])


@contextmanager
def nginx(root: Path, work: Path) -> Iterator[str]:
    """Serves the files in `root`; its address, without a slash at the end."""
    port = free_port()
    (work / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {work}/pid; error_log stderr;
        events {{ worker_connections 64; }}
        http {{
            access_log off; {temporary(work)}
            server {{ listen 127.0.0.1:{port}; root {root}; }}
        }}
        """
    )
    with started(["nginx", "-p", str(work), "-c", str(work / "nginx.conf")], work / "log", port):
        yield f"http://127.0.0.1:{port}"


#: What may befall an answer: the server fails, asks for patience, ends early, has other bytes, is slow, or stops.
ILLS = ("500", "503", "cut", "wrong", "drip", "stall")

Plan = Callable[[], str]


class BadStore(ThreadingHTTPServer):
    """A proxy before a store at `port`. `plan` is asked for each GET of a range while `armed`: one of ILLS, or "".

    `seen`: how often each was done.
    """

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, port: int, plan: Plan) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.plan = port, plan
        self.port = self.server_address[1]
        self.armed = threading.Event()
        self.stopping = threading.Event()
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join(30)
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that has gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadStore
    timeout = 5

    def do_HEAD(self) -> None:
        self._pass("")

    def do_GET(self) -> None:
        ill = ""
        if self.server.armed.is_set() and self.headers.get("range"):
            with self.server.lock:
                ill = self.server.plan()
                self.server.seen[ill] += 1
        if ill in {"500", "503"}:
            self.send_response(int(ill))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._pass(ill)

    def _pass(self, ill: str) -> None:
        target = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=30)
        try:
            target.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                target.putheader(name, value)
            target.endheaders()
            answer = target.getresponse()
            body = answer.read()
        finally:
            target.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"connection", "transfer-encoding", "date", "server"}:
                self.send_header(name, value)
        self.end_headers()
        self._send(body, ill)

    def _send(self, body: bytes, ill: str) -> None:
        half = len(body) // 2
        match ill:
            case "cut":
                self.wfile.write(body[:half])
                self.close_connection = True
            case "wrong":
                self.wfile.write(body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :])
            case "drip":
                for at in range(0, len(body), 1000):
                    self.wfile.write(body[at : at + 1000])
                    if self.server.stopping.wait(0.02):
                        return
            case "stall":
                self.wfile.write(body[:half])
                self.server.stopping.wait(20)
                self.close_connection = True
            case _:
                self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `seen`."""
