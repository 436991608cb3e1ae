"""pytest plug-in of ingestd: fixtures that make harnesses, and close them with the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.testing.core import HarnessCore
    from ingestd.testing.harness import AsyncHarness, Harness

H = TypeVar("H", bound="HarnessCore")


@pytest.fixture
def ingestd_harness() -> Iterator[Callable[..., Harness]]:
    """Makes harnesses, `ingestd_harness(handler, …)`, with the arguments of `Harness`."""
    from ingestd.testing.harness import Harness  # noqa: PLC0415  most tests of most runs need none

    yield from _made_by(Harness)


@pytest.fixture
def ingestd_async_harness() -> Iterator[Callable[..., AsyncHarness]]:
    """Makes harnesses for tests that are coroutines; see `AsyncHarness`."""
    from ingestd.testing.harness import AsyncHarness  # noqa: PLC0415

    yield from _made_by(AsyncHarness)


def _made_by(kind: type[H]) -> Iterator[Callable[..., H]]:
    made: list[H] = []

    def make(*args: Any, **named: Any) -> H:
        made.append(kind(*args, **named))
        return made[-1]

    yield make
    for harness in reversed(made):
        harness.close_now()
