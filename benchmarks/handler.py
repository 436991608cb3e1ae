"""What every peer does with a batch: next to nothing, so that the way there is what is measured."""

from __future__ import annotations

from typing import Any, TypedDict


def store(batch: list[dict[str, Any]]) -> None:
    """Looks at both ends of a batch.

    Raises:
        ValueError: these are not the records that were sent.
    """
    if "id" not in batch[0] or "id" not in batch[-1]:
        raise ValueError("not a record of this benchmark")


def take(batch: list[dict[str, Any]]) -> None:
    """Looks at both ends of a batch, whatever its records are.

    Raises:
        ValueError: these are no JSON objects.
    """
    if not isinstance(batch[0], dict) or not isinstance(batch[-1], dict):
        raise ValueError("not a record of this benchmark")  # noqa: TRY004 - as above


class Event(TypedDict):
    """A record of this benchmark, as far as a type says it."""

    id: int
    user: str
    path: str


def typed(batch: list[Event]) -> None:
    """As `store`, with records of a type.

    Raises:
        ValueError: these are not the records that were sent.
    """
    if "id" not in batch[0] or "id" not in batch[-1]:
        raise ValueError("not a record of this benchmark")
