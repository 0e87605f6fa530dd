"""A pytest plugin (`-p tests.support.no_skips`): what was not run has not passed."""

from __future__ import annotations

import pytest
from _pytest.terminal import TerminalReporter


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turns a success with skipped or expectedly failed tests into a failure.

    Processes that run a part of the tests (pytest-xdist) tell theirs to the one that reports.
    """
    if hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert isinstance(reporter, TerminalReporter)
    unproven = [
        report for kind in ("skipped", "xfailed", "xpassed") for report in reporter.stats.get(kind, ())
    ]
    if unproven and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("")
        reporter.write_line(
            f"{len(unproven)} tests were skipped or expected to fail: that is a failure here", red=True
        )
