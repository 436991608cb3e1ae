"""Promise 1, seen from the kernel: no 202 leaves before the sync of its commit."""

from __future__ import annotations

import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CALLS = "pwrite64,fdatasync,fsync,write,writev,sendto,sendmsg"
_LINE = re.compile(
    r"^(?P<pid>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<name>\w+)\()(?P<rest>.*)$"
)


class Call(NamedTuple):
    """One system call: when it began and ended, as line numbers of the trace."""

    name: str
    text: str
    began: int
    ended: int


def calls(trace: Path) -> Iterator[Call]:
    """The calls of all threads, put together where another thread's call came between."""
    begun: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(trace.read_text(errors="replace").splitlines()):
        found = _LINE.match(line)
        if found is None:
            continue
        pid, rest = found["pid"], found["rest"]
        if found["resumed"]:
            began, head = begun.pop((pid, found["resumed"]))
            yield Call(found["resumed"], head + rest, began, number)
        elif rest.endswith("<unfinished ...>"):
            begun[pid, found["name"]] = (number, rest)
        else:
            yield Call(found["name"], rest, number, number)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_202_leaves_before_the_sync_of_its_commit(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-y", "-s", "20000", "-o", str(trace), "-e", f"trace={CALLS}")
    with daemon(cwd=tmp_path, prefix=strace) as one:
        names = [f"marker-{n:04d}" for n in range(60)]
        with ThreadPoolExecutor(6) as clients:
            answers = list(
                clients.map(
                    lambda name: one.request(
                        "POST", "/v1/records", f'"{name}"', {"X-Request-Id": name}
                    )[0],
                    names,
                )
            )
        assert answers == [202] * 60
        os.kill(one.event("daemon_started")["pid"], signal.SIGTERM)  # not strace: it would go alone
        assert one.wait() == 0
    traced = list(calls(trace))
    for name in names:
        written = [c for c in traced if c.name == "pwrite64" and f'\\"{name}\\"' in c.text]
        answered = [c for c in traced if "202 Accepted" in c.text and name in c.text]
        assert answered, name
        first = min(written, key=lambda c: c.began)
        assert "journal.db-wal" in first.text
        syncs = [
            c
            for c in traced
            if c.name in {"fdatasync", "fsync"}
            and "journal.db-wal" in c.text
            and c.text.rstrip().endswith("= 0")
            and c.began > first.ended
            and c.ended < answered[0].began
        ]
        assert syncs, f"{name} was answered without a sync behind its write"
