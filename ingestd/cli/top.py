"""`ingestd top` shows the numbers of a running daemon, again each second.

On a terminal it is a page that is drawn anew, with keys; anywhere else a line a second for each
pipeline. Rates are differences of two looks. Cursor and screen are put back however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.clock import shown
from ingestd.base.errors import DaemonError, Exit
from ingestd.cli.healthcheck import AdminClient, add_admin_client
from ingestd.cli.lines import one_line, write_lines
from ingestd.cli.output import add_json
from ingestd.config.units import parse_seconds, show_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DESCRIPTION = """\
Shows what the daemon at admin.listen does: records a second in and out, what is pending and for how
long, dead letters, workers, and bounds that are near. On a terminal: q quits, / filters by name,
and n i o d p a sort by name, records in, out, dead, pending, age. Without a terminal it prints a
line a second for each pipeline.

exit codes: 0 done; 1 no answer, or refused; 2 usage; 78 configuration"""

KEYS = {"n": "name", "i": "in", "o": "out", "d": "dead", "p": "pending", "a": "age"}
"""Keys of a terminal, and what each sorts by."""
_ROW = "{:<16} {:<8} {:>9} {:>9} {:>8} {:>10} {:>8} {:>8} {:>7} {:>9}  {}"
_HEAD = _ROW.format(
    "PIPELINE", "STATE", "IN/s", "OUT/s", "DEAD/s", "PENDING", "AGE", "LETTERS", "WORKERS",
    "JOURNAL", "NEAR",
)  # fmt: skip
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST = "\x1b[H", "\x1b[J"
_END = "\x1b[K\r\n"


class Row(NamedTuple):
    """The numbers of a pipeline at one look.

    Attributes:
        name: of the pipeline.
        state: `up`, `down`, `blocked`, `paused` or `stopped`.
        into: records accepted a second, since the look before; 0 at the first one.
        out: records processed a second.
        dead: records given up a second.
        pending: records.
        age: of the oldest one of them, seconds.
        letters: dead letters that are kept.
        workers: busy ones.
        bytes: of the journal.
        near: settings whose bound is near.
    """

    name: str
    state: str
    into: float
    out: float
    dead: float
    pending: int
    age: float
    letters: int
    workers: int
    bytes: int
    near: list[str]

    def line(self) -> str:
        """One line of the table."""
        return _ROW.format(
            one_line(self.name, 16), self.state, _rate(self.into), _rate(self.out),
            _rate(self.dead), self.pending, f"{self.age:.1f}s", self.letters, self.workers,
            show_size(self.bytes), " ".join(self.near),
        ).rstrip()  # fmt: skip


class Look(NamedTuple):
    """The status of a daemon at one moment.

    Attributes:
        at: seconds since the epoch.
        clock: the same, from a clock that never goes back.
        status: the body of `/v1/status`.
    """

    at: float
    clock: float
    status: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the flags."""
    parser.set_defaults(leaf=parser)
    parser.add_argument("--once", action="store_true", help="print one table and leave")
    parser.add_argument(
        "--sort", choices=tuple(KEYS.values()), default="name", help="order of the pipelines [name]"
    )
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only pipelines with this in their name"
    )
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="TIME", help="between two looks [1s]"
    )
    add_json(parser, "print one JSON object for each look")
    add_admin_client(parser)


