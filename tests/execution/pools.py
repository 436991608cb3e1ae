"""Factories of executors, and handlers that run in them, by name from wherever they are called."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ingestd

WORKERS = 2


def processes() -> Executor:
    return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"))


def threads() -> Executor:
    return ThreadPoolExecutor(WORKERS)


def raises() -> Executor:
    raise ConnectionError("the cluster is down")


def none_at_all() -> object:
    return "pool"


not_callable = "a string"


def dask() -> Executor:
    """A cluster on this machine, which goes with its executor."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    client = Client(cluster)
    executor = client.get_executor(pure=False)
    shut_down = executor.shutdown

    def shutdown(*args: Any, **more: Any) -> None:
        shut_down(*args, **more)
        client.close()
        cluster.close()

    executor.shutdown = shutdown
    return executor  # type: ignore[no-any-return]


class Forgets(Executor):
    """Cancels each call, as a cluster does that has lost its worker; the second one of it works."""

    made = 0

    def __init__(self) -> None:
        Forgets.made += 1
        self.inner = ThreadPoolExecutor(1)
        self.is_good = Forgets.made > 1

    def submit(self, function: Any, /, *args: Any, **more: Any) -> Future[Any]:
        if self.is_good:
            return self.inner.submit(function, *args, **more)
        lost: Future[Any] = Future()
        lost.cancel()
        lost.set_running_or_notify_cancel()
        return lost

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.inner.shutdown(wait, cancel_futures=cancel_futures)


_built: list[object] = []


def gone_for_a_while() -> object:
    """Gives an executor that loses its calls, then none, then one that works."""
    lost, good = Forgets(), Forgets()
    lost.is_good, good.is_good = False, True
    _built.append([lost, None, good][len(_built)])
    return _built[-1]


def forgets() -> Executor:
    return Forgets()


class Writes:
    """Notes each call in `calls.ndjson`; does what the first record of a batch says."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.thread = threading.get_ident()

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        note = {"id": batch.id, "attempt": batch.attempt, "records": list(batch)}
        note |= {"pid": os.getpid(), "made_here": self.thread == threading.get_ident()}
        with (self.folder / "calls.ndjson").open("a") as calls:
            calls.write(json.dumps(note) + "\n")
        match batch[0] if batch.attempt == 1 else None:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "raise":
                raise ValueError("so it was asked")
            case "reject":
                batch.reject(0, "not this one")
            case "wait":
                deadline = time.monotonic() + 120
                while not (self.folder / "open").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)

    def close(self) -> None:
        with (self.folder / "closed").open("a") as closed:
            closed.write(f"{os.getpid()} {self.thread == threading.get_ident()}\n")


def calls(folder: Path) -> list[dict[str, Any]]:
    path = folder / "calls.ndjson"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def awaited(batch: list[Any]) -> None:
    pass
