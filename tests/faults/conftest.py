from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.conftest import start

__all__ = ["start"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Faults are slow by nature: seconds of waiting, mounting, killing. `.ci/run` runs them."""
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_table.py":
            item.add_marker(pytest.mark.slow)
