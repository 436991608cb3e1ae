"""Servers of S3 for tests: rclone, which keeps files and can be killed, and moto, in memory."""

from __future__ import annotations

import http.client
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.prove.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_ID = "a-key-id"
SECRET = "a-secret-of-the-key-id"
BUCKET = "bucket"


def need(*modules: str) -> None:
    """Skips a test for which a package is missing."""
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is missing: requirements/sinks.txt")


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: requirements/sinks.txt")
    return found


class ServerProcess:
    """A server on a port of its own, that answers when this returns."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.port = port
        deadline = time.monotonic() + 120
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/")
                connection.getresponse().read()
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return
            finally:
                connection.close()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class RcloneServer:
    """`rclone serve s3` of a folder; it takes no note of If-None-Match."""

    def __init__(self, folder: Path) -> None:
        self.command = tool("rclone")
        self.folder, self.port = folder, free_port()
        (folder / BUCKET).mkdir(parents=True)
        self.server: ServerProcess | None = None
        self.start()

    def start(self, secret: str = SECRET) -> None:
        self.server = ServerProcess(
            [self.command, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--auth-key",
             f"{KEY_ID},{secret}", "--config", "/dev/null", "--vfs-cache-mode", "off",
             str(self.folder)], self.port,
        )  # fmt: skip

    def stop(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class MotoServer:
    """moto; it honours If-None-Match and takes any secret."""

    def __init__(self) -> None:
        need("moto")
        self.port = free_port()
        command = [tool("moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]
        self.server = ServerProcess(command, self.port)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"
