"""`ingestd dev [HANDLER]` runs a daemon that reloads its handler when a file changes.

The daemon is a child of this process. Its handler runs in a thread, so that `print` and
`breakpoint()` work in this terminal, and its journal lies in a scratch folder. When a file changes
the configuration and the handler are checked, while the old handler works on. If they are good the
child drains and another one goes on with the same journal, so that no record is lost. The socket
of the http source belongs to this process: clients wait while a child is replaced.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.errors import AddressError, ConfigError, Exit, OutputError, UsageError
from ingestd.cli.arguments import add_settings
from ingestd.cli.configured import configured
from ingestd.cli.output import fail, say

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.cli.output import Parser

LOOK_SECONDS = 0.3
STOP_SECONDS = 10.0
FILES_MAX = 20_000
FOLDERS_MAX = 2_000
"""Folders that are looked at each time: of a home or a root there would be no end."""
_SKIPPED = {"__pycache__", "node_modules", "venv", "site-packages", "build", "dist"}
_SUFFIXES = (".py", ".toml")
# Flags and variables of the user's come before these, a file behind them.
_OURS = {
    "INGESTD_LOG__LEVEL": "debug",
    "INGESTD_LOG__FORMAT": "json",
    "INGESTD_DRAIN__TIMEOUT": "2s",
    "INGESTD_EXECUTOR__WORKERS": "1",
    "INGESTD_EXECUTOR__TIMEOUT": "24h",
}
_START = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.dup2(int(sys.argv[2]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="records")
os.execv(sys.executable, [sys.executable, "-P", "-m", "ingestd", *sys.argv[3:]])
"""
"""The child ends with its parent, however that ends: it would keep the port, and take records."""

DESCRIPTION = """\
Runs a daemon in a scratch folder, prints each batch and what became of it, and loads HANDLER again
when a .py or .toml file below the current folder changes, without losing a record. The handler runs
in a thread: print and breakpoint() work here. Ctrl-C leaves at once.

exit codes: 0 left by Ctrl-C, SIGTERM or SIGHUP; 2 usage; 78 configuration or handler"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the flags: those of `run`, and some of its own."""
    add_settings(parser, argv)
    parser.add_argument("--send", metavar="FILE", help="post the lines of FILE once it is ready")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder")


def execute(arguments: argparse.Namespace) -> int:
    """Runs until Ctrl-C.

    Raises:
        UsageError: the source is not http, or FILE can't be read.
        ConfigError: the configuration is wrong, or the address can't be had.
    """
    settings = configured(arguments).settings
    if [source.kind for source in settings.running_sources()] != ["http"]:
        raise UsageError(problem="dev is for the source http alone")
    body = _read(arguments.send) if arguments.send else b""
    checked = _check(_words(arguments))
    if checked.problems:
        raise ConfigError(problem="\n".join(checked.problems))
    folder = Path(tempfile.mkdtemp(prefix="ingestd-dev-"))
    try:
        with _listen(settings.http.listen) as sock:
            return _Dev(arguments, folder, sock, body).run(checked)
    finally:
        if arguments.keep:
            fail(f"the folder is kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _words(arguments: argparse.Namespace) -> list[str]:
    """The settings of the command line again, for a child."""
    config = [] if arguments.config is None else ["--config", arguments.config]
    return [*config, *(word for one in arguments.flags for word in (f"--{one.key}", one.value))]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(problem=f"{path}: {error.strerror}") from error


def _listen(address: str) -> socket.socket:
    from ingestd.config.network import split_address  # noqa: PLC0415
    from ingestd.host.sockets import listen_fault  # noqa: PLC0415

    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        problem = listen_fault(error)
        raise AddressError(address=address, setting="http.listen", problem=problem) from error


# -- checking --------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """The result of `ingestd check`.

    Attributes:
        problems: lines; none if a daemon would start.
        handler: its full name.
        executor: that suits it.
        listen: address of the http source.
    """

    problems: list[str]
    handler: str = ""
    executor: str = ""
    listen: str = ""


def _check(words: Sequence[str]) -> Checked:
    """Checks configuration and handler in a process of its own: modules are imported anew."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-m", "ingestd", "check", "--json", *words],
        capture_output=True, text=True, encoding="utf-8", errors="replace", check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    problems = [line.removeprefix("ingestd: ") for line in done.stderr.splitlines()]
    found = (line for line in done.stdout.splitlines() if line.startswith('{"settings":'))
    if not (line := next(found, "")):  # a hook of the user's at the exit may print behind it
        return Checked(problems or [f"the check said nothing, and left with {done.returncode}"])
    told = json.loads(line)
    problems += [one["text"] for one in told["findings"] if one["level"] == "error"]
    if done.returncode or not told["handlers"]:
        return Checked(problems or ["the check failed"])
    handler, _, kind = told["handlers"][0]["is"].partition(" (executor: ")
    listen = next(str(one["value"]) for one in told["settings"] if one["key"] == "http.listen")
    return Checked([], handler, kind.rstrip(")"), listen)


