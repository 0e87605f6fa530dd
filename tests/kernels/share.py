"""A pytest plugin: under each of the three kernels a ninth of the tests, so that a third of them run under one of them.

CI has no time for more. LAZYPAGES_KERNEL names the kernel. Which one it is depends only on the test's name.
"""

from __future__ import annotations

import os
from zlib import crc32

import pytest

KERNELS = ("6.1", "6.12", "newest")

#: A kernel has one of so many parts of the tests.
PARTS = 3 * len(KERNELS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number = KERNELS.index(os.environ["LAZYPAGES_KERNEL"])
    left_out = [item for item in items if crc32(item.nodeid.encode()) % PARTS != number]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
