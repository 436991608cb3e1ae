"""A handler that can't take some records until it was mended, and rejects others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ingestd import Batch


class Store:
    """Raises about each record with `poison` while there is no file `mended`; rejects `refused`.

    Args:
        mended: path of the file.
    """

    def __init__(self, mended: str) -> None:
        self._mended = Path(mended)

    def __call__(self, batch: Batch[dict[str, Any]]) -> None:
        for place, record in enumerate(batch):
            if "refused" in record:
                batch.reject(place, f"ValueError: cannot take {record['refused']}")
            if "poison" in record and not self._mended.exists():
                raise ValueError(f"cannot take {record['poison']}")
