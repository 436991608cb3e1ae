"""The daemon's own process: interpreter, signals, streams, surroundings, children it forks."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from ingestd.base.process import GARBAGE_MAX, HeldSignals
from ingestd.host.sockets import show_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# -- signals --------------------------------------------------------------------------------------
#
# Signals as events: the first asks to drain, the second to leave at once; SIGHUP to reload.
#
# A timer's signal, or one that means nothing to us, would end the process: a handler in a thread
# can set an alarm, and some programs write their state on a signal. Those do nothing here.

LEAVE = (signal.SIGTERM, signal.SIGINT)
WITHOUT_MEANING = (
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
SIGNALS = (*LEAVE, signal.SIGHUP, *WITHOUT_MEANING)
"""What the daemon receives, and a process that is forked from it must not."""


def ignore_hangups() -> None:
    """Ignores SIGHUP until there is a loop: a reload during the start must not end the process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Signals:
    """Turns SIGTERM and SIGINT into two events while it is installed, and SIGHUP into a third.

    Attributes:
        reload_requested: set by each SIGHUP; its receiver clears it.
        stop_requested: set by the first signal.
        force_requested: set by the second.
        name: the first signal's name.
    """

    def __init__(self) -> None:
        self.reload_requested = asyncio.Event()
        self.stop_requested = asyncio.Event()
        self.force_requested = asyncio.Event()
        self.name = ""
        self._installed = False

    def install(self) -> None:
        """From now on signals arrive here; on the running loop."""
        self._installed = True
        self.keep()
        for number in WITHOUT_MEANING:
            # Not SIG_IGN: that would be inherited by what a handler starts.
            asyncio.get_running_loop().add_signal_handler(number, _nothing)

    def keep(self) -> None:
        """Installs those that mean something again, while they are: call it now and then.

        A handler in a thread can put another function in their place for the operating system
        (`faulthandler.register`), and Python would know nothing of it.
        """
        if not self._installed:
            return
        loop = asyncio.get_running_loop()
        for number in LEAVE:
            loop.add_signal_handler(number, self._arrived, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload_requested.set)

    def remove(self) -> None:
        """Ignores them from now on: there is nothing left that a signal could hurry."""
        self._installed = False
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _arrived(self, number: signal.Signals) -> None:
        if self.stop_requested.is_set():
            self.force_requested.set()
        else:
            self.name = number.name
            self.stop_requested.set()


def _nothing() -> None:
    pass


# -- interpreter and allocator ---------------------------------------------------------------------

SWITCH_SECONDS = 0.001
"""Interval in which a computing thread gives the interpreter to others. With the default of 5 ms a
small request, which passes through three threads, waits three times as long beside a body that
is being parsed."""

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BYTES = 128 * 1024
_STREAM_BYTES = 1024 * 1024
_SPARE_BYTES = 1024 * 1024
_PAD_BYTES = 256 * 1024
_ARENAS = 2


def settle_interpreter(*, for_strangers: bool) -> None:
    """Large blocks of memory go back to the system once they are free; waits are short, cycles few.

    glibc raises the size from which it asks the system for memory up to 32 MiB as soon as blocks
    that large come and go, and keeps them in an arena a thread then: after some large bodies a
    process stays several times as large as what is in it. The end of an arena stays, up to 1 MiB:
    to give it back and get it anew costs 20 to 30 faults of pages for each body of 100 KB.

    Args:
        for_strangers: what comes may be of any size, from many at once. Otherwise pieces of the
            usual sizes may stay: to get them anew each time is a sixth of a stream's CPU.
    """
    gc.freeze()  # what is imported: the first look at all of it would take 20 ms, and find nothing
    keep_settled()
    _bound_recursion()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES if for_strangers else _STREAM_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _SPARE_BYTES)
    mallopt(_M_TOP_PAD, _PAD_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)


def settle_memory() -> None:
    """Memory that the start has made stays; what it has thrown away goes back to the system."""
    gc.collect()
    gc.freeze()  # the collector need not look at it again and again
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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


# -- standard streams ------------------------------------------------------------------------------
#
# Standard streams that are closed are opened on `/dev/null` before anything else is opened.
#
# Otherwise the first socket or file would get the number 0, 1 or 2, and a print would write
# into it: into the journal, at worst. libuv refuses such a number and aborts the process.

_FIRST = 3  # what is not a standard stream


