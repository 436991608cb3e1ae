"""Standard input into rsyslog: `python -m benchmarks.peers.rsyslog_stdin SOCKET FILE COMMAND…`.

Starts the daemon, moves standard input into its Unix socket, waits until as many bytes are in the
daemon's file, and ends it. The bytes go from the pipe to the socket inside the kernel, so that the
daemon has the CPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 30.0
STALLED_SECONDS = 60.0
"""The file grows within this, or the daemon has failed."""
LOOK_AGAIN_SECONDS = 0.01
AT_ONCE_BYTES = 1 << 20


def main(address: str, file: Path, command: list[str]) -> int:
    """Exit code 0 once everything is in the file."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as daemon:
        try:
            with _connected(address, daemon) as stream:
                sent = _move(sys.stdin.fileno(), stream.fileno())
            return 0 if _written(file, sent) else 1
        finally:
            daemon.terminate()


def _connected(address: str, daemon: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + START_SECONDS
    while True:
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(address)
        except OSError:
            stream.close()
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(LOOK_AGAIN_SECONDS)
        else:
            return stream


def _move(source: int, target: int) -> int:
    """Everything from a pipe to a socket; how many bytes."""
    moved = 0
    while count := os.splice(source, target, AT_ONCE_BYTES):
        moved += count
    return moved


def _written(file: Path, size: int) -> bool:
    """Waits until the file has so many bytes; no, if it does not grow any more."""
    last, deadline = 0, time.monotonic() + STALLED_SECONDS
    while last < size and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            if (now := file.stat().st_size) != last:
                last, deadline = now, time.monotonic() + STALLED_SECONDS
    return last >= size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
