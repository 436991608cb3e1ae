"""A handler that does what no handler should, by the dice; and notes what it stored in the end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import ingestd

POISON = 100_000
"""A record from here on never succeeds."""


class _Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__qualname__", "__module__", "__name__"}:
            raise SystemExit(name)
        return type.__getattribute__(cls, name)


class _NamelessError(Exception, metaclass=_Meta):
    pass


class _UglyError(Exception):
    def __str__(self) -> str:
        raise SystemExit("even here")


class _LyingError(Exception):
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise KeyboardInterrupt


class _BareReject(ingestd.Reject):
    def __init__(self) -> None:
        pass


class _Odd:
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise SystemExit("no class")


def _deep(n: int) -> Any:
    return _deep(n + 1)


def _chain() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    raise one


def _group() -> None:
    raise BaseExceptionGroup("many", [ValueError("a"), SystemExit(2), KeyboardInterrupt()])


def _raise(exc: BaseException) -> None:
    raise exc


def _fork(child: Any) -> None:
    if os.fork() == 0:
        child()
    # The parent does not wait: its child is a zombie, or goes on.


def _linger() -> None:
    time.sleep(1)
    os._exit(0)


def _thread(target: Any, *, daemon: bool = True) -> None:
    threading.Thread(target=target, daemon=daemon).start()


def _log() -> None:
    for number in range(2000):
        logging.getLogger("fuzz").info("line %d", number)
    warnings.warn("a warning", stacklevel=1)


async def _nothing() -> None:
    pass


def _descriptors() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


def _write_everywhere() -> None:
    for fd in _descriptors():
        if fd > 2:
            with contextlib.suppress(OSError):
                os.write(fd, random.randbytes(random.choice([1, 7, 64, 5000])))


def _close_some() -> None:
    for fd in _descriptors():
        if fd > 2 and random.random() < 0.5:
            with contextlib.suppress(OSError):
                os.close(fd)


def _redirect() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in _descriptors():
        if fd > 2 and random.random() < 0.5:
            with contextlib.suppress(OSError):
                os.dup2(null, fd)


def _shorten() -> None:
    for fd in _descriptors():
        if fd > 2:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)


def _memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))
    _raise(ValueError([bytearray(1 << 20) for _ in range(64)]))


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _process_leaves() -> None:
    subprocess.Popen(["sleep", "30"], start_new_session=True)
    os._exit(3)


def _break_python() -> None:
    sys.modules.clear()
    sys.setrecursionlimit(30)
    gc.disable()
    time.monotonic = time.perf_counter = lambda: "now"  # type: ignore[assignment, return-value]


WEIRD: dict[str, Any] = {
    "ValueError": lambda: _raise(ValueError("no")),
    "SystemExit": lambda: sys.exit(7),
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "GeneratorExit": lambda: _raise(GeneratorExit()),
    "StopIteration": lambda: _raise(StopIteration()),
    "CancelledError": lambda: _raise(asyncio.CancelledError()),
    "MemoryError": lambda: _raise(MemoryError()),
    "nameless": lambda: _raise(_NamelessError("x")),
    "ugly": lambda: _raise(_UglyError()),
    "lying": lambda: _raise(_LyingError("x")),
    "huge": lambda: _raise(ValueError("x" * 5_000_000)),
    "surrogates": lambda: _raise(ValueError("\udc80")),
    "chain": _chain,
    "group": _group,
    "recursion": lambda: _deep(0),
    "child returns": lambda: _fork(lambda: None),
    "child raises": lambda: _fork(lambda: _raise(ValueError("child"))),
    "child exits": lambda: _fork(lambda: sys.exit(3)),
    "child leaves": lambda: _fork(lambda: os._exit(3)),
    "child execs": lambda: _fork(lambda: os.execv("/bin/true", ["true"])),
    "child lingers": lambda: _fork(_linger),
    "program": lambda: subprocess.run(["true"]),
    "program stays": lambda: subprocess.Popen(["sleep", "3"]) and None,
    "chdir": lambda: os.chdir("/"),
    "thread": lambda: _thread(lambda: time.sleep(1)),
    "thread raises": lambda: _thread(lambda: _raise(SystemExit(1))),
    "thread stays": lambda: _thread(lambda: time.sleep(30), daemon=False),
    "log": _log,
    "hang": lambda: time.sleep(1.2),
    "returns odd": _Odd,
    "returns coroutine": _nothing,
    "returns generator": lambda: (i for i in [1]),
    "garbage": lambda: gc.collect() and None,
    "print": lambda: print("x" * 10_000, file=sys.stderr),
}
"""Survivable in every executor."""
FATAL: dict[str, Any] = {
    "_exit": lambda: os._exit(5),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "leaves a process": _process_leaves,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SIGALRM": lambda: signal.setitimer(signal.ITIMER_REAL, 0.01),
    "group signal": lambda: os.killpg(0, signal.SIGUSR1),
    "null": lambda: ctypes.string_at(0),
    "close": _close_some,
    "close all": lambda: os.closerange(0, 4096),
    "redirect": _redirect,
    "write": _write_everywhere,
    "shorten": _shorten,
    "memory": _memory,
    "few descriptors": _few_descriptors,
    "break python": _break_python,
    "hang for ever": lambda: time.sleep(3600),
    "dies later": lambda: threading.Timer(0.05, os._exit, (4,)).start(),
}
"""Survivable where the process is not the daemon's."""


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def _stays() -> None:
    while True:
        with contextlib.suppress(BaseException):
            await asyncio.sleep(3600)