def _interval(written: str) -> float:
    try:
        seconds = parse_seconds(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("should be from 100ms to 1h")
    return seconds


def execute(arguments: argparse.Namespace) -> int:
    """Shows the numbers until it is told to leave; returns the exit code.

    Raises:
        IngestdError: there is no answer, or it was refused; the message is one line.
    """
    client = AdminClient(arguments)
    is_page = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    is_page = is_page and os.environ.get("TERM") != "dumb"
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # screen and cursor are put back
    try:
        if is_page and not (arguments.once or arguments.json):
            _Screen(client, arguments).run()
        else:
            _print(client, arguments)
    except KeyboardInterrupt:
        pass
    return int(Exit.OK)


def _look(client: AdminClient) -> Look:
    try:
        status = json.loads(client.get("/v1/status").read())
        look = Look(time.time(), time.monotonic(), status)
        _facts(look), _title(look), rows(look, None)
    except (OSError, ValueError) as error:
        raise DaemonError(problem=f"no answer from {client.listen}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"the answer from {client.listen} is no status of a daemon"
        raise DaemonError(problem=problem) from error
    return look


def rows(now: Look, before: Look | None, *, sort: str = "name", only: str = "") -> list[Row]:
    """The row of each pipeline, in order.

    Args:
        now: this look.
        before: the one before; `None` for the first.
        sort: a value of `KEYS`; numbers fall, names rise.
        only: a part of the names that are shown.
    """
    found = []
    for name, one in now.status["pipelines"].items():
        if only.lower() not in name.lower():
            continue
        earlier, seconds = one, 1.0
        if before is not None and name in before.status["pipelines"]:
            earlier, seconds = (
                before.status["pipelines"][name],
                max(0.001, now.clock - before.clock),
            )
        into, out, dead = (
            max(0.0, (one[number] - earlier[number]) / seconds)
            for number in ("accepted", "processed", "dead")
        )
        found.append(
            Row(
                name, _state(one), into, out, dead, one["pending"], one["oldest_pending_seconds"],
                one["dead_letters"]["kept"], one["batches"]["running"], one["journal"]["bytes"],
                one["bounds_near"],
            )
        )  # fmt: skip
    found.sort(key=lambda row: row.name)
    if sort != "name":
        field = {"in": "into"}.get(sort, sort)
        found.sort(key=lambda row: -getattr(row, field))
    return found


def _state(one: dict[str, Any]) -> str:
    if one.get("paused"):  # which stops it, too
        return "paused"
    if one["dispatch_stopped"]:
        return "stopped"
    return str(one["handler"]["state"])


def _rate(number: float) -> str:
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _title(now: Look) -> str:
    status = now.status
    uptime = time.strftime("%H:%M:%S", time.gmtime(status["uptime_seconds"]))
    days = int(status["uptime_seconds"] // 86400)
    up = f"{days}d {uptime}" if days else uptime
    return f"ingestd {status['version']}  {status['state']}  up {up}  {shown(now.at)}"


# -- without a terminal ----------------------------------------------------------------------------


def _print(client: AdminClient, arguments: argparse.Namespace) -> None:
    """Prints looks, one after the other; with `--once` one, whose rates are of one interval."""
    before = _look(client)
    while True:
        time.sleep(arguments.interval)
        now = _look(client)
        found = rows(now, before, sort=arguments.sort, only=arguments.filter)
        if arguments.json:
            facts = {**_facts(now), "pipelines": [row._asdict() for row in found]}
            lines = [json.dumps(facts)]
        elif arguments.once:
            lines = [_title(now), _HEAD, *(row.line() for row in found)]
        else:
            lines = [f"{shown(now.at)} {_words(row)}" for row in found]
        is_read = write_lines(f"{line}\n".encode() for line in lines) == len(lines)
        if arguments.once or not is_read:
            return
        before = now


def _facts(now: Look) -> dict[str, Any]:
    names = ("state", "version", "uptime_seconds")
    return {"at": shown(now.at), **{name: now.status[name] for name in names}}


def _words(row: Row) -> str:
    """The numbers of a pipeline, each with its name."""
    words = {
        "in": f"{_rate(row.into)}/s", "out": f"{_rate(row.out)}/s", "dead": f"{_rate(row.dead)}/s",
        "pending": row.pending, "age": f"{row.age:.1f}s", "letters": row.letters,
        "workers": row.workers, "journal": show_size(row.bytes), "near": ",".join(row.near) or "-",
    }  # fmt: skip
    return f"{row.name} {row.state} " + " ".join(f"{key}={value}" for key, value in words.items())


# -- on a terminal ---------------------------------------------------------------------------------


class _Screen:
    """The page on a terminal.

    Args:
        client: of the daemon.
        arguments: of the command.
    """

    def __init__(self, client: AdminClient, arguments: argparse.Namespace) -> None:
        self._client = client
        self._sort, self._filter = arguments.sort, arguments.filter
        self._interval = arguments.interval
        self._typed: str | None = None  # a filter that is being typed
        self._before: Look | None = None
        self._now: Look | None = None
        self._problem = ""

    def run(self) -> None:
        """Shows the page until it is left."""
        with _raw_terminal():
            due = 0.0
            while True:
                if time.monotonic() >= due:
                    self._look()
                    due = time.monotonic() + self._interval
                self._draw()
                ready, _, _ = select.select([sys.stdin], [], [], max(0, due - time.monotonic()))
                if ready and not self._typed_in(os.read(sys.stdin.fileno(), 256)):
                    return

    def _look(self) -> None:
        try:
            self._before, self._now, self._problem = self._now, _look(self._client), ""
        except DaemonError as error:
            if self._now is None:
                raise
            self._problem = str(error)

    def _typed_in(self, typed: bytes) -> bool:
        """Takes keys; returns False for the one that leaves."""
        if typed.startswith(b"\x1b") and len(typed) > 1:
            return True  # an arrow, or another key that is a sequence
        for key in typed.decode(errors="replace"):
            if key in {"\x03", "\x04", ""} or (key == "q" and self._typed is None):
                return False
            if self._typed is None:
                if key == "/":
                    self._typed = ""
                self._sort = KEYS.get(key, self._sort)
            elif key in {"\r", "\n"}:
                self._filter, self._typed = self._typed, None
            elif key == "\x1b":
                self._typed = None
            elif key in {"\x7f", "\b"}:
                self._typed = self._typed[:-1]
            elif key.isprintable():
                self._typed += key
        return bool(typed)

    def _draw(self) -> None:
        columns, height = shutil.get_terminal_size()
        if self._now is None:
            return
        found = rows(self._now, self._before, sort=self._sort, only=self._filter)
        chosen = f"sort {self._sort}   filter {self._filter or '-'}"
        foot = f"{chosen}   q quits, / filters, n i o d p a sort"
        if self._typed is not None:
            foot = f"filter: {self._typed}_"
        if self._problem:
            foot = self._problem
        table = [row.line() for row in found][: max(0, height - 5)]
        lines = [_title(self._now), "", _HEAD, *table, "", foot]
        page = _END.join(one_line(line, columns - 1) for line in lines[:height])
        sys.stdout.write(f"{_HOME}{page}\x1b[K{_REST}")
        sys.stdout.flush()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys come one by one and unseen, on a screen of its own; all is put back at the end."""
    import termios  # noqa: PLC0415  only here
    import tty  # noqa: PLC0415

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    try:
        tty.setcbreak(number)
        sys.stdout.write(_ENTER)
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
