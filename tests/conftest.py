"""For all tests: orphans come back to the test process, and nothing may outlive the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

from tests.support.examples import USUAL
from tests.support.fake import compile_restored
from tests.support.processes import become_subreaper, descendants, describe, end
from tests.support.restore import Checkpoints, Program

# The same examples each time, and no verdict that depends on how busy the machine is. "loop": few, for -m "not slow".
# "long" (CONTRIBUTING.md): others each time, many.
for profile, count in (("lazypages", USUAL), ("loop", USUAL // 5)):
    settings.register_profile(
        profile,
        deadline=None,
        derandomize=True,
        max_examples=count,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.register_profile(
    "long",
    deadline=None,
    derandomize=False,
    max_examples=int(os.environ.get("LAZYPAGES_EXAMPLES", "100000")),
    suppress_health_check=[HealthCheck.too_slow],
)


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported: their own numbers of examples depend on the profile."""
    usual = "loop" if config.option.markexpr == "not slow" else "lazypages"
    settings.load_profile(os.environ.get("LAZYPAGES_HYPOTHESIS", usual))


#: Quick ones first.
ORDER = ["unit", "fuzz", "real", "kernels"]


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that a marker "loop" leaves out are slow, and so are the kernels, which come last."""
    missing: dict[str, set[str]] = {}
    for item in items:
        if item.get_closest_marker("own_kernel"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "every_kernel"]
        loop = item.get_closest_marker("loop")
        if loop is not None:
            assert isinstance(item, pytest.Function)
            missing.setdefault(item.nodeid.partition("[")[0], set(loop.args)).discard(item.callspec.id)
        if item.path.parent.name == "kernels" or (loop is not None and item.callspec.id not in loop.args):
            item.add_marker(pytest.mark.slow)
    wrong = {test: ids for test, ids in missing.items() if ids}
    # which cases there are may depend on the kernel: tests/kernels
    if wrong and config.option.markexpr != "every_kernel" and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"marked as cases of the loop, but there are none: {wrong}")
    items.sort(key=lambda item: ORDER.index(item.path.parent.name))


@pytest.fixture(scope="session", autouse=True)
def _nothing_survives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail at the end when something is left of the tests: a process that runs or is stopped, a mount, a namespace.

    Zombies are just reaped: without the subreaper, init would have done that.
    """
    become_subreaper()
    before = descendants()
    yield
    left = {pid: state for pid, state in descendants().items() if pid not in before}
    story = [describe(pid) for pid, state in left.items() if state != "Z"]
    end(tuple(left))
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    story += [
        f"mount {place}" for place in mounts if Path(place).is_relative_to(tmp_path_factory.getbasetemp())
    ]
    story += [f"network namespace {path}" for path in Path("/run/netns").glob(f"lazypages-{os.getpid()}-*")]
    if story:
        pytest.fail("left by the tests: " + "; ".join(story), pytrace=False)


@pytest.fixture(scope="session")
def restored_program() -> Path:
    """Tasks that register memory of their own, compiled (support/restored.c)."""
    return compile_restored()


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    """The victims, compiled."""
    with TemporaryDirectory(prefix="lazypages-victims-") as folder:
        yield Program.compile(Path(folder))


@pytest.fixture(scope="session")
def checkpoints(program: Program) -> Iterator[Checkpoints]:
    """Checkpoints of the victims, taken by real CRIU."""
    with TemporaryDirectory(prefix="lazypages-checkpoints-") as folder:
        yield Checkpoints(Path(folder), program)
