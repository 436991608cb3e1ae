"""Disks that lose at a power failure what was not synced, and networks that are cut."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
_CLONE_NEWNET = 0x40000000


class Disk:
    """An ext4 of its own in a file.

    `fail` shuts the file system down as it is on its disk: what is in the page cache, and what its
    journal has not committed, never gets there. So a write that was synced stays, another one is
    lost unless the kernel had already written it.
    """

    def __init__(self, where: Path, size: str = "256M") -> None:
        self.where = where
        self._image = where.with_name(f"{where.name}.image")
        where.mkdir(parents=True)
        subprocess.run(["truncate", "-s", size, self._image], check=True)
        subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
        self._mount()

    def _mount(self) -> None:
        done = subprocess.run(
            ["mount", "-o", "loop", self._image, self.where], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mount does not work here: {done.stderr.strip()}")

    def fail(self) -> None:
        """The power fails; nothing more is written."""
        folder = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def back(self) -> None:
        """Mounts it as it was on the disk; nothing has a file of it open."""
        self.close()
        # To the kernel the same file may be the file system that is shut down.
        again = self._image.with_name(f"{self._image.name}.again")
        subprocess.run(["cp", "--sparse=always", self._image, again], check=True)
        shutil.move(again, self._image)
        self._mount()

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.where], check=False)


@contextlib.contextmanager
def disks(*places: Path) -> Iterator[list[Disk]]:
    """Disks in these places."""
    with contextlib.ExitStack() as stack:
        found = []
        for place in places:
            found.append(Disk(place))
            stack.callback(found[-1].close)
        yield found


class Network:
    """Hosts in network namespaces of their own, on one bridge; each can be cut off from it.

    Attributes:
        addresses: by host.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._tag = f"test{os.getpid()}"
        self._hub = f"{self._tag}-hub"
        self.addresses = {host: f"10.77.0.{n}" for n, host in enumerate(hosts, 1)}
        self._ports = {host: f"port{n}" for n, host in enumerate(hosts, 1)}

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._hub)
            _ip("-n", self._hub, "link", "add", "name", "bridge", "type", "bridge")
            _ip("-n", self._hub, "link", "add", "name", "other", "type", "bridge")
            for bridge in ("bridge", "other"):
                _ip("-n", self._hub, "link", "set", bridge, "up")
            for host, port in self._ports.items():
                own = self._namespace(host)
                _ip("netns", "add", own)
                _ip("-n", self._hub, "link", "add", "name", port, "type", "veth",
                    "peer", "name", "uplink", "netns", own)  # fmt: skip
                _ip("-n", self._hub, "link", "set", port, "master", "bridge", "up")
                _ip("-n", own, "addr", "add", f"{self.addresses[host]}/24", "dev", "uplink")
                for device in ("lo", "uplink"):
                    _ip("-n", own, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*map(self._namespace, self._ports), self._hub):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _namespace(self, host: str) -> str:
        return f"{self._tag}-{host}"

    def command(self, host: str) -> tuple[str, ...]:
        """A prefix that runs a command on a host, as the process that is started."""
        return ("nsenter", f"--net=/run/netns/{self._namespace(host)}")

    def cut(self, host: str) -> None:
        """From now on its packets vanish, in both directions."""
        _ip("-n", self._hub, "link", "set", self._ports[host], "nomaster")

    def split(self, *hosts: str) -> None:
        """From now on these reach each other alone."""
        for host in hosts:
            _ip("-n", self._hub, "link", "set", self._ports[host], "master", "other")

    def part(self, host: str, *others: str) -> None:
        """From now on it reaches these no more, and all else as before."""
        for other in others:
            own = self._namespace(host)
            _ip("-n", own, "route", "add", "blackhole", f"{self.addresses[other]}/32")

    def heal(self, host: str) -> None:
        """Puts a host that was cut off, or split off, back to the others."""
        _ip("-n", self._hub, "link", "set", self._ports[host], "master", "bridge")

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Connections that this thread makes in the block are made on a host."""
        with (
            Path("/proc/thread-self/ns/net").open("rb") as before,
            Path(f"/run/netns/{self._namespace(host)}").open("rb") as own,
        ):
            _enter(own.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
