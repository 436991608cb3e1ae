"""Process 1 of a container forwards signals to the daemon and reaps orphans.

The kernel gives every orphan of a PID namespace to its process 1, which has to reap it, or it stays
a zombie. The daemon can't do that itself: reaping whatever has ended would take the exit codes of
children that a handler waits for. So process 1 forks before anything has begun; the child is the
daemon, and process 1 does nothing but this. An init in front (`docker run --init`) does the same.
"""

from __future__ import annotations

import os
import signal

_PASSED_ON = frozenset(
    {
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGWINCH,
        signal.SIGCONT,
    }
)
_KILLED = 128
"""A shell's way to say that a signal ended a process: this and its number."""


def split_off() -> None:
    """Returns at once, but in process 1: there only a child of it returns.

    Process 1 leaves when that child has ended, with its exit code.
    """
    if os.getpid() != 1:
        return
    # Blocked before the fork, so that none is lost; and SIGTTOU, see `_take_terminal`.
    watched = {*_PASSED_ON, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*watched, signal.SIGTTOU})
    child = os.fork()
    if child:
        os._exit(_watch(child, watched))
    _take_terminal()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take_terminal() -> None:
    """A process group of its own: a Ctrl-C must not arrive directly and passed on, as two."""
    os.setpgid(0, 0)
    try:
        os.tcsetpgrp(0, os.getpgrp())
    except OSError:
        pass  # standard input is no terminal, or not ours


def _watch(child: int, watched: set[signal.Signals]) -> int:
    while True:
        number = signal.sigwaitinfo(watched).si_signo
        if number != signal.SIGCHLD:
            os.kill(child, number)
        elif (code := _reap(child)) is not None:
            return code


def _reap(child: int) -> int | None:
    """Reaps all that has ended; the exit code of `child` if it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return None
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else _KILLED - code