# -- the child -------------------------------------------------------------------------------------


class _Dev:
    """The child and its replacements.

    Args:
        arguments: of the command line.
        folder: scratch; the data directory lies in it.
        sock: of the http source.
        body: is posted once the first child is ready.
    """

    def __init__(
        self, arguments: argparse.Namespace, folder: Path, sock: socket.socket, body: bytes
    ) -> None:
        self._words = _words(arguments)
        self._folder = folder
        self._sock = sock
        self._body = body
        self._listen = ""
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._was_ready = False
        self._code = int(Exit.OK)
        self._unsaid: OutputError | None = None

    def run(self, checked: Checked) -> int:
        """Returns the exit code: after Ctrl-C, SIGTERM or SIGHUP, or of a child that never ran.

        Raises:
            OutputError: stdout can't be written.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self._stopped.set())
        watch = Watch(Path.cwd())
        if not watch.sees_all:
            say(f"-- changes are seen in the nearest {FOLDERS_MAX:,} folders alone")
        try:
            self._listen = checked.listen
            self._start(checked)
            while not self._stopped.wait(LOOK_SECONDS):
                if changed := watch.changed():
                    self._reload(changed)
        finally:
            self._end(at_once=True)
        if self._unsaid is not None:
            raise self._unsaid
        return self._code

    def _start(self, checked: Checked) -> None:
        environ = {**_OURS, **os.environ, "INGESTD_DATA_DIR": str(self._folder / "data")}
        if checked.executor == "process":
            environ.setdefault("INGESTD_EXECUTOR__KIND", "thread")
        words = [str(os.getpid()), str(self._sock.fileno()), "run", *self._words]
        self._child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _START, *words],
            env=environ, stderr=subprocess.PIPE, pass_fds=(self._sock.fileno(),),
        )  # fmt: skip
        self._begin(self._tell, self._child, checked.handler)

    def _begin(self, work: Callable[..., None], *facts: object) -> None:
        """Begins work in a thread; what it cannot say ends the command."""

        def run() -> None:
            try:
                work(*facts)
            except OutputError as error:
                self._unsaid = error
                self._stopped.set()

        threading.Thread(target=run, daemon=True).start()

    def _reload(self, changed: str) -> None:
        checked = _check(self._words)
        if checked.problems:
            say(f"-- {changed} changed, but cannot be used; the handler before it works on")
            fail("\n".join(checked.problems))
            return
        say(f"-- {changed} changed: loading the handler again")
        if checked.listen != self._listen:
            say(f"-- http.listen needs a restart of dev: it stays at {self._listen}")
        self._end(at_once=False)
        if not self._stopped.is_set():
            self._start(checked)

    def _end(self, *, at_once: bool) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if not at_once:
            child.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            while child.poll() is None and time.monotonic() < deadline:
                if self._stopped.wait(0.02):
                    break
        child.kill()
        child.wait()

    # -- what it says --

    def _tell(self, child: subprocess.Popen[bytes], handler: str) -> None:
        assert child.stderr is not None  # noqa: S101
        for line in child.stderr:
            try:
                event = json.loads(line)
                lines = list(_told(event, handler))
            except (ValueError, AttributeError, KeyError):
                sys.stderr.write(line.decode(errors="replace"))
                continue
            if lines:
                say("\n".join(lines))
            if event.get("event") == "daemon_started":
                self._was_ready = True
                body, self._body = self._body, b""
                if body:
                    self._begin(_send, self._sock, body)
        child.stderr.close()
        if child.wait() == 0 or child is not self._child or self._stopped.is_set():
            return
        if self._was_ready:
            say(f"-- the daemon left with {child.returncode}; it starts again when a file changes")
        else:  # no change of the handler would help: its check has passed
            self._code = max(child.returncode, int(Exit.UNEXPECTED))
            self._stopped.set()


def _told(event: dict[str, Any], handler: str) -> Iterator[str]:
    """The lines of an event of the daemon's log; none for most."""
    kind = event["event"]
    if kind == "daemon_started":
        where = " ".join(f"http://{one}" for one in event["listening"])
        yield f"-- ready at {where}: {handler}"
    elif kind == "batch_tried":
        counts = {"rejected": event["rejected"], "to be tried again": event["retries"]}
        counts = {"done": event["records"] - sum(counts.values()), **counts}
        told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        if event["failed"]:
            told = f"{event['records']:,} failed"
        attempt = f", try {event['attempts']}" if event["attempts"] > 1 else ""
        yield f"batch {event['batch_id']}: {told} in {event['seconds'] * 1000:.3g} ms{attempt}"
    elif kind == "batch_failed":
        yield f"batch {event['batch_id']}: {event['error']}"
        yield from event.get("exception", "").splitlines()
    elif kind == "records_given_up":
        yield f"dead letters: {event['records']:,} {event['reason']}: {event['error']}"
    elif kind == "handler_went_down":
        yield f"-- every batch fails, and records wait until one succeeds: {event['error']}"
    elif event["level"] in {"warning", "error", "critical"}:
        known = {"event", "level", "timestamp", "exception"}
        facts = " ".join(f"{key}={value!r}" for key, value in event.items() if key not in known)
        yield f"{event['level']}: {kind} {facts}"
        yield from event.get("exception", "").splitlines()


