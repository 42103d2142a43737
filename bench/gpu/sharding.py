"""A plugin of pytest: every n-th of the tests that were chosen, ``-p bench.gpu.sharding --shard 2/8``."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", metavar="I/N", help="of every N tests in a row the I-th, from 0")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if config.getoption("shard"):
        first, step = map(int, config.getoption("shard").split("/"))
        left_out = [item for number, item in enumerate(items) if number % step != first]
        items[:] = items[first::step]
        config.hook.pytest_deselected(items=left_out)
