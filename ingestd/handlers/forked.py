"""Children that a handler forks, and that come back from the handler.

`os.fork()` in a handler makes a second process that stands in the middle of ours. A child that
ends by itself (`os._exit`, exec, multiprocessing) is none of our business. One that returns from
the handler, or raises, would go on as a second worker: answer for its parent, take the next job,
close the parent's journal. It ends here, with the exit code that a Python program would have.
"""

from __future__ import annotations

import signal
import sys
from os import _exit, getpid
from typing import TYPE_CHECKING, NoReturn, Self

from ingestd.handlers.failure import trace_of

if TYPE_CHECKING:
    from types import TracebackType

_SECONDS = 5
"""How long a child may take to say its last words."""


class ParentOnly:
    """A block that only the process that entered it leaves."""

    __slots__ = ("_process",)

    def __enter__(self) -> Self:
        self._process = getpid()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if getpid() != self._process:
            end_child(raised)


def end_child(raised: BaseException | None) -> NoReturn:
    """Ends this process, which was forked, without anything that its parent has to do."""
    code = 0
    try:
        # A lock that another thread held when it was forked is held for ever in here.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS)
        code = _code_of(raised)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001, S110  it ends, whatever it left behind
        pass
    finally:
        _exit(code)


def _code_of(raised: BaseException | None) -> int:
    if raised is None:
        return 0
    if issubclass(type(raised), SystemExit):
        code = getattr(raised, "code", 1)
        return 0 if code is None else code & 0xFF if isinstance(code, int) else 1
    sys.stderr.write(trace_of(raised))
    return 1
