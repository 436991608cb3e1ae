"""The records: about 125 bytes of JSON each, all different, the same at every run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODIES = 16
"""Different bodies that a load goes through, in turn."""

_EVENTS = ("view", "click", "basket", "order", "search")


def records() -> Iterator[bytes]:
    """Records without end, one line each, its LF included."""
    for number in itertools.count():
        mixed = number * 2_654_435_761 % 2**32  # Knuth's multiplicative hash: looks random, is not
        yield (
            b'{"id":%d,"at":%d,"user":"u-%08x","event":"%b","path":"/p/%d",'
            b'"ms":%d,"tags":["a","b%d"],"ok":%b}\n'
        ) % (
            10_000_000 + number,
            1_760_000_000_000 + number,
            mixed,
            _EVENTS[mixed % 5].encode(),
            1_000 + mixed % 9_000,
            10 + mixed % 90,
            mixed % 7,
            b"true" if mixed % 3 else b"false",
        )


def write_bodies(folder: Path, size: int) -> list[Path]:
    """`BODIES` files of `size` records each."""
    source = records()
    paths = [folder / f"body-{number}.ndjson" for number in range(BODIES)]
    for path in paths:
        path.write_bytes(b"".join(itertools.islice(source, size)))
    return paths


def write_lines(path: Path, count: int) -> None:
    """One file of `count` records."""
    source = records()
    with path.open("wb") as file:
        for start in range(0, count, 10_000):
            file.writelines(itertools.islice(source, min(10_000, count - start)))
