from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@pytest.fixture
def batch() -> Callable[..., Batch[bytes]]:
    """A batch of raw records, as the sink gets it; each has an id of its own."""
    numbers = itertools.count(1)

    def batch(items: Sequence[bytes], *, sized: bool = False) -> Batch[bytes]:
        records = Records.sized(items) if sized else Records.lines(items)
        return Batch(items, Job(f"j-{next(numbers)}", 1, records, [Span(1, 0, len(items))], "j"))

    return batch


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits for something another thread does."""

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)

    return until
