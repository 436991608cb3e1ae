"""Exponential backoff with full jitter.

https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_DOUBLINGS_MAX = 60


def backoff(attempts: int, first: float, longest: float, random: Callable[[], float]) -> float:
    """Seconds before the next try, between 0 and `min(longest, first * 2 ** (attempts - 1))`.

    Args:
        attempts: tries that have failed, at least 1.
        first: the longest wait after the first of them, seconds.
        longest: no wait is longer, seconds.
        random: gives numbers from 0 to 1.
    """
    return min(longest, first * 2.0 ** min(attempts - 1, _DOUBLINGS_MAX)) * random()
