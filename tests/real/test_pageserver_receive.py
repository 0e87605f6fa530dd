"""Receive mode with clients that say anything: an error of ours, and nothing outside the directory."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images_spec.errors import ImageError
from lazypages.errors import LazyPagesError
from lazypages.net.tls_errors import explain_handshake
from lazypages.net.wire import PAGE_SIZE, ClientUsesTlsError, Command, Header, Layout
from lazypages.pageserver.receive import ImageReceiver, ReceiveConnection
from tests.support.pages import BASE, write_images

# mostly what makes sense, in senseless order
headers = st.builds(
    Header,
    st.sampled_from(Command),
    st.integers(0, 3) | st.just(0xFFFFFFFF),
    st.integers(0, 20).map(lambda page: BASE + page * PAGE_SIZE) | st.integers(0, (1 << 64) - 1),
    st.sampled_from([77 << 8 | 1, 5 << 8 | 2, 78 << 8 | 17]) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 7) | st.integers(0, 0xFFFF),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images`, whose parent has task 77."""
    directory = tmp_path_factory.mktemp("receive")
    write_images(directory / "parent", {77: [(0, 8), (12, 4)]})
    (directory / "images").mkdir()
    (directory / "images" / "parent").symlink_to("../parent")
    return directory


@given(
    st.lists(headers, max_size=8),
    st.binary(max_size=3 * PAGE_SIZE),
    st.sampled_from(Layout),
    st.booleans(),
)
@settings(deadline=None)
def test_any_client(
    directory: Path, messages: list[Header], tail: bytes, layout: Layout, auto_dedup: bool
) -> None:
    said = b""
    for message in messages:
        said += layout.pack(message) + bytes(min(message.payload, 4 * PAGE_SIZE))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answers = threading.Thread(target=_talk, args=(theirs, said + tail))
        answers.start()
        receiver = ImageReceiver(directory / "images", auto_dedup=auto_dedup)
        with suppress(LazyPagesError, ImageError):
            ReceiveConnection(ours, receiver).run()
        receiver.close()
        ours.shutdown(socket.SHUT_RDWR)
        answers.join(30)
        assert not answers.is_alive()
    assert sorted(os.listdir(directory)) == ["images", "parent"]
    assert sorted(os.listdir(directory / "parent")) == ["pagemap-77.img", "pages-1.img"]
    assert all(
        name == "parent" or name.startswith(("pagemap-", "pages-"))
        for name in os.listdir(directory / "images")
    )


def test_a_client_that_uses_tls(directory: Path) -> None:
    """It gets the alert by which it can say so: this server was started without --tls."""
    ours, theirs = socket.socketpair()
    context = ssl.create_default_context()
    context.check_hostname = False
    with ours, theirs:
        theirs.settimeout(30)
        with context.wrap_socket(theirs, do_handshake_on_connect=False) as client:
            receiver = ImageReceiver(directory / "images", auto_dedup=False)
            connection = threading.Thread(target=_refused, args=(ours, receiver))
            connection.start()
            with pytest.raises(ssl.SSLError) as caught:
                client.do_handshake()
            connection.join(30)
    assert "the server does not use TLS" in explain_handshake(caught.value, "server")


def _refused(sock: socket.socket, receiver: ImageReceiver) -> None:
    with pytest.raises(ClientUsesTlsError):
        ReceiveConnection(sock, receiver).run()


def _talk(sock: socket.socket, said: bytes) -> None:
    with suppress(OSError):
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass
