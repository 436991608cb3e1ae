"""What features cost, on and off: `python -m benchmarks.features --rounds 5 [--before FOLDER]`.

The figure is the CPU time of the daemon and its worker for a record, which says more than a rate on
a machine that has other things to do. All variants get the same load in turn, another one first in
each round, and each is compared with `off` of the same round: everything at its default, nobody
watching. `--before` names a checkout of an earlier version, which runs as `before` with the same
flags as `off`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.load import send, wrk_fits
from benchmarks.peers.ours import Ingestd
from benchmarks.processes import ROOT, Failed, running
from benchmarks.records import write_bodies
from benchmarks.report import table
from benchmarks.results import Spread
from benchmarks.service import serving, wait_processed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.peers.base import Service

OFF, BEFORE = "off", "before"
SIZES = (1, 100, 1000)
"""Records of a body."""
WARM_UP_SECONDS = 1.0
AGE = 0.2
"""Seconds after which a batch goes as it is."""
TICKS = os.sysconf("SC_CLK_TCK")


class Variant(NamedTuple):
    """One way to run the daemon.

    Attributes:
        name: in the table.
        flags: of `ingestd run`, beside those of every variant.
        watchers: readers of the event stream of the console.
    """

    name: str
    flags: tuple[str, ...] = ()
    watchers: int = 0


VARIANTS = (
    Variant(OFF),
    Variant("batch.key", ("--batch.key", "/user")),
    Variant("dedupe.key", ("--dedupe.key", "/id", "--dedupe.window", "1s")),
    Variant("handler.validate", ("--handler.validate", "accept")),
    Variant("one console", watchers=1),
    Variant("50 consoles", watchers=50),
)


class Measured(NamedTuple):
    """One run.

    Attributes:
        cpu: microseconds of the daemon and its workers a record.
        rate: records a second that the client got a yes for.
    """

    cpu: float
    rate: float


def measure(
    variant: Variant, size: int, seconds: float, folder: Path, before: Path | None
) -> Measured:
    """Starts a daemon, loads it, ends it.

    Raises:
        Failed: this run does not count.
    """
    peer = Ingestd()
    peer.handler = "benchmarks.handler:typed"
    bodies = write_bodies(folder, size)
    own = folder / "daemon"
    own.mkdir()
    (folder / "load").mkdir()
    service = _with_flags(peer.service(own, AGE), variant, before)
    tool = "wrk" if wrk_fits(seconds) else "python"
    with serving(service) as children, _watching(service, variant.watchers, folder):
        send(tool, service, bodies, WARM_UP_SECONDS, folder / "load")
        wait_processed(peer, service, open_batch=False)
        started = _cpu(children[0].pid)
        load = send(tool, service, bodies, seconds, folder / "load")
        wait_processed(peer, service, open_batch=False)
        used = _cpu(children[0].pid) - started
    if load.refused or load.broken:
        raise Failed(f"{load.refused} answers were no 2xx, {load.broken} connections broke")
    return Measured(used / (load.answers * size) * 1e6, load.answers * size / load.seconds)


def _with_flags(service: Service, variant: Variant, before: Path | None) -> Service:
    (command,) = service.commands
    environment = dict(command.environment)
    if before is not None and variant.name == BEFORE:
        # Only the package is the earlier one: handler and load are the same for all.
        earlier = command.folder / "earlier"
        earlier.mkdir()
        (earlier / "ingestd").symlink_to(before.resolve() / "ingestd")
        environment["PYTHONPATH"] = os.pathsep.join((str(earlier), str(ROOT)))
    argv = [*command.argv, *variant.flags]
    return service._replace(commands=(command._replace(argv=argv, environment=environment),))


def _cpu(pid: int) -> float:
    """Seconds of a process and its children, those that live and those that have ended."""
    total = 0.0
    tasks = Path(f"/proc/{pid}/task")
    children = [one for task in tasks.iterdir() for one in (task / "children").read_text().split()]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    total += sum(map(int, fields[11:15])) / TICKS
    return total + sum(_cpu(int(child)) for child in children)


@contextlib.contextmanager
def _watching(service: Service, readers: int, folder: Path) -> Iterator[None]:
    """Readers of the event stream, in a process of their own."""
    if not readers:
        yield
        return
    own = folder / "watch"
    own.mkdir()
    port = str(service.status[0].port)
    command = [sys.executable, "-m", "benchmarks.features", "--watch", port, str(readers)]
    with running(command, own) as child:
        yield
        if child.poll() is not None:
            raise Failed(f"the readers have gone: {(own / 'stderr').read_text()[-200:]}")


def _watch(port: int, readers: int) -> None:
    """Reads the event stream until the process is ended."""

    def read() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/v1/watch")
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise SystemExit(f"{answer.status}: {answer.read(200)!r}")
        while answer.read1(1 << 16):
            pass

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def report(found: dict[tuple[int, str], list[Measured | None]], variants: Sequence[Variant]) -> str:
    """The table, in Markdown; pure."""
    rows = []
    for size in dict.fromkeys(size for size, _ in found):
        for variant in variants:
            runs = found[size, variant.name]
            pairs = [
                (run, off)
                for run, off in zip(runs, found[size, OFF], strict=True)
                if run is not None and off is not None
            ]
            if not pairs:
                rows.append([str(size), variant.name, "", "", ""])
                continue
            cpu = statistics.median(run.cpu for run, _ in pairs)
            costs = Spread.of([run.cpu / off.cpu for run, off in pairs])
            rates = Spread.of([run.rate / off.rate for run, off in pairs])
            rows.append([str(size), variant.name, f"{cpu:.2f}", costs.text(3), rates.text(3)])
    return table(["records a body", "variant", "CPU µs a record", "CPU ÷ off", "rate ÷ off"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code says whether every run counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load a run [3]")
    parser.add_argument(
        "--size", type=int, action="append", help="records of a body [1, 100, 1000]"
    )
    parser.add_argument("--only", action="append", default=[], help="a variant; again for more")
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    parser.add_argument("--directory", type=Path, default=ROOT / "build", help="[build/]")
    parser.add_argument("--watch", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.watch:
        _watch(*arguments.watch)
        return 0
    only = {*arguments.only, OFF}
    variants = [one for one in VARIANTS if not arguments.only or one.name in only]
    if arguments.before is not None:
        variants.insert(1, Variant(BEFORE))
    found: dict[tuple[int, str], list[Measured | None]] = {}
    failed = False
    arguments.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.directory))
    try:
        for number in range(arguments.rounds):
            start = number % len(variants)
            for size in arguments.size or SIZES:
                for variant in variants[start:] + variants[:start]:
                    own = Path(tempfile.mkdtemp(dir=folder))
                    run = None
                    try:
                        run = measure(variant, size, arguments.seconds, own, arguments.before)
                    except Failed as problem:
                        failed = True
                        print(f"- does not count: {variant.name}: {problem}", file=sys.stderr)
                    finally:
                        shutil.rmtree(own)
                    found.setdefault((size, variant.name), []).append(run)
                    if run is not None:
                        said = f"{run.cpu:.2f} µs a record, {run.rate:,.0f} records/s"
                        label = f"round {number + 1}/{arguments.rounds}  {size}  {variant.name}"
                        print(f"{label}  {said}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    print(report(found, variants))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
