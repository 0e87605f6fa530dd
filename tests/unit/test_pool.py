"""What is planned for servers, connections and pages: no socket, and a clock that the test turns."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.net.wire import NO_FEATURES, PAGE_SIZE, Features
from lazypages.sources import pool as planning
from lazypages.sources.pool import (
    BACKOFF,
    DENIED,
    DENIED_ROUNDS,
    SILENCE,
    SUSPECT_PAUSE,
    TICK,
    Action,
    Ask,
    Channel,
    Connect,
    GiveUp,
    Load,
    Lost,
    Outstanding,
    Pause,
    Pool,
    Server,
    TakeOver,
)

OURS = Features.MISSING | Features.CONNECTIONS
PID = 7


class World:
    """A pool, its clock, and what is on its way on each channel. Does at once what the pool says."""

    def __init__(self, *names: str, once: bool = False, **options: object) -> None:
        self.now = 1000.0
        self.servers = [Server(name, once) for name in names or ("server",)]
        self.pool = Pool(self.servers, self.now, chance=lambda: 0.5, **options)  # type: ignore[arg-type]
        self.asked: dict[Channel, list[Ask]] = {}
        self.connecting: list[Channel] = []
        self.done: list[Action] = []
        self.at_engine: dict[Channel, list[Outstanding]] = {}
        self.tick()

    def act(self) -> list[Action]:
        """What the pool wants by now."""
        new: list[Action] = []
        self.pool.plan(self.now)
        while actions := self.pool.actions():
            for action in actions:
                new.append(action)
                match action:
                    case Connect(channel):
                        self.connecting.append(channel)
                    case Ask(channel):
                        self.asked.setdefault(channel, []).append(action)
                        channel.load = channel.load._replace(heard=self.now)
                    case TakeOver(channel):
                        self.pool.took_over(channel, self.take_over(channel), self.now)
                        self.pool.plan(self.now)
        self.done += new
        return new

    def take_over(self, channel: Channel) -> list[Outstanding]:
        """What the engine has asked for by itself; known from then on."""
        taken = self.at_engine.get(channel, [])
        self.at_engine[channel] = [pages._replace(known=True) for pages in taken]
        return taken

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        self.pool.tick(self.now)
        return self.act()

    def run(self, seconds: float) -> list[Action]:
        """Ticks as often as the pool asks for it."""
        end, actions = self.now + seconds, []
        while (due := self.pool.due(self.now)) is not None and self.now + due < end:
            actions += self.tick(max(due, 0.001))
        return actions + self.tick(end - self.now)

    def connect(self, features: Features = OURS, *, answered: bool = True) -> Channel:
        """The oldest attempt succeeds."""
        channel = self.connecting.pop(0)
        self.pool.reached(channel, self.now)
        self.pool.connected(channel, features, self.now, answered=answered)
        self.act()
        return channel

    def fail(self, reason: str = "refused") -> None:
        """The oldest attempt does not."""
        self.pool.ended(self.connecting.pop(0), reason, self.now)
        self.act()

    def load(self, channel: Channel, **values: float) -> None:
        channel.load = Load(**{"limit": 1 << 20, **values})  # type: ignore[arg-type]

    def want(self, *pages: int, urgent: bool = True) -> list[Action]:
        self.pool.want([(PID, page * PAGE_SIZE, 1) for page in pages], self.now, urgent=urgent)
        return self.act()

    def refuse(self, channel: Channel, page: int, *, known: bool = True) -> list[Action]:
        self.pool.refused(channel, Outstanding(PID, page * PAGE_SIZE, 1, self.now, known), self.now)
        self.load(channel)
        return self.act()

    def end(
        self, channel: Channel, reason: str = "closed", *, oldest: int | None = None, hung_up: bool = False
    ) -> list[Action]:
        page = None if oldest is None else Outstanding(PID, oldest * PAGE_SIZE, 1, 0, True)
        self.pool.ended(channel, reason, self.now, oldest=page, hung_up=hung_up)
        return self.act()


def kinds(actions: Sequence[Action]) -> list[type[Action]]:
    return [type(action) for action in actions]


def asks(actions: Sequence[Action]) -> list[tuple[Channel, int, int]]:
    return [
        (action.channel, action.start // PAGE_SIZE, action.nr_pages)
        for action in actions
        if isinstance(action, Ask)
    ]


# -- connections ---------------------------------------------------------------------------------------------


def test_the_first_connection_and_one_for_faults() -> None:
    world = World()
    assert kinds(world.done) == [Connect]
    background = world.connect()
    assert not background.urgent_only
    (faults,) = world.connecting
    assert faults.urgent_only
    world.connect()
    assert world.run(60) == []  # no more than these


def test_one_connection_to_a_server_of_criu() -> None:
    world = World()
    world.connect(NO_FEATURES)
    assert world.connecting == []
    assert world.run(60) == []


def test_pauses_between_attempts_grow() -> None:
    world = World()
    moments = []
    for _ in range(14):
        while not world.connecting:
            world.tick(max(world.pool.due(world.now) or 0, 0.001))
        moments.append(world.now)
        world.fail()
    pauses = [later - earlier for earlier, later in pairwise(moments)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 5 * BACKOFF[0]
    assert BACKOFF[1] <= pauses[-1] < BACKOFF[1] + 2 * TICK


def test_a_connection_that_was_good_is_made_again_at_once() -> None:
    world = World()
    for _ in range(10):
        channel = world.connect(NO_FEATURES)
        world.end(channel)
        began = world.now
        while not world.connecting:
            world.tick(max(world.pool.due(world.now) or 0, 0.001))
        assert world.now - began < 2 * TICK


def test_nobody_is_called_while_nothing_is_due() -> None:
    world = World(once=True)
    world.connect(NO_FEATURES)
    channel = world.servers[0].channels[0]
    assert world.pool.due(world.now) == pytest.approx(TICK)  # for silence
    world.end(channel)
    assert world.pool.due(world.now) is None  # it can't be connected to again
    world.want(1)
    assert world.pool.due(world.now) is not None  # for the deadline, and to report that pages are missing
    assert world.connecting == []


def test_nothing_is_asked_at_the_end() -> None:
    """No server answers behind CLOSE."""
    world = World()
    channel = world.connect(NO_FEATURES)
    world.load(channel)
    world.pool.close()
    assert world.want(3) == []
    world.load(channel)
    world.end(channel)
    assert world.run(100) == []


@pytest.mark.parametrize("answers", [True, False])
def test_an_inherited_socket_is_used_once(answers: bool) -> None:
    """Neither a slow answer nor none makes a second connection: the number may be that of another socket by then."""
    world = World(once=True)
    world.pool.reached(world.connecting[0], world.now)
    assert Connect not in kinds(world.run(3 * SILENCE))
    if answers:
        channel = world.connect(NO_FEATURES)
        world.load(channel)
        assert asks(world.want(3)) == [(channel, 3, 1)]
    else:
        world.fail()
        assert world.pool.due(world.now) is None
        assert not world.run(60)


def test_a_server_of_criu_takes_one_connection(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever listens there afterwards may have another dump."""
    world = World(checked=True)
    channel = world.connect(NO_FEATURES)
    world.end(channel)
    assert world.run(100) == []
    assert caplog.text.count("not connecting again") == 1
    world = World(checked=True)  # nobody has answered: that was not its one connection
    world.end(world.connect(NO_FEATURES, answered=False))
    assert Connect in kinds(world.run(1))


