"""The order in which processes are made, executed on a model of the kernel's rules (setsid(2), setpgid(2))."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.restore.errors import RestoreError
from lazypages.restore.tree import EndHelper, FoundSession, JoinGroup, Make, Member, Step, order

OWN = 9


def execute(members: list[Member], steps: list[Step]) -> dict[int, tuple[int, int, int]]:
    """Parent, group and session of each process at the end."""
    parent, group, session = {0: -1}, {0: OWN}, {0: OWN}
    for step in steps:
        match step:
            case Make(pid, maker, sibling):
                assert pid not in session
                parent[pid] = parent[maker] if sibling else maker
                group[pid], session[pid] = group[maker], session[maker]
            case FoundSession(pid):
                assert pid not in [group[other] for other in group if other != pid]
                group[pid] = session[pid] = pid
            case JoinGroup(pid, to):
                assert session[pid] != pid
                assert to == pid or session[pid] in [session[p] for p in group if group[p] == to]
                group[pid] = to
            case EndHelper(pid, of):
                assert parent.pop(pid) == of
                group.pop(pid)
                session.pop(pid)
    return {pid: (parent[pid], group[pid], session[pid]) for pid in parent if pid}


def check(members: list[Member], *, shell_job: bool = False) -> list[Step]:
    steps = order(members, own_session=OWN, own_group=OWN, shell_job=shell_job)
    assert execute(members, steps) == {m.pid: (m.ppid, m.pgid, m.sid) for m in members}
    return steps


def test_one_that_leads_its_session() -> None:
    assert check([Member(20, 0, 20, 20)]) == [Make(20, 0), FoundSession(20)]


def test_session_that_was_not_dumped() -> None:
    with pytest.raises(RestoreError, match="--shell-job"):
        check([Member(20, 0, 20, 15)])
    steps = order(
        [Member(20, 0, 20, 15), Member(21, 20, 14, 15)], own_session=OWN, own_group=OWN, shell_job=True
    )
    assert execute([], steps) == {20: (0, 20, OWN), 21: (20, OWN, OWN)}


def test_groups_and_sessions_below() -> None:
    check([Member(20, 0, 20, 20), Member(21, 20, 21, 20), Member(22, 21, 21, 20), Member(23, 20, 23, 23)])


def test_made_before_its_parent_left_the_session() -> None:
    check([Member(20, 0, 20, 20), Member(21, 20, 21, 21), Member(22, 21, 20, 20), Member(23, 21, 21, 21)])


def test_leaders_that_are_gone() -> None:
    """Of a group, of a session, of both; and one that is still there."""
    check([Member(20, 0, 20, 20), Member(21, 20, 15, 20), Member(22, 20, 15, 20)])
    check([Member(20, 0, 20, 20), Member(21, 20, 15, 15), Member(22, 20, 22, 15)])
    check([Member(20, 0, 20, 20), Member(21, 20, 21, 21), Member(22, 20, 21, 21)])


def test_what_has_no_order() -> None:
    with pytest.raises(RestoreError, match="several parents"):
        check([Member(20, 0, 20, 20), Member(21, 20, 15, 15), Member(22, 20, 20, 20), Member(23, 22, 15, 15)])
    with pytest.raises(RestoreError, match="not in its session"):
        check([Member(20, 0, 20, 20), Member(21, 20, 21, 21), Member(22, 20, 21, 20)])


@st.composite
def histories(draw: st.DrawFn) -> list[Member]:
    """Trees as they come about: forks, setsid, setpgid."""
    pids, ppid, group, session = [20], {20: 0}, {20: 20}, {20: 20}
    for pid in range(21, draw(st.integers(21, 32))):
        maker = draw(st.sampled_from(pids))
        pids.append(pid)
        ppid[pid], group[pid], session[pid] = maker, group[maker], session[maker]
        match draw(st.sampled_from(["", "", "session", "group", "join"])):
            case "session":
                group[pid] = session[pid] = pid
            case "group":
                group[pid] = pid
            case "join":
                group[pid] = draw(st.sampled_from([group[p] for p in pids if session[p] == session[pid]]))
    return [Member(pid, ppid[pid], group[pid], session[pid]) for pid in pids]


@given(histories())
def test_every_history_has_an_order(members: list[Member]) -> None:
    check(members)
