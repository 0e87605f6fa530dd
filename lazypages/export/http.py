"""Answers HTTP requests for metrics, in the event loop. One request a connection.

A scraper can take neither the descriptors nor the time of the restores: few connections are open at once, each for a
limited time, and few are accepted in a second.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import anyio
import h11

from lazypages.export.options import MAX_SCRAPERS

log = logging.getLogger("lazypages")

#: Seconds for a whole exchange: the request, and taking the answer.
TIME_LIMIT = 5.0

#: Seconds between two connections, and after a failure to accept one.
ACCEPT_PAUSE = 0.01
FAILURE_PAUSE = 1.0

#: Longest head of a request in bytes.
MAX_REQUEST = 8192


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


async def answer_http(listener: socket.socket, metrics: Callable[[str], Awaitable[Answer]]) -> None:
    """Answer at `listener` until it is cancelled. ``metrics`` gets the header Accept."""
    listener.setblocking(False)
    slots = anyio.Semaphore(MAX_SCRAPERS)
    async with anyio.create_task_group() as group:
        while True:
            await slots.acquire()
            peer = await _accept(listener)
            group.start_soon(_serve, peer, metrics, slots)
            await anyio.sleep(ACCEPT_PAUSE)


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        await anyio.wait_readable(listener)
        try:
            peer, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            continue
        except OSError as error:
            log.warning("cannot accept a connection for metrics: %s", error.strerror)
            await anyio.sleep(FAILURE_PAUSE)
            continue
        peer.setblocking(False)
        return peer


async def _serve(
    peer: socket.socket, metrics: Callable[[str], Awaitable[Answer]], slots: anyio.Semaphore
) -> None:
    try:
        with anyio.move_on_after(TIME_LIMIT):
            await _exchange(peer, metrics)
    except OSError:  # the client is gone
        pass
    except Exception:
        log.exception("metrics could not be given")
    finally:
        peer.close()
        slots.release()


async def _exchange(peer: socket.socket, metrics: Callable[[str], Awaitable[Answer]]) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await _receive(peer))
    except h11.RemoteProtocolError as error:
        answer = _text(error.error_status_hint, "not a request of HTTP/1.1 that is answered here")
    else:
        if not isinstance(event, h11.Request):
            return  # it sent nothing
        answer = await _answer(event, metrics)
    head = h11.Response(
        status_code=answer.status,
        headers=[
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            ("Connection", "close"),
        ],
    )
    for part in (head, h11.Data(data=answer.body), h11.EndOfMessage()):
        await _send(peer, connection.send(part) or b"")


async def _answer(request: h11.Request, metrics: Callable[[str], Awaitable[Answer]]) -> Answer:
    if request.method != b"GET":
        return _text(405, "" if request.method == b"HEAD" else "only GET is answered")
    if request.target.partition(b"?")[0] != b"/metrics":
        return _text(404, "the metrics are at /metrics")
    accepted = [value.decode("latin-1") for name, value in request.headers if name == b"accept"]
    return await metrics(",".join(accepted))


def _text(status: int, text: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", f"{text}\n".encode() if text else b"")


async def _receive(peer: socket.socket) -> bytes:
    while True:
        try:
            return peer.recv(MAX_REQUEST)
        except BlockingIOError:
            await anyio.wait_readable(peer)


async def _send(peer: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[peer.send(rest, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            await anyio.wait_writable(peer)
