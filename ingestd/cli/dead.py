"""`ingestd dead` lists, sums up, shows, retries, purges and exports dead letters."""

from __future__ import annotations

import argparse
import base64
import math
import re
import sys
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.envelope import facts_of
from ingestd.base.errors import ConfigError, Exit, UsageError
from ingestd.cli.arguments import add_data_dir
from ingestd.cli.configured import configured
from ingestd.cli.lines import payload_fields, text_of, write_lines
from ingestd.cli.moments import moment, shown
from ingestd.cli.output import say
from ingestd.codecs.lines import record_fault
from ingestd.journal.build import stored_journals
from ingestd.journal.dead_letters import REASONS, LetterFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ingestd.cli.output import Parser
    from ingestd.journal.dead_letters import DeadLetters, LetterCounts, StoredLetter
    from ingestd.settings import Settings

DESCRIPTION = """\
Works on the dead letters in a data directory, with or without a running daemon, and never blocks
it. Retry marks dead letters, and the daemon requeues them within a second, or at its next start.

exit codes: 0 done; 1 unexpected; 2 usage, or not confirmed; 78 configuration, or no journal"""

SHOWN = 100
"""Rows of a table without `--limit`."""
ERRORS_MAX = 1000
"""Different errors of a summary; all further ones of a reason are one."""
_DIGITS = re.compile(r"[0-9]+")


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the actions, each with its flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    add = actions.add_parser
    one = _action(add, "list", _list, "one line for each dead letter")
    _add_filter(one)
    one.add_argument("--json", action="store_true", help="JSON lines, without payloads")
    one = _action(add, "summary", _summary, "one line for each error, the most frequent one first")
    _add_filter(one)
    one.add_argument("--json", action="store_true", help="JSON lines")
    one = _action(add, "show", _show, "all fields of dead letters, with their payloads")
    _add_ids(one)
    one.add_argument("--json", action="store_true", help="a JSON line for each")
    one = _action(add, "retry", _retry, "requeue dead letters (all, or those of a filter)")
    _add_filter(one)
    one.add_argument("--all", action="store_true", help="every dead letter; the same as no filter")
    one = _action(add, "purge", _purge, "delete dead letters for good")
    _add_filter(one)
    one.add_argument("--all", action="store_true", help="every dead letter")
    one.add_argument("--yes", action="store_true", help="do not ask")
    one = _action(add, "export", _export, "JSON lines with payloads, to stdout or a file")
    _add_filter(one)
    one.add_argument("-o", "--output", metavar="FILE", help="write and sync this file instead")