# -- silence -------------------------------------------------------------------------------------------------


def silent(world: World, channel: Channel) -> list[Action]:
    """Nothing comes, though something is due."""
    heard = world.now
    world.load(channel, requests=1, heard=heard)
    world.now += SILENCE + 0.1
    return world.tick()


def test_silence_moves_what_is_outstanding() -> None:
    world = World("one", "two")
    first, second = world.connect(NO_FEATURES), world.connect(NO_FEATURES)
    world.at_engine[first] = [Outstanding(PID, 0, 1, world.now, False)]
    world.load(second)
    actions = silent(world, first)
    assert kinds(actions)[:2] == [Pause, TakeOver]
    assert asks(actions) == [(second, 0, 1)]
    assert first.silent
    assert Connect in kinds(actions)  # another one to the same server, which is to show that it is better
    assert GiveUp not in kinds(actions)


def test_a_silent_channel_is_kept_until_another_one_is_good() -> None:
    world = World()
    first = world.connect(NO_FEATURES)
    silent(world, first)
    (spare,) = world.connecting
    assert spare.spare
    assert world.run(10 * SILENCE) == []  # two are enough
    world.connect(NO_FEATURES)
    assert GiveUp(first) in world.done


def test_a_channel_that_speaks_again() -> None:
    world = World()
    first = world.connect(NO_FEATURES)
    silent(world, first)
    (spare,) = world.connecting
    world.pool.heard(first)
    actions = world.act()
    assert Pause(first, False) in actions
    assert GiveUp(spare) in actions


