"""A Debian that runs its own systemd, in namespaces of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.deploy.base import ROOT, debian_root, wheels

if TYPE_CHECKING:
    from collections.abc import Callable

TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "unshare")
ENVIRON = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    # Where the wheels are; nothing is fetched from inside.
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "/wheels",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Machine:
    """Booted while it is entered; a checkout of the project is at `/src`.

    Args:
        folder: where what it writes is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.root = folder / "root"
        self._mounted = False

    def __enter__(self) -> Self:
        self._lay_out(debian_root())
        self._log = (self._folder / "console").open("wb")
        command = ["systemd-nspawn", "--boot", "--quiet", "--register=no", "--keep-unit"]
        command += ["--private-network", "--console=pipe", f"--directory={self.root}"]
        command += [f"--bind-ro={ROOT}:/src", f"--bind-ro={wheels()}:/wheels"]
        unified = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "UNIFIED_CGROUP_HIERARCHY": "1"}
        self._nspawn = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**os.environ, **unified},
        )  # fmt: skip
        try:
            until(self._leads)
            until(self._is_up, 180)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _lay_out(self, base: Path) -> None:
        """The base with a layer of our own on it; as a copy where the kernel does not do that."""
        upper, work = self._folder / "upper", self._folder / "work"
        for folder in (upper, work, self.root):
            folder.mkdir()
        layers = f"lowerdir={base},upperdir={upper},workdir={work}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)]
        self._mounted = subprocess.run(mount, capture_output=True).returncode == 0
        if not self._mounted:
            subprocess.run(["cp", "-a", f"{base}/.", self.root], check=True)

    def _leads(self) -> bool:
        assert self._nspawn.poll() is None, (self._folder / "console").read_text()
        task = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        children = task.read_text().split()
        if not children:
            return False
        self._leader = children[0]
        return Path(f"/proc/{self._leader}/comm").read_text() == "systemd\n"

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def __exit__(self, *_: object) -> None:
        if self._nspawn.poll() is None:
            subprocess.run(["kill", "-KILL", getattr(self, "_leader", str(self._nspawn.pid))])
            try:
                self._nspawn.wait(60)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        self._log.close()
        if self._mounted:
            subprocess.run(["umount", self.root], check=True)

    def run(self, *command: str, cwd: str = "/") -> subprocess.CompletedProcess[str]:
        """A command inside."""
        enter = ["nsenter", f"--target={self._leader}", "--all", f"--wdns={cwd}"]
        return subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=300, env=ENVIRON,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def sh(self, script: str) -> str:
        """A script of a person in the checkout; what it says. It has to succeed."""
        done = self.run("sh", "-eu", "-c", script, cwd="/src")
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}\n{self.journal()}"
        return done.stdout.strip()

    def systemctl(self, *words: str) -> str:
        return self.sh(f"systemctl {' '.join(words)}")

    def show(self, name: str, unit: str = "ingestd.service") -> str:
        return self.sh(f"systemctl show --value -p {name} {unit}")

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-n", "40").stdout

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def client(self, *arguments: str) -> subprocess.Popen[str]:
        """`tests/deploy/client.py` of this machine, in the network of that one."""
        script = str(Path(__file__).with_name("client.py"))
        enter = ["nsenter", f"--target={self._leader}", "--net", sys.executable, script]
        return subprocess.Popen(
            [*enter, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def post(self, file: Path, *more: str) -> str:
        with self.client("file", str(file), *more) as client:
            return client.communicate(timeout=120)[0].strip()

    def written(self, folder: str = "ingestd") -> list[bytes]:
        """All lines that the jsonl sink wrote."""
        out = self.root / "var" / "lib" / "private" / folder / "out"
        files = sorted(out.rglob("*.jsonl"))
        return [line for path in files for line in path.read_bytes().splitlines()]


def clean(folder: Path) -> None:
    """What a machine wrote, without waiting for pytest to do it."""
    shutil.rmtree(folder, ignore_errors=True)
