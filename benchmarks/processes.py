"""Child processes: started with a clean environment, and always ended, each by its own id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
LAST_WORDS_MAX = 400
"""Characters."""
END_SECONDS = 15.0
"""How long a child may take to leave before it is killed."""


class Failed(Exception):  # noqa: N818  reads as what happened
    """This run does not count, and why."""


@contextlib.contextmanager
def running(
    command: Sequence[str],
    folder: Path,
    stdin: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a folder, where `stdout` and `stderr` are files; ended when this is left.

    Args:
        command: what to run; modules of the checkout can be imported.
        folder: its current folder.
        stdin: a file descriptor.
        environment: beside what every child has.
    """
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        child = None
        try:
            # A signal unwinds the benchmark: amid the start it would leave a child without owner.
            with _signals_wait():
                child = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=_environment() | dict(environment or {}),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,  # Ctrl-C is for the benchmark; it ends its children
                )
            yield child
        finally:
            if child is not None:
                end(child)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile are handled at the end of this."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers of signals in the main thread only
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def end(child: subprocess.Popen[bytes]) -> None:
    """Asks the child to leave; kills it, and what it started, if it does not."""
    child.terminate()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        # It is the first of a session of its own, and until we wait for it its number is its own.
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def output_of(command: Sequence[str], folder: Path, timeout: float) -> str:
    """What a command that ends by itself prints.

    Raises:
        Failed: it did not end well, or not in `timeout` seconds.
    """
    with running(command, folder) as child:
        finish(child, folder, timeout)
    return (folder / "stdout").read_text()


def finish(child: subprocess.Popen[bytes], folder: Path, timeout: float) -> None:
    """Waits for a child's own end.

    Raises:
        Failed: it did not end well, or not in `timeout` seconds.
    """
    try:
        code = child.wait(timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"did not end in {timeout:.0f} s") from None
    if code:
        raise Failed(f"exit code {code}: {last_words(folder)}")


def last_words(folder: Path) -> str:
    """What the child in this folder said last: its last error if it logs such, else its end."""
    lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if '"level":"error"' in line]
    return (errors or lines or ["(no output)"])[-1][:LAST_WORDS_MAX]


def _environment() -> dict[str, str]:
    """This process's, without settings of ingestd, with the checkout importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INGESTD_")}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path}