def test_who_waits_for_a_task_is_not_silent() -> None:
    """Found silent while the task can't take a page, when all answers are here already: the connection is good."""
    world = World()
    channel = world.connect(NO_FEATURES)
    silent(world, channel)
    world.load(channel, requests=0, heard=channel.load.heard)
    actions = world.tick(TICK)
    assert not channel.silent
    assert Pause(channel, False) in actions
    assert channel in world.servers[0].channels


def test_a_slow_link_is_not_silent() -> None:
    world = World()
    channel = world.connect(NO_FEATURES)
    world.load(channel, requests=1, heard=world.now, round_trip=1.0)
    world.tick(SILENCE + 5)
    assert not channel.silent
    world.tick(20)
    assert channel.silent


# -- pages ---------------------------------------------------------------------------------------------------


def test_what_is_wanted_waits_for_a_channel() -> None:
    world = World()
    assert world.want(1, 2, 5) == []
    channel = world.connect(NO_FEATURES)
    assert asks(world.done) == [(channel, 1, 2), (channel, 5, 1)]


def test_what_a_channel_leaves_is_asked_for_elsewhere() -> None:
    world = World("one", "two")
    first, second = world.connect(NO_FEATURES), world.connect(NO_FEATURES)
    world.load(second, round_trip=1.0)  # the slower one
    assert asks(world.want(3)) == [(first, 3, 1)]
    world.load(second)
    assert asks(world.end(first)) == [(second, 3, 1)]
    world.pool.arrived(PID, 3 * PAGE_SIZE, 1)
    assert not world.pool.backlog


def test_a_refused_page_goes_to_the_other_server() -> None:
    world = World("one", "two")
    for _ in range(4):
        world.connect()
    first, second = (next(c for c in server.channels if not c.urgent_only) for server in world.servers)
    for channel in world.pool.channels():
        world.load(channel)
    assert asks(world.refuse(first, 3, known=False)) == [(second, 3, 1)]


def test_a_page_that_all_refuse_is_lost_after_some_rounds() -> None:
    world = World("one", "two")
    for _ in range(4):
        world.connect()
    for channel in world.pool.channels():
        world.load(channel)
    world.want(3)
    began, refusals = world.now, 0
    while not any(isinstance(action, Lost) for action in world.done):
        for channel, asked in list(world.asked.items()):
            if asked:
                asked.clear()
                refusals += 1
                world.refuse(channel, 3)
        world.tick(TICK)
        assert world.now - began < 20
    assert Lost(PID, 3 * PAGE_SIZE, 1, DENIED) in world.done
    assert refusals >= 2 * DENIED_ROUNDS
    assert world.now - began > 2


