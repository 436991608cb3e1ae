"""How much memory a piece of code takes at its worst."""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Peak:
    """`bytes`: the most that Python's allocator held for what was asked for in the block."""

    bytes = 0


@contextlib.contextmanager
def peak() -> Iterator[Peak]:
    """Traces the block; its peak is known behind it, unless the block raised."""
    found = Peak()
    tracemalloc.start()
    try:
        yield found
        _, found.bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
