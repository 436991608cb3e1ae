"""A peer that serves: started, ready, asked what it has done, and ended."""

from __future__ import annotations

import contextlib
import http.client
import time
from typing import TYPE_CHECKING

from benchmarks.loop import RECORDS_MAX
from benchmarks.peers.base import Counts
from benchmarks.processes import Failed, last_words, running

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from benchmarks.peers.base import Page, Peer, Service

START_SECONDS = 30.0
"""A peer takes records after this, or has failed."""
DRAIN_SECONDS = 180.0
"""A peer has processed what it accepted after this, or has failed."""
ASK_AGAIN_SECONDS = 0.02
ASK_READY_SECONDS = 0.005
"""Between two questions whether a peer is ready: what the time of a start is exact to."""


@contextlib.contextmanager
def serving(service: Service) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of a peer, once it takes records; ended when this is left.

    Raises:
        Failed: it does not take any.
    """
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                running(command.argv, command.folder, environment=command.environment)
            )
            for command in service.commands
        ]
        _wait_ready(service, children)
        yield children


def _wait_ready(service: Service, children: list[subprocess.Popen[bytes]]) -> None:
    waiting = list(service.ready)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for child, command in zip(children, service.commands, strict=True):
            if child.poll() is not None:
                raise Failed(f"did not start: {last_words(command.folder)}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            while waiting and get(waiting[0])[0] == http.HTTPStatus.OK:
                waiting.pop(0)
            if not waiting:
                return
        time.sleep(ASK_READY_SECONDS)
    said = "; ".join(last_words(command.folder) for command in service.commands)
    raise Failed(f"not ready after {START_SECONDS:.0f} s: {said}")


def wait_processed(peer: Peer, service: Service, *, open_batch: bool) -> Counts:
    """Asks until everything that was accepted was processed.

    Args:
        peer: who.
        service: where.
        open_batch: less than one batch of each process may be left: it is not full and waits to be
            old enough, at every peer, and that wait says nothing about speed.
    """
    left = (RECORDS_MAX - 1) * len(service.commands) if open_batch else 0
    deadline = time.monotonic() + DRAIN_SECONDS
    counts = Counts(0, 0)
    while time.monotonic() < deadline:
        try:
            pages = [peer.counts(get(page)[1]) for page in service.status]
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            said = "; ".join(last_words(command.folder) for command in service.commands)
            raise Failed(f"stopped answering: {error!r}; {said}") from error
        counts = Counts(*(sum(column) for column in zip(*pages, strict=True)))
        if counts.accepted - counts.processed - counts.dead <= left:
            return counts
        time.sleep(ASK_AGAIN_SECONDS)
    raise Failed(f"backlog not processed after {DRAIN_SECONDS:.0f} s: {counts}")


def get(page: Page) -> tuple[int, bytes]:
    """The status and the body of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60.0)
    with contextlib.closing(connection):
        connection.request("GET", page.path)
        response = connection.getresponse()
        return response.status, response.read()
