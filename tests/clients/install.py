"""Installs the clients of the slow tests: `python -m tests.clients.install`.

They get an environment of their own, because their dependencies are not the daemon's. It is kept in
`$TEST_CLIENTS_CACHE`, else in the folder for temporary files, and made anew when a pin changes.
rsyslog and syslog-ng are Debian's packages, which can't be installed beside each other: they are
unpacked there. Tests of a client that is not there are skipped with the reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON_PINS = HERE.parents[1] / "requirements" / "clients.txt"
DEBIAN_PINS = HERE / "debian.txt"
NPM_PINS = (HERE / "package.json", HERE / "package-lock.json")


def folder(*pins: Path) -> Path:
    """Where the clients with these pins are."""
    default = Path(tempfile.gettempdir()) / f"ingestd-clients-{os.getuid()}"
    cache = Path(os.environ.get("TEST_CLIENTS_CACHE", default))
    digest = hashlib.sha256(sys.version.encode())
    for pin in pins:
        digest.update(pin.read_bytes())
    return cache / f"{pins[0].stem}-{digest.hexdigest()[:16]}"


def install_python(target: Path) -> None:
    venv.create(target, with_pip=True)
    pip = target / "bin" / "pip"
    subprocess.run([pip, "install", "-q", "--require-hashes", "-r", PYTHON_PINS], check=True)


def install_npm(target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    for pin in NPM_PINS:
        shutil.copy(pin, target)
    command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
    subprocess.run(command, cwd=target, check=True)


def install_debian(target: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    if os.getuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
    packages = DEBIAN_PINS.read_text().split()
    subprocess.run(["apt-get", "download", "-qq", *packages], cwd=target, check=True)
    for package in target.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, target], check=True)
        package.unlink()
    (target / "bin").mkdir()
    rsyslog = next(target.glob("usr/lib/*/rsyslog"))
    machine = rsyslog.parent.name
    libraries = f"{rsyslog.parent}:{target}/lib/{machine}:{target}/usr/lib/syslog-ng"
    modules = next(target.glob("usr/lib/syslog-ng/*/libaffile.so")).parent
    for name, flags in (("rsyslogd", f"-M{rsyslog}"), ("syslog-ng", f"--module-path={modules}")):
        program = target / "bin" / name
        program.write_text(
            f"#!/bin/sh\nexport LD_LIBRARY_PATH={libraries}\n"
            f'exec {target}/usr/sbin/{name} {flags} "$@"\n'
        )
        program.chmod(0o755)


def main() -> int:
    failed = 0
    for pins, install in (
        ((PYTHON_PINS,), install_python),
        (NPM_PINS, install_npm),
        ((DEBIAN_PINS,), install_debian),
    ):
        target = folder(*pins)
        if (target / "complete").exists():
            continue
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(mode=0o700, parents=True)
        try:
            install(target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{pins[0].name}: not installed: {error}", file=sys.stderr)
            failed = 1
        else:
            (target / "complete").touch()
    return failed


if __name__ == "__main__":
    sys.exit(main())
