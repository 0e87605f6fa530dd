"""The link between two hosts, as far as it is ours: what is said to netem, and what stands in for it."""

from __future__ import annotations

import pytest

from tests.support.hosts import Direction, Link


def test_netem() -> None:
    assert Link().netem() == []
    assert Link(0.0025, 0.01, 1.25e6).netem() == [
        *("netem", "delay", "2.5ms", "loss", "1%", "rate", "10000000bit"),
    ]


def test_delay_and_rate() -> None:
    way = Direction(Link(delay=0.5, rate=1000), seed=0, to=0)
    for _ in range(3):
        way.send(bytes(125), now=10.0)
    assert way.next_at() == pytest.approx(10.625)
    assert len(list(way.arrived(10.65))) == 1
    assert len(list(way.arrived(10.9))) == 2
    assert way.next_at() is None
    for _ in range(10):
        way.send(bytes(125), now=20.0)
    assert len(list(way.arrived(30.0))) == 4  # the others would have waited too long


def test_loss() -> None:
    way = Direction(Link(loss=0.25), seed=3, to=0)
    for _ in range(1000):
        way.send(b"packet", now=1.0)
    assert 650 < len(list(way.arrived(1.0))) < 850
