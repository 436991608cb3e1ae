"""Podman with a store of its own, so that nothing of the machine's is read, named or changed.

The official Python image can't be had everywhere, so a Debian of the same release stands in for it,
under its name, in this store alone: the Dockerfile is built as it is shipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shlex
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.deploy.base import ROOT, cache, debian_root, missing, wheels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BASE = "docker.io/library/python:3.13-slim-trixie"
IMAGE = "localhost/ingestd:0.1.0"
RUN = f"ingestd-{uuid.uuid4().hex[:8]}"
"""What the names of everything begin with that this run starts."""

# runc, and limits below what a container that is itself in one may have.
_CONF = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
events_logger = "file"
cgroup_manager = "cgroupfs"
"""


def unable() -> str:
    """Why no container can be run here; empty if one can."""
    return missing("podman", "buildah", "runc", "debootstrap", "catatonit", "iptables")


class Engine:
    """Calls podman. Everything it starts has a name that begins with `RUN`."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._lock = (store / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # names of images are the store's, not a run's
        (store / "containers.conf").write_text(_CONF)

    def command(self, *args: str) -> list[str]:
        runroot = self.store / "run"
        return ["podman", "--root", str(self.store / "images"), "--runroot", str(runroot), *args]

    def environ(self) -> dict[str, str]:
        """What podman needs; nothing else of this process's."""
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.store),
            "CONTAINERS_CONF": str(self.store / "containers.conf"),
            "DISABLE_HC_SYSTEMD": "true",
        }
        # A proxy that the machine needs is needed while an image is built as well.
        environ |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
        return environ

    def start(self, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            self.command(*args), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", env=self.environ(),
            timeout=300, **more,
        )  # fmt: skip

    def __call__(self, *args: str) -> str:
        """What it printed.

        Raises:
            AssertionError: it failed.
        """
        done = self.start(*args)
        assert done.returncode == 0, f"podman {' '.join(args)}\n{done.stdout[-6000:]}"
        return done.stdout.strip()

    def build(self, folder: Path, tag: str, *more: str) -> None:
        """An image from a folder with a Dockerfile; what pip installs comes from the wheels."""
        self(
            "build", "--quiet", "--format", "docker", "--pull=never", "--network", "host",
            *self._pip(), "--tag", tag, *more, str(folder),
        )  # fmt: skip

    def shim(self, folder: Path) -> Path:
        """A folder with a `docker` and a `podman` that are this one, for scripts and tools."""
        pip = ["--network", "host", "--pull=never", "--format", "docker", *self._pip()]
        script = [
            "#!/bin/sh",
            *(f"export {name}={shlex.quote(value)}" for name, value in self.environ().items()
              if name != "PATH"),
            # `docker build` has no such default, and the wheels are here.
            f'[ "$1" = build ] && shift && set -- build {shlex.join(pip)} "$@"',
            f'exec {shlex.join([tool("podman"), *self.command()[1:]])} "$@"',
        ]  # fmt: skip
        folder.mkdir(exist_ok=True)
        for name in ("docker", "podman"):
            (folder / name).write_text("\n".join(script) + "\n")
            (folder / name).chmod(0o755)
        return folder

    def _pip(self) -> list[str]:
        """What `build` is told so that pip installs from the wheels, and asks nobody."""
        pip = self.store / "pip.conf"
        pip.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        wheels = f"{_all_wheels()}:/wheels:ro"
        return ["--volume", wheels, "--volume", f"{pip}:/etc/pip.conf:ro"]

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", name))[0]
        return found

    def close(self) -> None:
        """Ends what this run started and nothing else; images stay for the next one."""
        mine = ["--filter", f"name=^{RUN}"]
        for pod in self("pod", "ps", "-q", *mine).split():
            self.start("pod", "rm", "--force", "--time", "0", pod)
        for container in self("ps", "-aq", *mine).split():
            self.start("rm", "--force", "--volumes", "--time", "0", container)
        for volume in self("volume", "ls", "-q").split():
            if volume.startswith(RUN):
                self.start("volume", "rm", "--force", volume)
        # Layers of earlier builds that nothing has as its own any more.
        self.start("image", "prune", "--force", "--filter", "until=24h")
        self._lock.close()


def _all_wheels() -> Path:
    return wheels(
        ROOT / "requirements" / "run.txt",
        ROOT / "requirements" / "build.txt",
        ROOT / "deploy" / "docker" / "postgres" / "requirements.txt",
    )


@functools.cache
def built() -> Engine:
    """With the image in it; made once a run, closed by the session's end."""
    store = cache() / "containers"
    store.mkdir(exist_ok=True)
    engine = Engine(store)
    _make_base(engine)
    engine.build(ROOT, IMAGE)
    return engine


def _make_base(engine: Engine) -> None:
    root = debian_root()
    # By what it is made from: another root is another base.
    made_from = f"localhost/{root.name}"
    if engine.start("image", "exists", made_from).returncode:
        archive = engine.store / "root.tar"
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
        engine("import", str(archive), made_from)
        archive.unlink()
    folder = engine.store / "base"
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text(
        f"FROM {made_from}\n"
        "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        "RUN ln -sf python3 /usr/bin/python\n"
    )
    engine("build", "--quiet", "--pull=never", "--tag", BASE, str(folder))


def wait(condition: Callable[[], Any], seconds: float = 90, what: str = "") -> Any:
    """What `condition` comes to once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except OSError:
            found = None
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds} s: {what or condition}")
        time.sleep(0.05)


def tool(name: str) -> str:
    """The path of a tool that checks what is shipped, or nothing."""
    folder = os.environ.get("TEST_DEPLOY_TOOLS", "")
    return shutil.which(name, path=os.pathsep.join([folder, os.environ["PATH"]])) or ""


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A tool, to its end."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", timeout=120, **more,
    )  # fmt: skip


@contextlib.contextmanager
def volume(engine: Engine, name: str) -> Iterator[Path]:
    """A new volume, and where it lies on this machine."""
    full = f"{RUN}-{name}"
    engine("volume", "create", full)
    try:
        yield Path(engine("volume", "inspect", "--format", "{{.Mountpoint}}", full))
    finally:
        engine("volume", "rm", "--force", full)


def written(folder: Path) -> Sequence[bytes]:
    """All lines that the jsonl sink wrote below a data directory."""
    return [
        line
        for path in sorted((folder / "out").rglob("*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
