"""A pytest plugin: under each of the three kernels a third of the tests, so that each test runs under one of them.

LAZYPAGES_KERNEL names the kernel. Which one it is depends only on the test's name.
"""

from __future__ import annotations

import os
from zlib import crc32

import pytest

KERNELS = ("6.1", "6.12", "newest")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number = KERNELS.index(os.environ["LAZYPAGES_KERNEL"])
    left_out = [item for item in items if crc32(item.nodeid.encode()) % len(KERNELS) != number]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
