"""`ingestd replay` feeds processed records once more that the journal has kept."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ingestd.base.clock import SystemClock, shown
from ingestd.base.errors import Exit, UsageError
from ingestd.cli.arguments import add_data_dir, add_where
from ingestd.cli.configured import configured
from ingestd.cli.moments import moment
from ingestd.cli.output import add_json, confirmed, number_of, say, say_json
from ingestd.journal.build import stored_journals

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ingestd.journal.sqlite.check import SqliteFile
    from ingestd.journal.sqlite.kept import Replay

DESCRIPTION = """\
Feeds processed records once more, as after a bad deploy or a destination that has lost them. The
journal keeps them with journal.keep. It works with or without a running daemon: the daemon feeds
them from within a second on, or from its next start on, under new batch ids, and marks them in
their envelopes. Dead letters are not fed: ingestd dead retry does that.

exit codes: 0 done; 2 usage, or not confirmed; 78 configuration, or no journal"""

FOREVER = 1e12
"""A time after all others, seconds since the epoch."""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the flags."""
    parser.set_defaults(leaf=parser)
    parser.add_argument(
        "pipeline", nargs="?", metavar="PIPELINE", help="its pipeline, if there are several"
    )
    when = "2026-05-01T12:00:00Z (UTC without an offset), or 2h for two hours ago"
    parser.add_argument(
        "--since", type=moment, metavar="WHEN", help=f"accepted then or later: {when}"
    )
    parser.add_argument("--until", type=moment, metavar="WHEN", help="accepted before")
    add_where(parser)
    parser.add_argument("--all", action="store_true", help="everything that is kept")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="count only")
    parser.add_argument("--list", action="store_true", help="list the replays, and how far each is")
    parser.add_argument("--stop", action="store_true", help="stop the replays that are under way")
    add_json(parser)
    add_data_dir(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Asks for the replay; returns the exit code.

    Raises:
        IngestdError: it failed; the message is one line.
    """
    settings = configured(arguments).settings
    only = [arguments.pipeline] if arguments.pipeline else []
    found = stored_journals(settings.data_dir, only)
    if arguments.list:
        replays = [(name, one) for name, journal in found.items() for one in journal.replays()]
        for name, one in replays:
            facts = {"pipeline": name, **_facts(one)}
            say_json(facts) if arguments.json else say(_line(facts))
        if not replays:
            print("no replays", file=sys.stderr)
        return int(Exit.OK)
    if arguments.stop:
        stopped = sum(journal.stop_replays() for journal in found.values())
        told = f"{number_of(stopped, 'replay')} stopped"
        say_json({"stopped": stopped}) if arguments.json else say(told)
        return int(Exit.OK)
    if len(found) > 1:
        raise UsageError(problem=f"name the pipeline: there are {', '.join(found)}")
    ((name, journal),) = found.items()
    return _replay(arguments, name, journal)


def _replay(arguments: argparse.Namespace, name: str, journal: SqliteFile) -> int:
    filtered = (arguments.since, arguments.until) != (None, None) or arguments.where
    if not filtered and not arguments.all:
        raise UsageError(problem="replay needs --since, --until or --where, or --all")
    since = 0.0 if arguments.since is None else arguments.since
    until = FOREVER if arguments.until is None else arguments.until
    records = journal.kept_within(since, until)
    facts: dict[str, Any] = {"pipeline": name, "kept": records, "replay": None}
    which = f"{number_of(records, 'kept record')} of pipeline {name}"
    if arguments.where:
        which = f"those of {which} with {' and '.join(arguments.where)}"
    which += ", dead letters excepted,"
    if not records:
        print(
            "no records of that time are kept (see journal.keep, which is 0s by default)",
            file=sys.stderr,
        )
    elif arguments.dry_run:
        print(f"would feed {which} once more", file=sys.stderr)
    elif not arguments.yes and not confirmed(f"feed {which} once more"):
        print("nothing is fed", file=sys.stderr)
        return int(Exit.USAGE)
    else:
        number = journal.replay(SystemClock.now(), since, until, arguments.where)
        facts["replay"] = number
        if not arguments.json:
            say(f"replay {number} feeds {which} once more (ingestd replay --list)")
    if arguments.json:
        say_json(facts)
    return int(Exit.OK)


def _facts(one: Replay) -> dict[str, Any]:
    return {
        "replay": one.id,
        "state": one.state,
        "asked_at": shown(one.asked_at),
        "since": shown(one.since) if one.since else None,
        "until": shown(one.until) if one.until < FOREVER else None,
        "where": list(one.conditions),
        "records": one.records,
        "damaged": one.damaged,
    }


def _line(facts: dict[str, Any]) -> str:
    words = [f"replay {facts['replay']} of {facts['pipeline']}, asked for {facts['asked_at']}:"]
    words.append(f"{facts['state']}, {number_of(facts['records'], 'record')} fed")
    if facts["damaged"]:
        words.append(f"and {facts['damaged']} that can't be read")
    return " ".join(words)
