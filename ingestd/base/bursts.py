"""Lets threads that compute next to an event loop yield to it between bursts.

The loop gives the interpreter's lock away after each callback. A thread that computes has it then
for `SWITCH_SECONDS`, whatever the callback took: beside one such thread the loop runs a callback a
millisecond, and a turn with a hundred of them takes as many.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

BURST_SECONDS = 0.005
"""Time that a thread computes before the loop takes its turn. Asking for it takes about 0.1 ms."""
TURN_SECONDS_MAX = 0.25
"""Longest wait for that turn: a loop that has stopped takes none."""


class _Burst(threading.local):
    loop: asyncio.AbstractEventLoop | None = None
    end = BURST_SECONDS


_burst = _Burst()


def compute_beside(loop: asyncio.AbstractEventLoop) -> None:
    """Sets the loop to which the calling thread yields."""
    _burst.loop = loop


def let_loop_go_first() -> None:
    """Waits until the loop has taken a turn, if this thread has computed for a burst.

    Does nothing in a thread that computes beside no loop, so pure functions may call it now and
    then.
    """
    loop = _burst.loop
    if loop is None or time.thread_time() < _burst.end:
        return
    turn = threading.Event()
    try:
        # Twice, because the first one may be called in the middle of a turn.
        loop.call_soon_threadsafe(loop.call_soon, turn.set)
    except RuntimeError:
        return  # it is closed
    turn.wait(TURN_SECONDS_MAX)
    _burst.end = time.thread_time() + BURST_SECONDS