def _action(
    add_parser: Callable[..., Any],
    name: str,
    run: Callable[[argparse.Namespace, dict[str, DeadLetters]], int],
    text: str,
) -> Parser:
    parser: Parser = add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}")
    parser.set_defaults(run=run, leaf=parser)
    add_data_dir(parser)
    parser.add_argument(
        "--pipeline", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    return parser


def _add_filter(parser: Parser) -> None:
    _add_ids(parser)
    group = parser.add_argument_group("filter")
    group.add_argument(
        "--reason", type=_reason, action="append", default=[], metavar="WORD",
        help=f"with this reason; repeatable: {', '.join(REASONS)}",
    )  # fmt: skip
    group.add_argument(
        "--error", default="", metavar="TEXT", help="with this text in the error, case and all"
    )
    when = "2026-05-01T12:00:00Z (UTC without an offset), or 2h for two hours ago"
    group.add_argument(
        "--since", type=moment, metavar="WHEN", help=f"given up then or later: {when}"
    )
    group.add_argument("--until", type=moment, metavar="WHEN", help="given up before")
    group.add_argument("--limit", type=_positive, metavar="N", help="only the N oldest of these")


def _add_ids(parser: Parser) -> None:
    """Adds numbers of dead letters, in the same two forms for every action."""
    parser.add_argument(
        "ids", type=_positive, nargs="*", default=[], metavar="ID", help="number in the list"
    )
    parser.add_argument(
        "--id", type=_positive, action="append", default=[], metavar="ID", help="the same"
    )


def _reason(written: str) -> str:
    if written not in REASONS:
        known = ", ".join(REASONS)
        raise argparse.ArgumentTypeError(f"{written!r} is no reason; there are {known}")
    return written


def _positive(written: str) -> int:
    number = int(written)
    if number < 1:
        raise argparse.ArgumentTypeError("should be at least 1")
    return number


def execute(arguments: argparse.Namespace) -> int:
    """Runs the action; returns the exit code.

    Raises:
        IngestdError: it failed; the message is one line.
    """
    settings = configured(arguments).settings
    journals = stored_journals(settings.data_dir, arguments.pipeline)
    found = {name: journal.dead_letters for name, journal in journals.items()}
    arguments.id = list(dict.fromkeys([*arguments.ids, *arguments.id]))
    if arguments.id:
        found = _holding(found, arguments.id)
    arguments.settings = settings
    run: Callable[[argparse.Namespace, dict[str, DeadLetters]], int] = arguments.run
    return run(arguments, found)


def _holding(found: dict[str, DeadLetters], ids: list[int]) -> dict[str, DeadLetters]:
    """The journals that hold the dead letters of some numbers.

    Raises:
        UsageError: one of them has no dead letter, or more than one.
    """
    holders: dict[int, list[str]] = {number: [] for number in ids}
    for name, letters in found.items():
        absent = set(letters.missing(ids))
        for number in ids:
            if number not in absent:
                holders[number].append(name)
    unknown = [str(number) for number, names in holders.items() if not names]
    if unknown:
        raise UsageError(problem=f"there is no dead letter {', '.join(unknown)}")
    for number, names in holders.items():
        if len(names) > 1:
            which = " or ".join(names)
            raise UsageError(
                problem=f"there is more than one dead letter {number}: add --pipeline {which}"
            )
    named = {name for names in holders.values() for name in names}
    return {name: letters for name, letters in found.items() if name in named}


def _filter(arguments: argparse.Namespace) -> LetterFilter:
    return LetterFilter(
        reasons=tuple(arguments.reason),
        since=arguments.since,
        until=arguments.until,
        ids=frozenset(arguments.id),
        limit=arguments.limit,
        error=arguments.error,
    )


# -- reading ---------------------------------------------------------------------------------------


def _letters(
    found: dict[str, DeadLetters], chosen: LetterFilter, *, whole: bool
) -> Iterator[tuple[str, StoredLetter]]:
    """Yields the dead letters of all pipelines; `limit` counts over all of them."""
    left = chosen.limit
    for name, letters in found.items():
        if left == 0:
            return
        for kept in letters.select(chosen._replace(limit=left), whole=whole):
            yield name, kept
            left = None if left is None else left - 1


def _list(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    chosen = _filter(arguments)
    if arguments.json:
        lines = (
            as_line(name, kept, whole=False) for name, kept in _letters(found, chosen, whole=False)
        )
        write_lines(lines)
        return int(Exit.OK)
    table = chosen if chosen.limit else chosen._replace(limit=SHOWN)
    rows = [as_row(name, kept) for name, kept in _letters(found, table, whole=False)]
    if rows:
        say("\n".join([head(), *rows]))
    there = sum(letters.count(chosen).letters for letters in found.values())
    if there > len(rows) and chosen.limit is None:
        print(f"{len(rows)} of {there} dead letters; --limit N shows more", file=sys.stderr)
    elif not rows:
        print("no dead letters", file=sys.stderr)
    return int(Exit.OK)


class ErrorCount(NamedTuple):
    """The dead letters of a pipeline whose errors differ in nothing but their numbers.

    Attributes:
        letters: how many.
        bytes: of their payloads.
        marked: of these, to be requeued.
        first_at: when the first one was given up, seconds since the epoch.
        last_at: the last one.
        example: the number of the newest one.
        error: its error.
    """

    letters: int = 0
    bytes: int = 0
    marked: int = 0
    first_at: float = math.inf
    last_at: float = 0.0
    example: int = 0
    error: str = ""


def summed_up(
    letters: Iterable[tuple[str, StoredLetter]],
) -> list[tuple[str, str, ErrorCount]]:
    """Pipeline, reason and count of each error, the most frequent one first."""
    counts: dict[tuple[str, str, str], ErrorCount] = {}
    for pipeline, kept in letters:
        letter = kept.letter
        key = pipeline, letter.reason, _DIGITS.sub("0", letter.error)
        error = letter.error
        if key not in counts and len(counts) >= ERRORS_MAX:
            error = "(further errors)"
            key = pipeline, letter.reason, error
        before = counts.get(key, ErrorCount())
        counts[key] = ErrorCount(
            before.letters + 1,
            before.bytes + kept.size,
            before.marked + kept.marked,
            min(before.first_at, letter.last_at),
            max(before.last_at, letter.last_at),
            kept.id,
            error,
        )
    ordered = sorted(counts.items(), key=lambda one: -one[1].letters)
    return [(pipeline, reason, count) for (pipeline, reason, _), count in ordered]


_SUMMARY = "{:>8}  {:<12}  {:<11}  {:<24}  {:<24}  {:>8}  {}"


def _summary(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    rows = summed_up(_letters(found, _filter(arguments), whole=False))
    if arguments.json:
        for pipeline, reason, count in rows:
            facts = {"pipeline": pipeline, "reason": reason, **count._asdict()}
            facts |= {name: shown(facts[name]) for name in ("first_at", "last_at")}
            say(msgspec.json.encode(facts).decode())
    elif rows:
        say(_SUMMARY.format("LETTERS", "PIPELINE", "REASON", "FIRST", "LAST", "NEWEST", "ERROR"))
        for pipeline, reason, count in rows:
            times, error = (shown(count.first_at), shown(count.last_at)), _one_line(count.error, 80)
            row = _SUMMARY.format(count.letters, pipeline, reason, *times, count.example, error)
            say(row.rstrip())
    else:
        print("no dead letters", file=sys.stderr)
    return int(Exit.OK)


def _show(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    if not arguments.id:
        raise UsageError(problem="show needs the number of a dead letter (see ingestd dead list)")
    for name, kept in _letters(found, LetterFilter(ids=frozenset(arguments.id)), whole=True):
        if arguments.json:
            write_lines([as_line(name, kept, whole=True)])
        else:
            say(as_page(name, kept))
    return int(Exit.OK)


def _export(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    letters = _letters(found, _filter(arguments), whole=True)
    try:
        count = write_lines((as_line(*one, whole=True) for one in letters), arguments.output)
    except OSError as error:
        raise ConfigError(problem=f"{arguments.output}: {error.strerror or error}") from error
    print(f"{count} dead letters exported", file=sys.stderr)
    return int(Exit.OK)


# -- changing --------------------------------------------------------------------------------------


def _counted(found: dict[str, DeadLetters], chosen: LetterFilter) -> dict[str, LetterCounts]:
    """Counts the chosen dead letters of each journal; `limit` counts over all of them."""
    counted, left = {}, chosen.limit
    for name, letters in found.items():
        if left == 0:
            break
        counted[name] = letters.count(chosen._replace(limit=left))
        left = None if left is None else left - counted[name].letters
    return counted


def _retry(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    chosen = _filter(arguments)
    totals = Counter[str]()
    for name, counted in _counted(found, chosen).items():
        totals["incomplete"] += counted.incomplete
        totals["before"] += counted.marked
        if counted.letters > counted.marked + counted.incomplete:
            check = _check(arguments.settings, name)
            marked = found[name].mark(chosen, counted.last, check)
            totals["marked"] += marked.letters
            totals["invalid"] += marked.invalid
    say(f"{totals['marked']} dead letters will be requeued" + _before(totals["before"]))
    if totals["incomplete"]:
        text = "hold no record, or only its beginning (damaged, too_large, unfinished): they stay"
        print(f"{totals['incomplete']} letters {text}", file=sys.stderr)
    if totals["invalid"]:
        text = "were never accepted and are still no records of their pipeline: they stay"
        print(f"{totals['invalid']} letters {text}", file=sys.stderr)
    return int(Exit.OK)


def _check(settings: Settings, pipeline: str) -> Callable[[bytes], str]:
    """The check of a payload as a record of a pipeline, as the daemon makes it, too."""
    every = settings.pipeline_settings()
    own = every.get(pipeline, every["default"])
    return partial(
        record_fault,
        form=own.format,
        record_bytes_max=own.record_bytes_max,
        depth_max=own.json_depth_max,
    )


def _before(marked: int) -> str:
    return f", {marked} more were marked before" if marked else ""


def _purge(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    chosen = _filter(arguments)
    if chosen.is_open and not arguments.all:
        raise UsageError(problem="purge needs a filter, or --all (see ingestd dead purge --help)")
    counted = _counted(found, chosen)
    letters = sum(one.letters - one.marked for one in counted.values())
    size = sum(one.bytes for one in counted.values())
    if (
        letters
        and not arguments.yes
        and not _confirmed(f"delete {letters} dead letters ({size} bytes)")
    ):
        print("nothing was deleted", file=sys.stderr)
        return int(Exit.USAGE)
    gone = 0
    for name, one in counted.items():
        if one.letters > one.marked:
            gone += found[name].purge(chosen, one.last)
    say(f"{gone} dead letters deleted")
    marked = sum(one.marked for one in counted.values())
    if marked:
        print(f"{marked} dead letters are being requeued: they stay", file=sys.stderr)
    return int(Exit.OK)


def _confirmed(what: str) -> bool:
    """Asks for confirmation on the terminal.

    Raises:
        UsageError: there is none.
    """
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(problem=f"to {what} without a terminal, add --yes")
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


# -- rendering -------------------------------------------------------------------------------------

_ROW = "{:>8}  {:<12}  {:<24}  {:<11}  {:>5}  {:>9}  {}"


def head() -> str:
    """The table's first line."""
    return _ROW.format("ID", "PIPELINE", "GIVEN UP", "REASON", "TRIES", "BYTES", "ERROR")


def as_row(pipeline: str, kept: StoredLetter) -> str:
    """One line of the table."""
    letter = kept.letter
    error = _one_line(letter.error, 80)
    if letter.records > 1:
        error = f"[{letter.records} records] {error}"
    if kept.marked:
        error = f"[requeued] {error}"
    return _ROW.format(
        kept.id, pipeline, shown(letter.last_at), letter.reason, letter.attempts, kept.size, error
    ).rstrip()


def as_page(pipeline: str, kept: StoredLetter) -> str:
    """All fields, for a terminal. Control characters are shown as `?`."""
    letter = kept.letter
    lines = [
        f"letter    {kept.id} of pipeline {pipeline}",
        f"record    {letter.record or '(never accepted)'}",
        f"records   {letter.records}",
        f"reason    {letter.reason}",
        f"error     {_one_line(letter.error)}",
        f"attempts  {letter.attempts}",
        f"first at  {shown(letter.first_at)}",
        f"given up  {shown(letter.last_at)}",
        f"requeued  {'yes' if kept.marked else 'no'}",
    ]
    lines += [f"{name:<9} {_one_line(text)}" for name, text in _origin(letter.envelope)]
    if letter.traceback:
        lines += ["", "traceback", _printable(letter.traceback.rstrip("\n"))]
    text = text_of(letter.payload)
    if text is None:
        encoded = base64.b64encode(letter.payload).decode()
        return "\n".join([*lines, "", f"payload   {kept.size} bytes, base64", encoded])
    return "\n".join([*lines, "", f"payload   {kept.size} bytes", _printable(text)])


def as_line(pipeline: str, kept: StoredLetter, *, whole: bool) -> bytes:
    """A JSON object and an LF; `whole` with traceback and payload.

    The payload is `payload` if it is UTF-8, else `payload_base64`.
    """
    letter = kept.letter
    facts: dict[str, object] = {
        "pipeline": pipeline,
        "id": kept.id,
        "record": letter.record,
        "records": letter.records,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "first_at": shown(letter.first_at),
        "last_at": shown(letter.last_at),
        "bytes": kept.size,
        "retry": kept.marked,
        "envelope": facts_of(letter.envelope),
    }
    if whole:
        facts["traceback"] = letter.traceback
        facts |= payload_fields(letter.payload)
    return msgspec.json.encode(facts) + b"\n"


def _origin(packed: bytes) -> Iterator[tuple[str, str]]:
    """The facts of an envelope, by the names of their lines on a page."""
    for name, value in facts_of(packed).items():
        if isinstance(value, dict):
            label = "header" if name == "headers" else "attribute"
            yield from ((label, f"{key}: {one}") for key, one in value.items())
        else:
            yield name.removeprefix("content_"), str(value)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def _one_line(text: str, width: int | None = None) -> str:
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"
