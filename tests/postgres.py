"""A real PostgreSQL for a test: a cluster of its own in a folder, on a socket in that folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.deploy.containers.engine import wait


class Postgres:
    """A cluster of its own that listens on a socket in its folder.

    Args:
        folder: others than its owner can read it.
        port: where it listens on 127.0.0.1, too; nowhere if not given.
        durable: it syncs what it commits.
        primary: it is a standby of this one, which runs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        durable: bool = False,
        primary: Postgres | None = None,
    ) -> None:
        self.folder = folder
        self.port = port
        self._durable = durable
        self._bin = _binaries()
        # It refuses to be root.
        self._user = pwd.getpwnam("postgres")
        os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        folder.chmod(0o755)  # who is in the container is neither
        self._process: subprocess.Popen[bytes] | None = None
        data = str(folder / "data")
        if primary is None:
            self._run("initdb", "-D", data, "-U", "ingestd", "-A", "trust", "-N")
        else:
            at = ("-h", str(primary.folder), *primary._at_port)
            self._run("pg_basebackup", *at, "-U", "ingestd", "-D", data, "-R", "-c", "fast")

    def _run(self, tool: str, *args: str) -> str:
        done = subprocess.run(
            [self._bin / tool, *args], cwd=self.folder, user=self._user.pw_uid,
            group=self._user.pw_gid, extra_groups=[], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def start(self) -> None:
        wait(self._started, what="PostgreSQL")

    def _started(self) -> bool:
        """Starts it if it does not run: after a SIGKILL its children may need a moment to go."""
        if self._process is None or self._process.poll() is not None:
            self._launch()
        ready = [self._bin / "pg_isready", "-q", "-h", self.folder, *self._at_port]
        return subprocess.run(ready).returncode == 0 and self._process.poll() is None

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", self.folder / "data", "-k", self.folder,
             *(["-h", "127.0.0.1", "-p", str(self.port)] if self.port else ["-h", ""]),
             *([] if self._durable else ["-F"])],
            cwd=self.folder, user=self._user.pw_uid, group=self._user.pw_gid, extra_groups=[],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def _at_port(self) -> list[str]:
        return ["-p", str(self.port)] if self.port else []

    def promote(self) -> None:
        """A standby takes writes from now on."""
        self._run("pg_ctl", "promote", "-w", "-D", str(self.folder / "data"))

    def kill(self) -> None:
        """SIGKILL of the postmaster; its children end by themselves."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(90)
            self._process = None

    def stop(self) -> None:
        """Connections are broken off, as in a restart of the server."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(90)
            self._process = None

    def sql(self, statement: str, database: str = "ingestd") -> str:
        return self._run(
            "psql", "-h", str(self.folder), *self._at_port, "-U", "ingestd", "-d", database,
            "-v", "ON_ERROR_STOP=1", "-Atc", statement,
        )  # fmt: skip

    def hold_commits(self) -> None:
        """From now on a commit is on disk and nobody is told: it waits for a standby."""
        self.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        self.sql("SELECT pg_reload_conf()")

    def held(self) -> int:
        """How many commits wait like that."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        return int(self.sql(waiting))

    def release_commits(self) -> None:
        """They go on, and those to come do not wait."""
        self.sql("ALTER SYSTEM RESET synchronous_standby_names")
        self.sql("SELECT pg_reload_conf()")


def _binaries() -> Path:
    on_path = shutil.which("postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not on_path and not found:
        pytest.skip("needs postgresql")
    return Path(on_path or found[-1]).resolve().parent
