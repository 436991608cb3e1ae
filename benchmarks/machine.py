"""Facts that a number means nothing without: the machine, the disk, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import time
from pathlib import Path

PACKAGES = (
    *("ingestd", "aiohttp", "async-timeout", "msgspec", "uvloop"),
    *("fastapi", "starlette", "pydantic", "uvicorn", "httptools"),
)
SYNCS = 50


def facts(folder: Path) -> dict[str, str]:
    """What the machine is.

    Args:
        folder: on the disk that is measured.
    """
    return {
        "CPU": f"{len(os.sched_getaffinity(0))} cores, {_cpu_model()}",
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": _file_system(folder),
        "4 KiB and fdatasync, median": f"{_sync_seconds(folder) * 1e3:.2f} ms",
    }


def versions(tool: str) -> dict[str, str]:
    """What was measured with what; a package that is not installed is `none`.

    Args:
        tool: what makes the load.
    """
    found = {"Python": f"{platform.python_version()} ({platform.python_implementation()})"}
    found["SQLite"] = sqlite3.sqlite_version
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    if commit := _commit():
        found["ingestd"] += f" ({commit})"
    if tool == "wrk":
        said = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
        found["wrk"] = " ".join(said.split()[1:2])
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """Its type, from the longest mount point above the folder."""
    found, longest = "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        point = mount.replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) >= longest:
            found, longest = kind, len(point)
    return found


def _sync_seconds(folder: Path) -> float:
    """How long this disk takes to keep a page, over and over at the same place."""
    times = []
    path = folder / "sync"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        for _ in range(SYNCS):
            os.pwrite(descriptor, os.urandom(4096), 0)
            began = time.perf_counter()
            os.fdatasync(descriptor)
            times.append(time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()
    return statistics.median(times)


def _commit() -> str:
    """The checkout's, if it is one."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
