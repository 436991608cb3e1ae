from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.deploy.containers.engine import built, unable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.containers.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Podman, with the image built from the shipped Dockerfile."""
    if why := unable():
        pytest.skip(why)
    made = built()
    yield made
    made.close()