def _raises_in(callback: Any) -> None:
    _loop().call_soon(callback)


def _inner_loop() -> None:
    inner = _nothing()
    try:
        asyncio.run(inner)
    finally:
        inner.close()


def _closes_loop() -> None:
    class Closes(SystemExit):
        def __str__(self) -> str:
            self.args[0].close()
            return "closed"

    closes = Closes(_loop())
    _raises_in(lambda: _raise(closes))


def _deaf(*_: Any) -> None:
    raise SystemExit("deaf")


def _task_group() -> Any:
    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.sleep(3600))
            tasks.create_task(asyncio.wait_for(asyncio.sleep(3600), 0.01))

    return _loop().create_task(group()) and None


ASYNC: dict[str, Any] = {
    "stop": lambda: _loop().stop(),
    "close": lambda: _loop().close(),
    "close at rest": _closes_loop,
    "run": _inner_loop,
    "run here": lambda: _loop().run_until_complete(_loop().create_future()),
    "leak": lambda: [_loop().create_task(_stays()) for _ in range(50)] and None,
    "cancel all": lambda: [task.cancel() for task in asyncio.all_tasks()] and None,
    "cancel later": lambda: _loop().call_later(0.01, asyncio.current_task().cancel) and None,
    "callback exits": lambda: _raises_in(lambda: sys.exit(3)),
    "callback is ugly": lambda: _raises_in(lambda: _raise(_UglyError())),
    "task is ugly": lambda: _loop().create_task(_fails()) and gc.collect() and None,
    "deaf": lambda: _loop().set_exception_handler(_deaf),
    "group of tasks": _task_group,
    "no loop": lambda: asyncio.set_event_loop(None),
    "many callbacks": lambda: [_loop().call_soon(int) for _ in range(100_000)] and None,
}
"""Survivable where the loop is not the daemon's."""


async def _fails() -> None:
    raise _UglyError


class Misbehaves:
    """Misbehaves on the first attempts of a batch, and for ever with poison in it.

    Args:
        folder: for the notes.
        seed: of the dice.
        fatal: also do what only a process of its own survives, if it is `all`; else the names of
            what to do, with commas, one after the other.
    """

    def __init__(self, folder: str, seed: int = 1, fatal: str = "") -> None:
        self.folder = folder
        self.seed = int(seed)
        self.names = [*WEIRD, *(FATAL if fatal else {})]
        self.in_turn = fatal not in {"", "all"}
        if self.in_turn:
            self.names = fatal.split(",")

    def _call(self, batch: ingestd.Batch[int]) -> Any:
        dice = random.Random(f"{self.seed} {batch.id} {batch.attempt}")
        poisoned = any(record >= POISON for record in batch)
        turns = self._turns()
        # Calls in several threads may take the same one: the missing ones are those without a note.
        missing = [name for name in self.names if name not in turns] if self.in_turn else []
        if poisoned or (batch.attempt <= 2 and (missing or dice.random() < 0.6)):
            in_turn = missing or [self.names[len(turns) % len(self.names)]]
            name = in_turn[0] if self.in_turn else dice.choice(self.names)
            if poisoned and batch.attempt > 2:
                name = "ValueError"
            else:
                self._note("turns", [name])
            self._note("tried", [name])
            returned = (WEIRD | FATAL | ASYNC)[name]()
            if returned is not None and not poisoned:
                self._note("stored", list(batch))  # what is odd need not be a failure
                return returned
            if poisoned:
                raise ValueError("poison")
        self._note("stored", list(batch))
        return None

    def __call__(self, batch: ingestd.Batch[int]) -> Any:
        return self._call(batch)

    def _turns(self) -> list[str]:
        turns = Path(self.folder, "turns")
        if not (self.in_turn and turns.exists()):
            return []
        return [json.loads(line)[0] for line in turns.read_text().splitlines()]

    def _note(self, name: str, values: list[Any]) -> None:
        fd = os.open(Path(self.folder, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, (json.dumps(values) + "\n").encode())
        os.close(fd)

    def close(self) -> None:
        if random.random() < 0.2:
            raise SystemExit("close")


class MisbehavesAsync(Misbehaves):
    """The same, in a coroutine."""

    async def __call__(self, batch: ingestd.Batch[int]) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return self._call(batch)
