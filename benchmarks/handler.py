"""What every peer does with a batch: next to nothing, so that the way there is what is measured."""

from __future__ import annotations

from typing import Any


def store(batch: list[dict[str, Any]]) -> None:
    """Looks at both ends of a batch.

    Raises:
        ValueError: these are not the records that were sent.
    """
    if "id" not in batch[0] or "id" not in batch[-1]:
        raise ValueError("not a record of this benchmark")
