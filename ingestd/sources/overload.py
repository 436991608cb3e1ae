"""When a source that can wait asks an overloaded pipeline again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingestd.base.errors import Overloaded

AGAIN_SECONDS = 1.0
"""The longest wait: asking costs nothing here, and what is read waits meanwhile."""


def again_after(overloaded: Overloaded) -> float:
    """Seconds until it is asked again, with jitter."""
    return min(overloaded.retry_after, AGAIN_SECONDS) * random.uniform(0.75, 1.25)  # noqa: S311
