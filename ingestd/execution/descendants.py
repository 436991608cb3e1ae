"""What a worker started, and ending all of it.

A worker leads a process group of its own, and one kill of it ends what stayed in it. What moved to
another group or session is found through `/proc` by two more signs: its parents lead to the worker,
or the environment that it was started with has the worker's mark. The last sign is also that of
orphans.

Out of reach, for a daemon without privileges: what became another user's, what left the group with
an emptied environment and lost its parent, and what another service was asked to start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from typing import NamedTuple

MARK = "_INGESTD_WORKER"
"""The variable in a worker's environment whose value names the worker."""
_SECONDS = 2.0  # for those that go on starting others while they are being ended
_ENVIRON_BYTES = 1 << 20
_OVER = frozenset("ZX")


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    started: int  # clock ticks since the machine's start


def new_mark() -> str:
    """A value of `MARK` that no other worker has."""
    return secrets.token_hex(8)


def end_all(pid: int, mark: str) -> None:
    """Kills a process, a leader of its group, and what it started.

    Call it while the process is not reaped, dead or alive: until then its number is not given to
    anybody else, and neither is that of its group.
    """
    began = _process(pid)
    # Before its end: afterwards its children have another parent.
    found = _started_by(pid, mark, began)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    give_up = time.monotonic() + _SECONDS
    while found and time.monotonic() < give_up:
        for one in found:
            _kill(one)
        time.sleep(0.001)
        found = _started_by(pid, mark, began)


def _started_by(pid: int, mark: str, began: _Process | None) -> list[_Process]:
    """The living processes that one started, not itself."""
    if began is None:
        return []
    every = {one.pid: one for one in _living() if one.started >= began.started}
    ours = [one for one in every.values() if one.pid != pid and _belongs(one, pid, mark, every)]
    return [one for one in ours if one.pid != os.getpid()]


def _belongs(one: _Process, pid: int, mark: str, every: dict[int, _Process]) -> bool:
    if one.group == pid:
        return True
    here: _Process | None = one
    for _ in range(len(every)):
        if here is None:
            break
        if here.parent == pid:
            return True
        here = every.get(here.parent)
    return _is_marked(one.pid, mark)


def _is_marked(pid: int, mark: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123  it is no path of a user's
            variables = file.read(_ENVIRON_BYTES).split(b"\0")
    except OSError:  # another user's, or it has gone
        return False
    return f"{MARK}={mark}".encode() in variables


def _living() -> list[_Process]:
    try:
        names = os.listdir("/proc")  # noqa: PTH208
    except OSError:
        return []
    found = (_process(int(name)) for name in names if name.isdecimal())
    return [one for one in found if one is not None and one.pid]


def _process(pid: int) -> _Process | None:
    """What the kernel says of a process; nothing of one that is gone. A dead one has number 0."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            # The name in parentheses may have anything in it.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    over = fields[0].decode() in _OVER
    parent, group = map(int, fields[1:3])
    return _Process(0 if over else pid, parent, group, int(fields[19]))


def _kill(one: _Process) -> None:
    """Kills this very process, not another one that has its number meanwhile."""
    with contextlib.suppress(OSError):
        if not hasattr(os, "pidfd_open"):
            os.kill(one.pid, signal.SIGKILL)
            return
        handle = os.pidfd_open(one.pid)
        try:
            now = _process(one.pid)
            if now is not None and now.started == one.started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
