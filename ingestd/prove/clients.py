"""Clients that post numbered records and record the outcome of each request.

With several daemons each request has an `Idempotency-Key`, and one that gets no answer is sent
again, as it is, to the next daemon, until its outcome is known.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import TYPE_CHECKING

from ingestd.base.errors import IngestdError
from ingestd.prove.plan import Body, ProofBounds, body_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.prove.progress import ProofProgress

_ANSWER_SECONDS = 60.0
_AGAIN_SECONDS = 0.05
_SETTLED_SECONDS = 5.0
"""A client that is stopped tries for so long to learn what became of its last request."""
_KEY_IN_FLIGHT = "idempotency-key-in-flight"
# Problem types of requests of which nothing was accepted.
_NOT_TAKEN = {"overloaded", "busy", "too-many-connections", "draining"}


class ProofTarget:
    """The port on which the daemon listens at the moment, if it does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._port: int | None = None

    def open(self, port: int | None) -> None:
        """Sets the port; `None` while the daemon is down."""
        with self._changed:
            self._port = port
            self._changed.notify_all()

    def wait(self, seconds: float) -> int | None:
        """The port, as soon as there is one; `None` if there was none for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._port is not None, seconds)
            return self._port


class ProofClient:
    """One client, a thread.

    Args:
        number: from 0.
        seed: of the run.
        bounds: of its requests.
        targets: the ports of daemons, its own first.
        progress: where it records their outcomes.
        stop: it ends after the request that it is at.
    """

    def __init__(
        self,
        number: int,
        *,
        seed: int,
        bounds: ProofBounds,
        targets: Sequence[ProofTarget],
        progress: ProofProgress,
        stop: threading.Event,
    ) -> None:
        self.problem = ""
        self._number = number
        self._seed = seed
        self._bounds = bounds
        self._targets = targets
        self._tries = 0
        self._progress = progress
        self._stop = stop
        self._connection: http.client.HTTPConnection | None = None
        self._port: int | None = None
        self._thread = threading.Thread(target=self._run, name=f"client-{number}", daemon=True)

    def start(self) -> None:
        """Begins to send."""
        self._thread.start()

    def join(self) -> None:
        """Waits for its end; `stop` is set."""
        if self._thread.ident is not None:  # it may never have begun: the servers did not start
            self._thread.join(_ANSWER_SECONDS + _SETTLED_SECONDS + 5.0)

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not self.problem:
                first = self._progress.numbers(self._number, self._bounds.records)
                body = body_at(self._seed, self._number, first, self._bounds)
                self._stop.wait(body.pause)
                self._deliver(body, f'"{self._number}-{first}"')
        except OSError as error:  # the progress can't be written
            self.problem = str(error)
        finally:
            self._disconnect()

    def _deliver(self, body: Body, key: str) -> None:
        """Sends a body until its outcome is known, or never will be."""
        headers = {"Idempotency-Key": key} if len(self._targets) > 1 else {}
        self._tries = 0
        until = float("inf")
        while not self._stop.is_set() or (self._tries and time.monotonic() < until):
            if self._stop.is_set():
                until = min(until, time.monotonic() + _SETTLED_SECONDS)
            connection = self._connected()
            if connection is None:
                self._tries += bool(self._tries)  # the next daemon may know
                time.sleep(_AGAIN_SECONDS)
                continue
            try:
                connection.request("POST", "/v1/records", body.data, headers)
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException):
                self._disconnect()
                if self._is_unknown(body):
                    return
                continue
            if self._judge(answer, content, body):
                return
            time.sleep(_AGAIN_SECONDS)
        if self._tries:
            self._progress.unknown(self._number, body.count)

    def _judge(self, answer: http.client.HTTPResponse, content: bytes, body: Body) -> bool:
        """Records the outcome of a request; returns False if it has to be sent again."""
        told = _decoded(content)
        kind = str(told.get("type", "")).rpartition(":")[2]
        if answer.status == 202 and told.get("accepted") == body.count:
            self._progress.accepted(self._number, body.count)
            if self._tries:
                self._progress.learned(answer.headers.get("Idempotent-Replayed") == "true")
        elif answer.status == 429 or kind in _NOT_TAKEN or kind == _KEY_IN_FLIGHT:
            return False
        elif 400 <= answer.status < 500 or answer.status == 202:
            self.problem = f"the daemon answered {answer.status}: {told.get('detail', told)}"
        else:
            return self._is_unknown(body)
        return True

    def _is_unknown(self, body: Body) -> bool:
        """Records that a request got no answer; returns False if another daemon may know it."""
        if len(self._targets) > 1:
            self._tries += 1
            return False
        # It may have been accepted: to send it again could double it.
        self._progress.unknown(self._number, body.count)
        return True

    def _connected(self) -> http.client.HTTPConnection | None:
        """A connection to the daemon of now. A failure to connect has sent nothing."""
        port = self._targets[self._tries % len(self._targets)].wait(_AGAIN_SECONDS)
        if port != self._port:
            self._disconnect()
        if port is None:
            return None
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", port, _ANSWER_SECONDS)
            self._port = port
        try:
            if self._connection.sock is None:
                self._connection.connect()
        except OSError:
            self._disconnect()
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection, self._port = self._connection, None, None
        if connection is not None:
            connection.close()


def _decoded(content: bytes) -> dict[str, object]:
    try:
        told = json.loads(content)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


class ClientFailed(IngestdError):  # noqa: N818  reads as what happened
    """A client can't go on."""

    message = "a client can't go on: {problem}"


class ProofClients:
    """All clients of a run.

    Args:
        progress: of the run; it says how many there are.
        bounds: of their requests.
        targets: daemons, in turn.

    Attributes:
        stopping: each ends after the request that it is at.
    """

    def __init__(
        self, progress: ProofProgress, bounds: ProofBounds, targets: Sequence[ProofTarget]
    ) -> None:
        self.stopping = threading.Event()
        self._progress = progress
        self._clients = [
            ProofClient(
                number,
                seed=progress.state.seed,
                bounds=bounds,
                targets=[*targets[number % len(targets) :], *targets[: number % len(targets)]],
                progress=progress,
                stop=self.stopping,
            )
            for number in range(len(progress.state.sent))
        ]

    def start(self) -> None:
        """Begins to send."""
        for client in self._clients:
            client.start()

    def check(self) -> None:
        """Checks that all can go on.

        Raises:
            ClientFailed: one can't.
        """
        for client in self._clients:
            if client.problem:
                raise ClientFailed(problem=client.problem)

    def stop(self) -> None:
        """Stops them; each waits for the answer to its request."""
        self.stopping.set()
        for client in self._clients:
            client.join()
        self._progress.save(idle=True)