def occupy_standard_streams() -> None:
    """Call before the first file or socket that stays open."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def move_input() -> int:
    """Moves standard input to a descriptor of its own, and leaves `/dev/null` in its place.

    A handler, or a program that it starts, which reads its standard input would take lines away.
    Nothing that is started gets the new descriptor. Call before a handler is imported.

    Returns:
        The descriptor.
    """
    own = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)  # which programs that are started do get
    os.close(nothing)
    return own


def own_stderr() -> TextIO:
    """Standard error under a descriptor of its own, for what is not a log line.

    A handler in a thread may close `sys.stderr` or put something else in its place.
    """
    try:
        fd = fcntl.fcntl(sys.stderr.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST)
    except (OSError, ValueError, AttributeError):
        fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return os.fdopen(fd, "w", encoding=encoding, errors="backslashreplace")


# -- surroundings of workers -----------------------------------------------------------------------
#
# A handler in a thread may change the daemon's own folder, environment, umask and search path in
# good faith; a worker that is started later, for another pipeline, gets none of that.


class Surroundings(NamedTuple):
    """Working folder, environment, umask and import path of the start.

    Attributes:
        folder: the current folder, absolute.
        environ: the environment.
        umask: permissions that new files do not get.
        path: where modules are looked for; every entry is absolute.
    """

    folder: str
    environ: dict[str, str]
    umask: int
    path: list[str]

    @classmethod
    def now(cls) -> Surroundings:
        """Those of this moment; before a handler is imported they are those of the start.

        Raises:
            OSError: the current folder is gone.
        """
        folder = os.getcwd()  # noqa: PTH109  text, also if it is not UTF-8
        umask = os.umask(0o077)  # which can only be read by setting it
        os.umask(umask)
        return cls(folder, dict(os.environ), umask, absolute(sys.path, folder))


def absolute(path: list[str], folder: str) -> list[str]:
    """The entries of a search path, each relative one as seen from a folder."""
    return [os.path.join(folder, os.fspath(entry)) if entry else folder for entry in list(path)]  # noqa: PTH118


# -- descriptors in forked children ----------------------------------------------------------------
#
# A handler that runs in a thread of the daemon may use `multiprocessing` or a pool of processes
# with the start method fork. Such a child has a copy of every descriptor: with the lock and the
# journal it would keep the next daemon from starting, with a listening socket it would keep the
# port, and a signal that is sent to it would be written into the daemon's own wake-up pipe.
# Programs that are started with exec get none of this: every descriptor of ours is closed there.

_FDS = Path("/proc/self/fd")
_OURS = ("journal", "lock")
"""How the names of our files in the data directory begin."""


class Forks:
    """Takes what is the daemon's from every process that is forked, until `forget`.

    Args:
        data_dir: where its journals and locks are.
        fds: more descriptors of its own.
    """

    def __init__(self, data_dir: Path, fds: Collection[int] = ()) -> None:
        self._folder = f"{data_dir.resolve()}{os.sep}"
        self._fds = tuple(fds)
        self._addresses: Callable[[], Collection[str]] = tuple
        self._active = True
        HeldSignals(SIGNALS, self._after)

    def listen(self, addresses: Callable[[], Collection[str]]) -> None:
        """Adds listen addresses: sockets there, and connections to them, are the daemon's."""
        self._addresses = addresses

    def forget(self) -> None:
        """Does nothing any more."""
        self._active = False

    def _after(self) -> None:
        if not self._active:
            return
        self._active = False
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # Put in place of what is taken: with a number that is free again SQLite, whose objects are
        # still there, would sooner or later write into somebody else's file.
        nothing = os.open("/", os.O_PATH | os.O_CLOEXEC)
        for fd in self._ours():
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)

    def _ours(self) -> list[int]:
        socket.setdefaulttimeout(None)  # which a socket object would give to what it stands for
        addresses = set(self._addresses())
        ports = {address.rpartition(":")[2] for address in addresses}
        open_now = [int(link.name) for link in _FDS.iterdir()]
        return [fd for fd in open_now if fd in self._fds or self._is_ours(fd, addresses, ports)]

    def _is_ours(self, fd: int, addresses: set[str], ports: set[str]) -> bool:
        try:
            target = os.readlink(_FDS / str(fd))  # noqa: PTH115  text, also if it is no path
            if target.startswith("socket:"):
                return _is_at(fd, addresses, ports)
        except OSError:
            return False
        return target.startswith(self._folder) and os.path.basename(target).startswith(_OURS)  # noqa: PTH119


def _is_at(fd: int, addresses: set[str], ports: set[str]) -> bool:
    sock = socket.socket(fileno=fd)
    try:
        shown = show_socket(sock)
    finally:
        sock.detach()
    if sock.family in {socket.AF_INET, socket.AF_INET6}:
        return shown.rpartition(":")[2] in ports
    return shown in addresses


# -- process 1 of a container ---------------------------------------------------------------------
#
# Process 1 of a container forwards signals to the daemon and reaps orphans.
#
# The kernel gives every orphan of a PID namespace to its process 1, which has to reap it, or it
# stays a zombie. The daemon can't do that itself: reaping whatever has ended would take the exit
# codes of children that a handler waits for. So process 1 forks before anything has begun; the
# child is the daemon, and process 1 does nothing but this. An init in front (`docker run --init`)
# does the same.

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
