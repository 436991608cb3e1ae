"""How the interpreter and its allocator are set: their defaults are not meant for a daemon."""

from __future__ import annotations

import ctypes
import gc
import sys

SWITCH_SECONDS = 0.001
"""How long a thread that computes keeps others waiting. With the default of 5 ms a small request,
which passes through three threads, waits three times as long beside a body that is being parsed."""

GARBAGE_MAX = 5_000
"""Objects that are made before Python looks for cycles among them. With the default of 700 that is
every 20 requests, and a seventh of what a small one costs."""

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BYTES = 128 * 1024
_STREAM_BYTES = 1024 * 1024
_ARENAS = 2


def settle_interpreter(*, for_strangers: bool) -> None:
    """Large blocks of memory go back to the system once they are free; waits are short, cycles few.

    glibc raises the size from which it asks the system for memory up to 32 MiB as soon as blocks
    that large come and go, and keeps them in an arena a thread then: after some large bodies a
    process stays several times as large as what is in it.

    Args:
        for_strangers: what comes may be of any size, from many at once. Otherwise pieces of the
            usual sizes may stay: to get them anew each time is a sixth of a stream's CPU.
    """
    keep_settled()
    _bound_recursion()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES if for_strangers else _STREAM_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)


def keep_settled() -> None:
    """Sets again what a handler in a thread may have changed; call it now and then.

    Without collections the memory of cycles is never free again; with another interval one thread
    that computes keeps all others waiting.
    """
    if not gc.isenabled():
        gc.enable()
    if gc.get_threshold()[0] != GARBAGE_MAX:
        gc.set_threshold(GARBAGE_MAX)
    if sys.getswitchinterval() > SWITCH_SECONDS:
        sys.setswitchinterval(SWITCH_SECONDS)


def _bound_recursion() -> None:
    """From now on the limit of recursion can't be set below the one of now.

    It counts for all threads, and the event loop could not make another call with a small one.
    """
    least, change = sys.getrecursionlimit(), sys.setrecursionlimit

    def setrecursionlimit(limit: int, /) -> None:
        """As Python's own, but a limit below the daemon's is raised to it."""
        change(max(limit, least))

    sys.setrecursionlimit = setrecursionlimit
