"""The records endpoint with the project's own client; real processes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

import ingestd
from tests.clients.harness import PROGRAMS, Client, Receiver, check, report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_the_python_client(tmp_path: Path) -> None:
    program = str(PROGRAMS / "ingestd_client.py")
    client = Client("ingestd.client", ingestd.__version__, (sys.executable, program))
    with Receiver(tmp_path) as receiver:
        check([record["n"] for record in receiver.deliver(client)], once=True)
    report("records", client, "1,000 records in bodies of 20, gzip; exactly once")
