"""What the fault tests share: what handlers noted, waiting, clients, mounts, strace."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.daemon.harness import Daemon

HANDLER = "tests.faults.handlers:"


def needs(*tools: str, root: bool = False) -> pytest.MarkDecorator:
    """Skips with the reason where a tool is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return pytest.mark.skipif(True, reason=f"{', '.join(missing)} is not installed")
    return pytest.mark.skipif(root and os.getuid() != 0, reason="needs root, to mount")


def into(folder: Path, handler: str = "Note", **more: str) -> list[str]:
    """Arguments of a daemon with a handler of `tests.faults.handlers`."""
    return [HANDLER + handler, "--handler.options.folder", str(folder)] + [
        part for key, value in more.items() for part in (f"--{key.replace('__', '.')}", value)
    ]


def notes(folder: Path) -> list[tuple[str, int, list[Any]]]:
    """What handlers noted so far: batch id, attempt, records; no line that a kill has cut."""
    path = folder / "notes"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith(b"]]")]


def seen(folder: Path) -> set[Any]:
    """Every record that a handler got, at least once."""
    return {record for _, _, records in notes(folder) for record in records}


def check_names(folder: Path) -> None:
    """Promise 3: a batch's id always named the same records, and no record has two batches."""
    by_id: dict[str, list[Any]] = {}
    homes: dict[Any, set[str]] = defaultdict(set)
    for name, _, records in notes(folder):
        assert by_id.setdefault(name, records) == records, name
        for record in records:
            homes[record].add(name)
    assert not [record for record, names in homes.items() if len(names) > 1]


def until(condition: Callable[[], Any], timeout: float = 60, what: str = "") -> Any:
    """Waits for the condition; its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, what or "it did not happen"
        time.sleep(0.01)
    return value


class Client(threading.Thread):
    """Posts numbers, one or a few a request, until told to stop or the connection breaks.

    Attributes:
        accepted: the numbers that were answered with 202.
        answers: how often each status came; 0 for no answer.
    """

    def __init__(self, one: Daemon, numbers: Iterator[int], per_request: int = 3) -> None:
        super().__init__(daemon=True)
        self.accepted: list[int] = []
        self.answers: dict[int, int] = defaultdict(int)
        self._port = one.port
        self._numbers = numbers
        self._per_request = per_request
        self._stop_it = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_it.set()
        self.join(120)
        assert not self.is_alive()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            while not self._stop_it.is_set():
                ids = [next(self._numbers) for _ in range(self._per_request)]
                try:
                    connection.request("POST", "/v1/records", b"".join(b"%d\n" % i for i in ids))
                    answer = connection.getresponse()
                    answer.read()
                except (OSError, http.client.HTTPException):
                    self.answers[0] += 1
                    return
                self.answers[answer.status] += 1
                if answer.status == 202:
                    self.accepted += ids


def strace(*inject: str, path: Path | None = None, to: str = "/dev/null") -> tuple[str, ...]:
    """A prefix that lets system calls fail; the daemon stays the process that was started.

    `when=` counts the calls of each thread by itself; with `path` only those on that file.
    """
    names = ",".join(one.split(":")[0] for one in inject)
    options = [option for one in inject for option in ("-e", f"inject={one}")]
    options += ["-P", str(path)] if path else []
    return ("strace", "-D", "-f", "--seccomp-bpf", "-o", to, "-e", f"trace={names}",
            *options)  # fmt: skip


@contextlib.contextmanager
def mounted(where: Path, *how: str) -> Iterator[Path]:
    """A mount for as long as the block; `how` is what `mount` is told before the place."""
    where.mkdir()
    done = subprocess.run(["mount", *how, str(where)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount does not work here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@contextlib.contextmanager
def ext4(where: Path, size: str = "64M") -> Iterator[Path]:
    """A small ext4 of its own, in a file."""
    image = where.with_name("image")
    subprocess.run(["truncate", "-s", size, str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(where, "-o", "loop", str(image)):
        yield where


def finish(*args: str, cwd: Path, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """A start without faults: everything is settled, it leaves with 0, and the numbers add up."""
    from tests.daemon.harness import daemon

    with daemon(*args, cwd=cwd, prefix=prefix) as one:
        until(lambda: one.status()["pipelines"]["default"]["pending"] == 0, 120, "still pending")
        one.terminate()
        assert one.wait() == 0, (one.events[-5:], one.other[-20:])
        report = one.event("drained")
    assert report["balanced"]
    assert report["accepted"] == report["processed"] + report["dead"]
    return report
