"""When compression is asked for: links and compressors of any speed."""

from __future__ import annotations

import pytest

from lazypages.net.trial import Trial

BATCH = 256 << 10
DEPTH = 4  # requests on their way


def run(trial: Trial, seconds: float, plain: float, compressed: float, start: float = 0.0) -> float:
    """A link that brings pages at these rates (bytes/s); the share of bytes that came compressed."""
    now, sent, bytes_ = start, [trial.compress] * DEPTH, [0, 0]
    while now < start + seconds:
        mode = sent.pop(0)
        now += BATCH / (compressed if mode else plain)
        trial.answered(now, BATCH, compress=mode, idle=False)
        bytes_[mode] += BATCH
        sent.append(trial.compress)
    return bytes_[1] / sum(bytes_)


@pytest.mark.parametrize(
    ("plain", "compressed", "least", "most"),
    [
        pytest.param(10e6, 40e6, 0.9, 0.999, id="slow link, compressible"),
        pytest.param(10e6, 10e6, 0, 0.1, id="slow link, incompressible"),
        pytest.param(100e6, 110e6, 0, 0.1, id="hardly better"),
        pytest.param(200e6, 150e6, 0, 0.1, id="slow compressor"),
        pytest.param(2e9, 3e9, 0, 0, id="fast link"),
        pytest.param(1e5, 1e6, 0.5, 0.999, id="very slow link"),
    ],
)
def test_what_brings_pages_faster(plain: float, compressed: float, least: float, most: float) -> None:
    assert least <= run(Trial(), 60, plain, compressed) <= most


def test_starts_plain_and_tries_soon() -> None:
    trial = Trial()
    assert not trial.compress
    assert run(trial, 1, 10e6, 40e6) > 0.5


def test_notices_changes() -> None:
    """Memory that begins or ceases to be compressible, a link that gets fast."""
    trial = Trial()
    assert run(trial, 30, 10e6, 40e6) > 0.9
    assert run(trial, 60, 10e6, 10e6, start=30) < 0.1
    assert run(trial, 300, 10e6, 40e6, start=90) > 0.6
    assert run(trial, 30, 1e9, 200e6, start=390) < 0.1
    assert not trial.compress


def test_idle_times_do_not_count() -> None:
    """Somebody who asks seldom does not make a fast link look slow."""
    trial, now = Trial(), 0.0
    for _ in range(1000):
        for number in range(5):
            now += BATCH / 1e9
            trial.answered(now, BATCH, compress=False, idle=number == 4)
        now += 1.0
    assert not trial.compress
