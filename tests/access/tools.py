"""Certificates that live for a test, curl as a client that is not ours, and tokens."""

from __future__ import annotations

import asyncio
import datetime
import inspect
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trustme
import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

SHOP = "shop-token-of-the-tests-0123456789"
LOGS = "logs-token-of-the-tests-9876543210"
NEXT = "next-token-of-the-tests-5555555555"
UTC = datetime.UTC

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on asyncio's loop and on the one that the daemon uses."""

    def run(loop_factory: Any, **fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(test(**fixtures))

    signature = inspect.signature(test)
    extra = inspect.Parameter("loop_factory", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[extra, *signature.parameters.values()])  # type: ignore[attr-defined]
    run.__name__, run.__module__ = test.__name__, test.__module__
    run.pytestmark = getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    return pytest.mark.parametrize("loop_factory", loops, ids=["asyncio", "uvloop"])(run)


class Files:
    """A certification authority, and what it issued, as PEM files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = self._write("ca.pem", self.authority.cert_pem)

    def _write(self, name: str, *blobs: trustme.Blob) -> str:
        (self.folder / name).write_bytes(b"".join(blob.bytes() for blob in blobs))
        return str(self.folder / name)

    def issue(self, name: str, *names: str, days: int = 30, **more: Any) -> str:
        """Key and certificate in one file."""
        until = datetime.datetime.now(UTC) + datetime.timedelta(days=days)
        since = until - datetime.timedelta(days=60)
        issued = self.authority.issue_cert(*names, not_before=since, not_after=until, **more)
        return self._write(f"{name}.pem", issued.private_key_pem, *issued.cert_chain_pems)

    def server(self, name: str = "server", **more: Any) -> str:
        return self.issue(name, "localhost", "127.0.0.1", **more)


class Curl(NamedTuple):
    code: int
    status: int
    body: Any
    headers: str
    error: str


def _arguments(url: str, arguments: tuple[str, ...]) -> list[str]:
    return ["curl", "-sS", "-m", "10", "-D", "-", "-o", "-", *arguments, url]


def _result(code: int, out: bytes, error: bytes) -> Curl:
    head, _, body = out.decode().rpartition("\r\n\r\n")
    status = int(head.rpartition("HTTP/1.1 ")[2][:3] or 0) if head else 0
    return Curl(code, status, json.loads(body) if body else None, head.lower(), error.decode())


def curl(url: str, *arguments: str) -> Curl:
    run = subprocess.run(_arguments(url, arguments), capture_output=True, timeout=60)
    return _result(run.returncode, run.stdout, run.stderr)


async def acurl(url: str, *arguments: str) -> Curl:
    process = await asyncio.create_subprocess_exec(
        *_arguments(url, arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, error = await process.communicate()
    return _result(process.returncode or 0, out, error)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
