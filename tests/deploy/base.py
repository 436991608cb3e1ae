"""A Debian to deploy into, and the wheels of the project for it; made once and kept.

Both are kept in `$TEST_DEPLOY_CACHE`, or else in a folder of the system's for temporary files,
so that what they cost (a minute, and 100 MB from a Debian mirror) is paid once a machine. Whoever
uses them reads only: put an overlay on the root, or copy it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
SUITE = "trixie"
PYTHON = "3.13"
"""The version of Python that the suite has."""
PACKAGES = "systemd,dbus,python3,python3-venv,ca-certificates"
MIRROR = "http://deb.debian.org/debian"


def missing(*tools: str) -> str:
    """Why nothing can be deployed here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    lost = [tool for tool in tools if shutil.which(tool) is None]
    if lost:
        return f"needs {', '.join(lost)}"
    # Root of a container may be root in name only.
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "needs the right to make namespaces"


def cache() -> Path:
    """Where things are kept; nobody else can write there."""
    default = Path(tempfile.gettempdir()) / f"ingestd-deploy-{os.geteuid()}"
    folder = Path(os.environ.get("TEST_DEPLOY_CACHE") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if folder.is_symlink() or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise PermissionError(f"{folder} is somebody else's")
    return folder


def debian_root() -> Path:
    """A minimal Debian with systemd, dbus, Python and certificates; needs root and debootstrap."""
    return _kept(f"{SUITE}-1", _debootstrap)


def wheels(*lists: Path) -> Path:
    """All that some lists name (`requirements/run.txt` and `build.txt`), for the root's Python."""
    lists = lists or tuple(ROOT / "requirements" / name for name in ("run.txt", "build.txt"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest()[:16]

    def download(into: Path) -> None:
        for path in lists:
            _download(path, into)

    return _kept(f"wheels-{PYTHON}-{digest}", download)


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """What `make` made in an earlier run or makes now; half of it is never seen."""
    done = cache() / name
    with _locked(done.with_name(f"{name}.lock")):
        if not done.exists():
            partial = done.with_name(f"{name}.partial")
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(mode=0o755)
            make(partial)
            partial.rename(done)
    return done


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _debootstrap(into: Path) -> None:
    _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(into), MIRROR)
    # One of its own would be asked for at the first boot, and one for all would be no machine's.
    (into / "etc" / "machine-id").write_text("")
    for archive in (into / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        archive.unlink()


def _download(requirements: Path, into: Path) -> None:
    machine = platform.machine()
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in (17, 28, 34, 39)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--require-hashes"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--dest", str(into)]
    for tag in (*platforms, f"manylinux2014_{machine}"):
        command += ["--platform", tag]
    _run(*command, "-r", str(requirements))


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-4000:]}")
