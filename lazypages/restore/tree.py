"""The order of creating processes that reproduces their sessions and process groups.

A process gets its session by inheritance from its creator, or founds one (setsid(2)). So a process
must be created while its creator is in the right session. If the leader of a session or group has exited, a helper has
its pid meanwhile. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazypages.restore.errors import RestoreError


@dataclass(frozen=True, slots=True)
class Member:
    """A process to be created. ``ppid``: 0 for the root."""

    pid: int
    ppid: int
    pgid: int
    sid: int


@dataclass(frozen=True, slots=True)
class Make:
    """``maker`` (0: the restorer) creates ``pid``. ``sibling``: as a child of the maker's own parent."""

    pid: int
    maker: int
    sibling: bool = False


@dataclass(frozen=True, slots=True)
class FoundSession:
    pid: int


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """``pid`` joins ``group``, or founds it if they are equal."""

    pid: int
    group: int


@dataclass(frozen=True, slots=True)
class EndHelper:
    pid: int
    parent: int


Step = Make | FoundSession | JoinGroup | EndHelper


def order(members: Sequence[Member], *, own_session: int, own_group: int, shell_job: bool) -> list[Step]:
    """The steps that create ``members`` (root first, parents before their children).

    ``own_session``, ``own_group``: of the restorer; a ``shell_job`` stays in them. Raises ``RestoreError``.
    """
    root = members[0]
    pids = {member.pid for member in members}
    outside = root.sid not in pids
    if outside and not shell_job:
        raise RestoreError(
            f"task {root.pid} is in session {root.sid}, which was not dumped: restore it with --shell-job"
        )
    if outside:
        members = [_adopt(member, root.sid, own_session, own_group, pids) for member in members]
    return _Order(members, own_session, own_group).steps()


def _adopt(member: Member, session: int, own_session: int, own_group: int, pids: set[int]) -> Member:
    """The member with the session and group of the dumping shell replaced by the restorer's."""
    if member.sid != session:
        return member
    group = member.pgid if member.pgid in pids else own_group
    return Member(member.pid, member.ppid, group, own_session)


class _Order:
    def __init__(self, members: Sequence[Member], own_session: int, own_group: int) -> None:
        self._members = {member.pid: member for member in members}
        self._children: dict[int, list[Member]] = {member.pid: [] for member in members}
        for member in members[1:]:
            self._children[member.ppid].append(member)
        self._root = members[0]
        self._own_session, self._own_group = own_session, own_group
        self._helpers: dict[int, int] = {}

    def steps(self) -> list[Step]:
        steps = list(self._make(self._root, 0, self._own_session))
        steps += self._groups()
        steps += [EndHelper(pid, parent) for pid, parent in self._helpers.items()]
        return steps

    def _needed(self, member: Member) -> int | None:
        """The session in which a process must be created; None: any."""
        if member.sid != member.pid:
            return member.sid
        needs = {self._needed(child) for child in self._children[member.pid]} - {None, member.pid}
        # Children in another session than the one it founds are created by a helper.
        return needs.pop() if len(needs) == 1 else None

    def _make(self, member: Member, maker: int, session: int, sibling: bool = False) -> Iterator[Step]:
        """``session``: the one that the process inherits."""
        yield Make(member.pid, maker, sibling)
        later = []
        for child in self._children[member.pid]:
            founds = member.sid == member.pid
            if founds and self._needed(child) == session:
                yield from self._make(child, member.pid, session)
            else:
                later.append(child)
        if member.sid == member.pid:
            yield FoundSession(member.pid)
            session = member.pid
        if session != member.sid:
            raise RestoreError(
                f"task {member.pid} belongs to session {member.sid}, which neither its parent {member.ppid} "
                "nor a process that can be created belongs to"
            )
        waiting = []
        for child in later:
            need = self._needed(child)
            if need is None or need == session:
                yield from self._make(child, member.pid, session)
            elif need in self._members:
                waiting.append(child)
            else:
                yield from self._make_by_helper(child, member.pid, need)
        for child in waiting:
            leader = self._members[self._needed(child) or 0]
            if leader.ppid != member.pid:
                raise RestoreError(
                    f"task {child.pid} belongs to the session of task {leader.pid}, "
                    f"which is not a child of its parent {member.pid}"
                )
            yield from self._make(child, leader.pid, leader.pid, sibling=True)

    def _make_by_helper(self, child: Member, parent: int, session: int) -> Iterator[Step]:
        if session not in self._helpers:
            self._helpers[session] = parent
            yield Make(session, parent)
            yield FoundSession(session)
        elif self._helpers[session] != parent:
            raise RestoreError(
                f"task {child.pid} belongs to session {session}, whose leader has exited and which "
                "processes of several parents belong to"
            )
        yield from self._make(child, session, session, sibling=True)

    def _groups(self) -> Iterator[Step]:
        members = self._members.values()
        sessions = {member.pid: member.sid for member in members} | {pid: pid for pid in self._helpers}
        for member in members:
            if member.pgid == member.pid and member.sid != member.pid:
                yield JoinGroup(member.pid, member.pid)
        for member in members:
            group = member.pgid
            if group == member.pid or (group == self._own_group and member.sid == self._own_session):
                continue
            if group not in sessions:
                self._helpers[group] = member.pid
                sessions[group] = member.sid
                yield Make(group, member.pid)
                yield JoinGroup(group, group)
            if sessions[group] != member.sid:
                raise RestoreError(
                    f"task {member.pid} is in process group {group}, which is not in its session {member.sid}"
                )
            yield JoinGroup(member.pid, group)
