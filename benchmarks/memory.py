"""What processes take: read from /proc, of a process and of those it started.

RSS counts every page that a process can touch, those it shares with others included; PSS divides
the shared ones among who shares them. A limit (a container's, a unit's) is nearer to the sum of
PSS; what a person sees in `top` is RSS, which is the higher one and the one that is judged.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

MB = 1e6
_PROC = Path("/proc")


class Memory(NamedTuple):
    """Of one process, in bytes.

    Attributes:
        rss: resident now.
        pss: its share of that.
        peak: the highest RSS of its life, as the kernel keeps it (VmHWM).
    """

    rss: int
    pss: int
    peak: int


def memory_of(pid: int) -> Memory:
    """What a process takes; nothing if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        rollup = _sizes(_PROC / str(pid) / "smaps_rollup")
        status = _sizes(_PROC / str(pid) / "status")
        # The kernel counts in batches for each thread, so a peak may lag behind what is there.
        peak = max(status.get("VmHWM", 0), rollup.get("Rss", 0))
        return Memory(rollup.get("Rss", 0), rollup.get("Pss", 0), peak)
    return Memory(0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Who was started by a process, and by those."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in (_PROC / str(pid) / "task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_worker(pid: int) -> bool:
    """Whether a child of ingestd runs handlers; the fork server and the tracker do not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        words = (_PROC / str(pid) / "cmdline").read_bytes()
        return b"resource_tracker" not in words and not descendants(pid)
    return False


def _sizes(path: Path) -> dict[str, int]:
    """The lines of a file of /proc that end in kB, in bytes."""
    sizes = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[name] = int(value.split()[0]) * 1024
    return sizes