def _send(sock: socket.socket, body: bytes) -> None:
    host, port = sock.getsockname()[:2]
    connection = http.client.HTTPConnection(host, port, timeout=60)
    with contextlib.closing(connection):
        try:
            connection.request(
                "POST", "/v1/records", body, {"Content-Type": "application/x-ndjson"}
            )
            answer = connection.getresponse()
            say(f"-- sent: {answer.status} {answer.read(4096).decode(errors='replace')}")
        except (OSError, http.client.HTTPException) as error:
            say(f"-- not sent: {error}")


# -- files -----------------------------------------------------------------------------------------


class Watch:
    """Looks for changes of the files that a handler may be made of.

    With the extra `watch` (watchfiles) the kernel tells; else the times of up to `FILES_MAX` files
    in up to `FOLDERS_MAX` folders are compared.

    Args:
        folder: with everything below it, but hidden folders, environments and caches.

    Attributes:
        sees_all: there are no more files than that.
    """

    def __init__(self, folder: Path) -> None:
        self.sees_all = True
        self._folder = folder
        self._times = dict(self._look())
        self._events: Iterator[set[tuple[Any, str]]] | None = None
        with contextlib.suppress(ImportError):
            from watchfiles import watch  # noqa: PLC0415  an extra

            self.sees_all = True
            self._events = watch(
                folder, watch_filter=lambda _, path: _counts(Path(path), folder),
                rust_timeout=1, yield_on_timeout=True, debounce=100, raise_interrupt=False,
            )  # fmt: skip

    def changed(self) -> str:
        """The name of a file that changed since the last call; empty if none did."""
        if self._events is not None:
            found = next(self._events, set())
            return min((os.path.relpath(path, self._folder) for _, path in found), default="")
        times = dict(self._look())
        before, self._times = self._times, times
        changed = sorted(path for path, _ in times.items() ^ before.items())
        return os.path.relpath(changed[0], self._folder) if changed else ""

    def _look(self) -> Iterator[tuple[str, int]]:
        """Files and their times, those of the nearest folders first."""
        waiting, folders, files = deque([str(self._folder)]), 0, 0
        while waiting and folders < FOLDERS_MAX and files < FILES_MAX:
            folders += 1
            with contextlib.suppress(OSError), os.scandir(waiting.popleft()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name[0] != "." and entry.name not in _SKIPPED:
                            waiting.append(entry.path)
                    elif entry.name.endswith(_SUFFIXES):
                        files += 1
                        with contextlib.suppress(OSError):
                            yield entry.path, entry.stat().st_mtime_ns
        self.sees_all = not waiting


def _counts(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else path.parts
    skipped = any(one[0] == "." or one in _SKIPPED for one in parts[:-1])
    return path.suffix in _SUFFIXES and not skipped
