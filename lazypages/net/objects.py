"""One object in a store (``s3:``, ``gs:``, ``az:``, ``http:``, ``https:``), read in ranges through the package obstore.

The object is pinned: each read asks for the version or the ETag that the object had when it was opened, so another one
at the same place is an error and never mixed with it. Where credentials come from, obstore decides: the environment,
as the store's own tools have it, or the metadata service of the machine.

obstore's async functions need asyncio's loop (trio: "no running event loop"): call ``read_async`` under that.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from lazypages.net.link import HopelessError, LinkError

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

# s: to connect; between two pieces of an answer; for a whole answer of up to 4 MiB. A read that takes longer is given
# up and made again.
CONNECT_TIMEOUT: Final = 5
STALL_TIMEOUT: Final = 3
READ_TIMEOUT: Final = 30
# Of one read, after a failure of the connection or of the server (5xx). Then the channel ends; the pool makes another.
RETRIES: Final = 3
RETRIES_TIMEOUT: Final = 15  # s
FIRST_PAUSE: Final = 0.1  # s
LONGEST_PAUSE: Final = 2  # s


class _Key:
    """A key in a store, which may have an object or not. ``stall``: s between two pieces of an answer.

    Raises HopelessError; ModuleNotFoundError.
    """

    def __init__(self, url: str, stall: int = STALL_TIMEOUT) -> None:
        import obstore  # noqa: PLC0415 - an extra

        self.url = url
        self.obstore = obstore
        parts = urlsplit(url)
        if parts.query or parts.fragment or not parts.netloc or not parts.path.strip("/"):
            raise HopelessError(
                f"{url}: is not the address of an object: expected {parts.scheme}://PLACE/KEY"
            )
        self.path = parts.path.removeprefix("/")
        if parts.scheme in {"http", "https"}:
            self.path = unquote(self.path)
        _start_runtime()
        try:
            self.store = _open(f"{parts.scheme}://{parts.netloc}", plain=parts.scheme == "http", stall=stall)
        except Exception as error:
            raise HopelessError(f"{url}: {_first_line(error)}") from None

    def failure(self, error: Exception) -> LinkError:
        if isinstance(error, self.obstore.exceptions.PreconditionError):
            return LinkError(f"{self.url}: has another object now than at the start")
        if isinstance(error, FileNotFoundError):
            return LinkError(f"{self.url}: no such object")
        return LinkError(f"{self.url}: {_first_line(error)}")


class StoredObject(_Key):
    """An object that is open. Raises LinkError; HopelessError if another attempt can't help; ModuleNotFoundError.

    Any number of reads may be under way at once, from any thread.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            meta = self.obstore.head(self.store, self.path)
        except Exception as error:
            raise self.failure(error) from None
        self.size: int = meta["size"]
        self._pinned = _pinned(meta)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on. Raises LinkError."""
        try:
            result = self.obstore.get(self.store, self.path, options=self._options(offset, size))
            data = bytes(result.bytes())
        except Exception as error:
            raise self.failure(error) from None
        return self._whole(data, size)

    async def read_async(self, offset: int, size: int) -> bytes:
        """The same, under asyncio."""
        try:
            result = await self.obstore.get_async(self.store, self.path, options=self._options(offset, size))
            data = bytes(await result.bytes_async())
        except Exception as error:
            raise self.failure(error) from None
        return self._whole(data, size)

    def _options(self, offset: int, size: int) -> GetOptions:
        return {**self._pinned, "range": (offset, offset + size)}

    def _whole(self, data: bytes, size: int) -> bytes:
        if len(data) != size:
            raise LinkError(f"{self.url}: {len(data)} bytes came, {size} were requested")
        return data


def check_free(url: str) -> None:
    """Raises LinkError if the key has an object, or that can't be found out."""
    key = _Key(url)
    try:
        key.obstore.head(key.store, key.path)
    except FileNotFoundError:
        return
    except Exception as error:
        raise key.failure(error) from None
    raise LinkError(f"{url}: exists already")


def upload(file: Path, url: str) -> None:
    """Puts the contents of a file there, large ones in several parts: whole or not at all. Raises LinkError."""
    key = _Key(url, READ_TIMEOUT)
    try:
        key.obstore.put(key.store, key.path, file)
    except Exception as error:
        raise key.failure(error) from None


def _open(place: str, *, plain: bool, stall: int) -> ObjectStore:
    """``plain``: HTTP without TLS is what the address says."""
    from obstore.store import from_url  # noqa: PLC0415

    # obstore takes its own variable into account only where no options are given
    plain = plain or any(
        os.environ.get(name, "").lower() in {"true", "1"} for name in ("AWS_ALLOW_HTTP", "ALLOW_HTTP")
    )
    options: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
            "read_timeout": timedelta(seconds=stall),
            "timeout": timedelta(seconds=READ_TIMEOUT),
            "allow_http": plain,
            # frames are compressed: a server must not do that again
            "default_headers": {"accept-encoding": "identity"},
        },
        "retry_config": {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=RETRIES_TIMEOUT),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_PAUSE),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE),
                "base": 2,
            },
        },
    }
    return from_url(place, **options)


def _start_runtime() -> None:
    """Starts obstore's threads with all signals blocked: signals are for the main thread, which may block them."""
    import obstore  # noqa: PLC0415 - an extra
    from obstore.store import MemoryStore  # noqa: PLC0415

    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        obstore.put(MemoryStore(), "nothing", b"")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pinned(meta: ObjectMeta) -> GetOptions:
    """What a read must ask for to get this object and no other one."""
    if (version := meta.get("version")) is not None:
        return {"version": version}
    tag = meta.get("e_tag")
    if tag is None or tag.startswith("W/"):  # RFC 9110, 13.1.1: a weak one never matches
        return {"if_unmodified_since": meta["last_modified"]}
    return {"if_match": tag}


def _first_line(error: Exception) -> str:
    """obstore's messages have the whole structure of an error behind the first line."""
    return str(error).partition("\n")[0].partition(": <?xml")[0].strip()
