"""Which checkpoint both sides mean, and how it ends, as bytes."""

from __future__ import annotations

import pytest

from lazypages.net import wire
from lazypages.net.wire import (
    PAGE_SIZE,
    Agreement,
    ClientCodec,
    Closed,
    CloseFlags,
    Command,
    Completed,
    Eof,
    Features,
    Get,
    Header,
    Layout,
    Probed,
    RemoteProtocolError,
    ServerCodec,
)
from tests.unit.test_wire import feed, page

OLD, NEW = Layout.CRIU_4_1, Layout.CRIU_4_2
IDENTITY = bytes(range(16))
CLIENT = 0x1122334455667788
ALL = wire.ALL_FEATURES | Features.CHECKPOINT
GET = NEW.pack(Header(Command.GET, 1, 0x400000, 7))


def granted() -> ServerCodec:
    """A server that has told a client what it has."""
    codec = ServerCodec()
    assert feed(codec, wire.probe_first(ALL)) == [Probed(ALL)]
    answer = codec.answer_probe(ALL, IDENTITY)
    assert wire.probe_answer(answer[: wire.PROBE_ANSWER_SIZE]) == ALL
    assert answer[wire.PROBE_ANSWER_SIZE :] == IDENTITY
    return codec


def client() -> ClientCodec:
    return ClientCodec(NEW, ALL)


@pytest.mark.parametrize("impatient", [b"", wire.PROBE_REST])
def test_agreement(impatient: bytes) -> None:
    """Wherever the stream is cut; no GET is anybody else's business before it."""
    said = impatient + wire.checkpoint_message(IDENTITY, CLIENT) + GET
    for cuts in ((), range(1, len(said))):
        codec = granted()
        assert not codec.settled
        expected = [Agreement(CLIENT, IDENTITY), Header(Command.GET, 1, 0x400000, 7)]
        assert feed(codec, said, cuts) == expected
        assert codec.settled


@pytest.mark.parametrize("said", [GET, NEW.pack(Header(Command.CLOSE)), NEW.pack(Header(Command.PARENT))])
def test_nothing_comes_before_the_agreement(said: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="did not identify its checkpoint"):
        feed(granted(), said)


def test_it_is_no_message_without_the_feature() -> None:
    codec = ServerCodec()
    feed(codec, wire.PROBE_FIRST)
    codec.answer_probe(wire.ALL_FEATURES)
    for message in (wire.checkpoint_message(IDENTITY, CLIENT), wire.completed_message()):
        with pytest.raises(RemoteProtocolError, match="unknown command"):
            feed(codec, message)


def test_an_identity_goes_with_the_feature() -> None:
    for features, identity in ((ALL, b""), (wire.ALL_FEATURES, IDENTITY), (ALL, IDENTITY[1:])):
        with pytest.raises(ValueError, match="needs an identity"):
            ServerCodec().answer_probe(features, identity)


@pytest.mark.parametrize("flags", [CloseFlags.COMPLETE, CloseFlags.UNUSED, wire.NO_CLOSE_FLAGS])
@pytest.mark.parametrize("force", [False, True])
def test_how_it_ends(flags: CloseFlags, force: bool) -> None:
    codec = granted()
    feed(codec, wire.checkpoint_message(IDENTITY, CLIENT))
    (header,) = feed(codec, client().close(force=force, flags=flags))
    assert header == Header(Command.FORCE_CLOSE if force else Command.CLOSE, flags=flags)
    with pytest.raises(ValueError, match="flags need"):
        ClientCodec(OLD).close(flags=CloseFlags.COMPLETE)


def test_another_has_completed() -> None:
    """It is heard while nothing is asked, instead of an answer, and in the answer to CLOSE; cut anywhere."""
    said = wire.completed_message()
    for cuts in ((), range(1, len(said))):
        assert feed(client(), said, cuts, eof=True) == [Completed(), Eof(True)]
        codec = client()
        codec.get(7, 0x400000, 1)
        assert feed(codec, said, cuts) == [Completed()]
        codec = client()
        codec.close(flags=CloseFlags.COMPLETE)
        assert feed(codec, wire.answer_close(wire.ELSEWHERE), [1]) == [Closed(wire.ELSEWHERE)]
        codec = client()
        codec.close(flags=CloseFlags.COMPLETE)
        assert feed(codec, said, cuts)[0] == Closed(wire.ELSEWHERE)


def test_an_answer_comes_first() -> None:
    codec = client()
    codec.get(7, 0x400000, 1)
    answer = NEW.pack(Header(Command.ADD_F, 1, 0x400000, 7, 4)) + page(1)
    assert len(answer) == NEW.header_size + PAGE_SIZE
    events = feed(codec, answer + wire.completed_message())
    assert events[1:] == [wire.Answered(Get(7, 0x400000, 1), 1), Completed()]


def test_who_may_not_say_so() -> None:
    """A server that has not agreed, and one that is cut off in the middle."""
    with pytest.raises(RemoteProtocolError, match="without a request"):
        feed(ClientCodec(NEW, wire.ALL_FEATURES), wire.completed_message())
    with pytest.raises(RemoteProtocolError, match="without a request"):
        feed(client(), wire.completed_message()[:-1], eof=True)
