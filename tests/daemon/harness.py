"""Starts the real daemon as a real process, and speaks to it as its users do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]


class Daemon:
    """One `ingestd run` process. Use as a context manager; it is ended by its id."""

    def __init__(
        self,
        *args: str,
        cwd: Path,
        stdin: Any = subprocess.DEVNULL,
        prefix: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None,
        fds: tuple[int, ...] = (),
        module: str = "ingestd",
    ) -> None:
        command = [sys.executable, "-m", module, "run", *args]
        if "--listen" not in args and not {"stdin", "fetch"} & set(args):
            command += ["--listen", "127.0.0.1:0"]
        command += ["--admin.listen", "127.0.0.1:0"]
        env = {k: v for k, v in os.environ.items() if not k.startswith("INGESTD_")}
        # Each is a process of its own, whose start costs as much as the daemon's.
        env["INGESTD_EXECUTOR__WORKERS"] = "2"
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        env.update(environ or {})
        self.process = subprocess.Popen(
            [*prefix, *command], cwd=cwd, stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=env, pass_fds=fds,
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._came: queue.Queue[None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.other.append(line.decode(errors="replace").rstrip("\n"))
            self._came.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(60)
        for stream in (self.process.stdout, self.process.stderr, self.process.stdin):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def event(self, name: str, timeout: float = 60) -> dict[str, Any]:
        """The first log event of that name; waits for it."""
        deadline = time.monotonic() + timeout
        while True:
            for event in list(self.events):
                if event.get("event") == name:
                    return event
            left = deadline - time.monotonic()
            if left <= 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                raise AssertionError(f"no {name!r}; {self.events[-5:]} {self.other[-20:]}")
            with contextlib.suppress(queue.Empty):
                self._came.get(timeout=min(left, 0.2))

    @property
    def pid(self) -> int:
        """The daemon's own process id, also behind a prefix that runs it as a child."""
        return int(self.event("daemon_started")["pid"])

    @property
    def port(self) -> int:
        return int(self.event("daemon_started")["listening"][0].rsplit(":", 1)[1])

    @property
    def admin_port(self) -> int:
        return int(self.event("daemon_started")["admin"][0].rsplit(":", 1)[1])

    def terminate(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """The exit code; all of stderr has been read when this returns."""
        code = self.process.wait(timeout)
        self._reader.join(60)
        return code

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
    ) -> tuple[int, dict[str, str], Any]:
        """One request on a connection of its own: status, headers, decoded body."""
        port = self.admin_port if admin else self.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        is_json = "json" in answer.headers.get("Content-Type", "")
        return (
            answer.status,
            {k.lower(): v for k, v in answer.headers.items()},
            json.loads(raw) if is_json and raw else raw,
        )

    def post(self, body: bytes, path: str = "/v1/records", **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, answer = self.request("POST", path, body, named)
        return status, answer

    def status(self) -> dict[str, Any]:
        code, _, body = self.request("GET", "/v1/status", admin=True)
        assert code == 200, (code, body, self.events[-5:], self.other[-20:])
        return body

    def until_settled(self, pipeline: str = "default", timeout: float = 60) -> dict[str, Any]:
        """Waits until nothing is pending; the pipeline's status."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            now = self.status()["pipelines"][pipeline]
            if now["pending"] == 0 and now["accepted"]:
                return now
            time.sleep(0.02)
        raise AssertionError(f"still pending: {now}")


@contextlib.contextmanager
def daemon(*args: str, cwd: Path, **more: Any) -> Iterator[Daemon]:
    """A daemon that is ready."""
    with Daemon(*args, cwd=cwd, **more) as started:
        started.event("daemon_started")
        yield started


def written(folder: Path) -> list[bytes]:
    """All lines that the jsonl sink wrote."""
    return [
        line
        for path in sorted((folder / "ingestd-data" / "out").rglob("*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