def refuse_all(world: World, seconds: float) -> None:
    """The servers report of each page that is requested that they can't give it."""
    end = world.now + seconds
    while world.now < end:
        for channel, asked in list(world.asked.items()):
            for ask in asked[:1]:
                asked.clear()
                world.refuse(channel, ask.start // PAGE_SIZE)
        world.tick(TICK)


def test_a_new_fault_keeps_its_own_deadline() -> None:
    """Although its page is beside that of an old one."""
    world = World(deadline=10)
    world.want(3)
    world.run(9)
    world.want(4)
    world.want(5)
    channel = world.connect(NO_FEATURES)
    assert asks(world.done) == [(channel, 3, 1), (channel, 4, 2)]
    world.load(channel)
    world.run(2)
    assert [action for action in world.done if isinstance(action, Lost)] == [
        Lost(PID, 3 * PAGE_SIZE, 1, "no page server gave it within 10 s")
    ]


def test_a_server_that_is_away_denies_nothing() -> None:
    """Its refusals do not count again in each round of the others."""
    world = World("one", "two")
    two = [channel for channel in [world.connect() for _ in range(4)] if channel.server.name == "two"]
    for channel in world.pool.channels():
        world.load(channel)
    world.want(3)
    refuse_all(world, 1)
    assert world.servers[1] in [ask.channel.server for ask in world.done if isinstance(ask, Ask)]
    for channel in two:
        world.end(channel)
    refuse_all(world, 60)
    assert not any(isinstance(action, Lost) for action in world.done)
    world.load(world.connect())
    refuse_all(world, 60)
    assert Lost(PID, 3 * PAGE_SIZE, 1, DENIED) in world.done


def test_a_server_that_comes_back_is_asked_again() -> None:
    """It may be another process: at once, in the same round."""
    world = World("one", "two")
    one, two = world.connect(Features.MISSING), world.connect(Features.MISSING)
    world.load(one, requests=planning.REFUSED_WINDOW, round_trip=1.0)  # takes no refused page at present
    world.load(two)
    assert asks(world.want(3)) == [(two, 3, 1)]
    world.refuse(two, 3)
    world.end(two)
    while not world.connecting:
        world.tick(TICK)
    channel = world.connect(Features.MISSING)
    world.load(channel)
    assert asks([action for action in world.done if isinstance(action, Ask)][1:]) == [(channel, 3, 1)]


def test_a_page_that_one_server_only_seems_not_to_have_is_never_lost_without_a_deadline() -> None:
    """CRIU's closes the connection, for whatever reason."""
    world = World()
    world.want(3)
    for _ in range(50):
        channel = world.connect(NO_FEATURES)
        world.load(channel, pages=5)
        world.run(2)
        if world.asked.pop(channel, None):
            world.end(channel, oldest=3, hung_up=True)
        else:
            world.end(channel)
        world.run(30)
    assert not any(isinstance(action, Lost) for action in world.done)


def test_a_suspect_page_goes_alone() -> None:
    """The connection is not risked for it before it has brought something, and nothing else is asked meanwhile."""
    world = World()
    channel = world.connect(NO_FEATURES)
    world.want(3)
    world.end(channel, oldest=3, hung_up=True)
    assert [wanted.start for wanted in world.pool.backlog.refused] == [3 * PAGE_SIZE]
    world.run(1)
    channel = world.connect(NO_FEATURES)
    world.load(channel, requests=1, heard=world.now)  # by the engine
    assert asks(world.act()) == []
    world.run(SUSPECT_PAUSE + 0.3)
    assert channel.reserved is not None
    assert Pause(channel, True) in world.done
    world.load(channel, pages=1)
    assert asks(world.run(1)) == [(channel, 3, 1)]
    world.pool.arrived(PID, 3 * PAGE_SIZE, 1)
    assert Pause(channel, False) in world.act()


def test_deadline() -> None:
    world = World(deadline=5.0)
    world.want(1, urgent=False)
    world.run(4.5)
    assert not any(isinstance(action, Lost) for action in world.done)
    world.run(1)
    (lost,) = [action for action in world.done if isinstance(action, Lost)]
    assert lost[:3] == (PID, PAGE_SIZE, 1)
    assert "within 5 s" in lost.reason


def test_deadline_of_what_the_engine_has_asked_for() -> None:
    world = World(deadline=5.0)
    channel = world.connect(NO_FEATURES)
    began = world.now
    world.at_engine[channel] = [Outstanding(PID, 0, 2, began, False)]
    world.load(channel, requests=1, heard=began + 100, oldest=began)
    world.run(6)
    assert [action for action in world.done if isinstance(action, Lost)] == [
        Lost(PID, 0, 2, "no page server gave it within 5 s")
    ]


def test_it_says_that_pages_are_awaited(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.want(1, 2)
    with caplog.at_level(logging.WARNING):
        world.run(planning.WARN_INTERVAL - 1)
        assert "still waiting" not in caplog.text
        world.run(2)
    assert "still waiting for 2 pages, longest " in caplog.text


def test_forgotten_pages_are_not_asked_for() -> None:
    world = World()
    world.want(1, 2)
    world.pool.forget(PID)
    world.connect()
    assert asks(world.run(10)) == []


# -- everything at once --------------------------------------------------------------------------------------


@st.composite
def happenings(draw: st.DrawFn) -> Iterator[tuple[str, int]]:
    kind = st.sampled_from(
        ["want", "connect", "fail", "end", "suspect", "refuse", "arrive", "silent", "wait"]
    )
    return iter(draw(st.lists(st.tuples(kind, st.integers(0, 9)), max_size=60)))


@given(happenings())
def test_no_page_is_forgotten(events: Iterator[tuple[str, int]]) -> None:
    """A page that has not come is queued, refused, or on its way on a channel that lives, whatever happens; and once
    all is well, all of them are asked for."""
    world = World("one", "two")
    missing: set[int] = set()
    for kind, number in events:
        channels = list(world.pool.channels())
        good = [channel for channel in channels if channel.up]
        channel = good[number % len(good)] if good else None
        if kind == "want":
            missing.add(number)
            world.want(number, urgent=number % 2 == 0)
        elif kind in {"connect", "fail"} and world.connecting:
            (world.connect if kind == "connect" else world.fail)()
        elif kind == "arrive" and number in missing:
            missing.discard(number)
            world.pool.arrived(PID, number * PAGE_SIZE, 1)
        elif kind == "wait":
            world.run(number)
        elif channel is None:
            continue
        elif kind == "end":
            world.end(channel)
        elif kind == "suspect":
            mine = [wanted for wanted in world.pool.backlog if wanted.owner is channel]
            world.end(channel, oldest=mine[0].start // PAGE_SIZE if mine else None, hung_up=True)
        elif kind == "refuse":
            mine = [wanted for wanted in world.pool.backlog if wanted.owner is channel]
            if mine:
                world.refuse(channel, mine[0].start // PAGE_SIZE)
        elif kind == "silent":
            silent(world, channel)
        lost = {action.start // PAGE_SIZE for action in world.done if isinstance(action, Lost)}
        living = set(world.pool.channels())
        known: set[int] = set()
        for wanted in world.pool.backlog:
            known |= set(range(wanted.start // PAGE_SIZE, wanted.end // PAGE_SIZE))
            assert wanted.owner is None or wanted.owner in living
        missing -= lost
        assert missing == known
    for channel in list(world.pool.channels()):
        if channel.up:
            world.end(channel)
    world.asked.clear()
    end = world.now + 60
    while missing and world.now < end:
        world.run(1)
        while world.connecting:
            world.load(world.connect())
        for asked in world.asked.values():
            for ask in asked:
                world.pool.arrived(ask.pid, ask.start, ask.nr_pages)
                missing -= {ask.start // PAGE_SIZE + number for number in range(ask.nr_pages)}
        world.asked.clear()
        for channel in world.pool.channels():
            world.load(channel)
    assert not missing
