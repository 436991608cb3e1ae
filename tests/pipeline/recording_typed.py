"""A handler with a typed annotation."""

from __future__ import annotations

import msgspec


class Click(msgspec.Struct):
    n: int


def store(batch: list[Click]) -> None:
    assert all(isinstance(click.n, int) for click in batch)
