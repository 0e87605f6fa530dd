"""Guard regions (MADV_GUARD_INSTALL) of restored tasks, with real CRIU and without: each byte, and each SIGSEGV.

Tasks that were dumped with guards are among the scenarios of test_criu_serve.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.real.test_criu_serve import check_counts
from tests.support.criu import Criu, all_criu
from tests.support.processes import wait_for
from tests.support.restore import Checkpoints, LazyRestore, lazy_restore, our_daemon

both = pytest.mark.parametrize("criu", all_criu())


def installed(restored: LazyRestore) -> bool:
    """Whether the victim has made its guards."""
    return any(report.name == "installed" for report in restored.reports())


@both
def test_installed_before_the_completion(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """All is missing when they are installed; SIGTERM has the rest brought."""
    checkpoint = checkpoints.get(criu, "guards_late")
    with lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path) as restored:
        restored.go()
        wait_for("the guards", lambda: installed(restored))
        restored.server.signal(signal.SIGTERM)
        restored.check_end()
        check_counts(restored)
