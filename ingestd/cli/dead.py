"""`ingestd dead` lists, sums up, shows, edits, retries, purges and exports dead letters."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.clock import shown
from ingestd.base.errors import ConfigError, Exit, UsageError
from ingestd.cli.arguments import add_data_dir, positive
from ingestd.cli.configured import configured
from ingestd.cli.lines import as_line, as_page, as_row, head, one_line, write_lines
from ingestd.cli.moments import moment
from ingestd.cli.output import add_json, confirmed, number_of, say, say_json
from ingestd.codecs.lines import record_fault
from ingestd.journal.build import stored_journals
from ingestd.journal.dead_letters import REASONS, LetterFilter
from ingestd.journal.handling import counted, letters_of, purge, retry, summed_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.cli.output import Parser
    from ingestd.journal.dead_letters import DeadLetters
    from ingestd.pipeline_settings import PipelineSettings
    from ingestd.settings import Settings

DESCRIPTION = """\
Works on the dead letters in a data directory, with or without a running daemon, and never blocks
it. Retry marks dead letters, and the daemon requeues them within a second, or at its next start.

exit codes: 0 done; 1 unexpected; 2 usage, or not confirmed; 78 configuration, or no journal"""

SHOWN = 100
"""Rows of a table without `--limit`."""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the actions, each with its flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    add = actions.add_parser
    one = _action(add, "list", _list, "one line for each dead letter")
    _add_filter(one)
    add_json(one, "JSON lines, without payloads")
    one = _action(add, "summary", _summary, "one line for each error, the most frequent one first")
    _add_filter(one)
    add_json(one, "JSON lines")
    one = _action(add, "show", _show, "all fields of dead letters, with their payloads")
    _add_ids(one)
    add_json(one, "a JSON line for each")
    one = _action(add, "retry", _retry, "requeue dead letters (all, or those of a filter)")
    _add_filter(one)
    one.add_argument("--all", action="store_true", help="every dead letter; the same as no filter")
    add_json(one)
    one.add_argument("--into", metavar="PIPELINE", help="feed them into this pipeline instead")
    one = _action(add, "edit", _edit, "change the payload of a dead letter, and requeue it")
    _add_ids(one)
    one.add_argument(
        "--set", type=_assignment, action="append", default=[], metavar="KEY=VALUE",
        help="set this in a JSON record; KEY is a member or a JSON Pointer, VALUE JSON or a text;"
        " repeatable",
    )  # fmt: skip
    one.add_argument(
        "--input", metavar="FILE", help="read the payload from this file; - is standard input"
    )
    add_json(one)
    one = _action(add, "purge", _purge, "delete dead letters for good")
    _add_filter(one)
    one.add_argument("--all", action="store_true", help="every dead letter")
    one.add_argument("--yes", action="store_true", help="do not ask")
    add_json(one)
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
    group.add_argument("--limit", type=positive, metavar="N", help="only the N oldest of these")


def _add_ids(parser: Parser) -> None:
    """Adds numbers of dead letters, in the same two forms for every action."""
    parser.add_argument(
        "ids", type=positive, nargs="*", default=[], metavar="ID", help="number in the list"
    )
    parser.add_argument(
        "--id", type=positive, action="append", default=[], metavar="ID", help="the same"
    )


def _reason(written: str) -> str:
    if written not in REASONS:
        known = ", ".join(REASONS)
        raise argparse.ArgumentTypeError(f"{written!r} is no reason; there are {known}")
    return written


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


def _list(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    chosen = _filter(arguments)
    if arguments.json:
        lines = (
            as_line(name, kept, whole=False)
            for name, kept in letters_of(found, chosen, whole=False)
        )
        write_lines(lines)
        return int(Exit.OK)
    table = chosen if chosen.limit else chosen._replace(limit=SHOWN)
    rows = [as_row(name, kept) for name, kept in letters_of(found, table, whole=False)]
    if rows:
        say("\n".join([head(), *rows]))
    there = sum(letters.count(chosen).letters for letters in found.values())
    if there > len(rows) and chosen.limit is None:
        every = number_of(there, "dead letter")
        print(f"{len(rows)} of {every}; --limit N shows more", file=sys.stderr)
    elif not rows:
        print("no dead letters", file=sys.stderr)
    return int(Exit.OK)


_SUMMARY = "{:>8}  {:<12}  {:<11}  {:<24}  {:<24}  {:>8}  {}"


def _summary(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    rows = summed_up(letters_of(found, _filter(arguments), whole=False))
    if arguments.json:
        for pipeline, reason, count in rows:
            facts = {"pipeline": pipeline, "reason": reason, **count._asdict()}
            facts |= {name: shown(facts[name]) for name in ("first_at", "last_at")}
            say_json(facts)
    elif rows:
        say(_SUMMARY.format("LETTERS", "PIPELINE", "REASON", "FIRST", "LAST", "NEWEST", "ERROR"))
        for pipeline, reason, count in rows:
            times, error = (shown(count.first_at), shown(count.last_at)), one_line(count.error, 80)
            row = _SUMMARY.format(count.letters, pipeline, reason, *times, count.example, error)
            say(row.rstrip())
    else:
        print("no dead letters", file=sys.stderr)
    return int(Exit.OK)


def _show(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    if not arguments.id:
        raise UsageError(problem="show needs the number of a dead letter (see ingestd dead list)")
    for name, kept in letters_of(found, LetterFilter(ids=frozenset(arguments.id)), whole=True):
        if arguments.json:
            write_lines([as_line(name, kept, whole=True)])
        else:
            say(as_page(name, kept))
    return int(Exit.OK)


def _export(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    letters = letters_of(found, _filter(arguments), whole=True)
    try:
        count = write_lines((as_line(*one, whole=True) for one in letters), arguments.output)
    except OSError as error:
        raise ConfigError(problem=f"{arguments.output}: {error.strerror or error}") from error
    print(f"{number_of(count, 'dead letter')} exported", file=sys.stderr)
    return int(Exit.OK)


# -- changing --------------------------------------------------------------------------------------


def _retry(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    into = partial(_dead_letters, arguments.settings.data_dir)
    if arguments.into:
        into(arguments.into)  # it has a journal
    for one in found.values():
        try:
            earlier = one.finish_moves(into)
        except UsageError as error:  # its pipeline has no journal any more: the letters stay
            print(f"some dead letters are still on their way: {error}", file=sys.stderr)
            continue
        for target, letters in earlier.items():
            if letters:
                were = "was" if letters == 1 else "were"
                moved = f"{number_of(letters, 'dead letter')} of an earlier command {were} moved"
                print(f"{moved} into {target}", file=sys.stderr)
    if arguments.into:
        return _move(arguments, found, into)
    chosen = _filter(arguments)
    totals = retry(found, chosen, partial(_check, arguments.settings))
    if arguments.json:
        say_json(totals._asdict())
        return int(Exit.OK)
    say(f"{number_of(totals.marked, 'dead letter')} will be requeued" + _before(totals.before))
    _tell_incomplete(totals.incomplete)
    if totals.invalid:
        single = "letter was never accepted and is still no record of its pipeline: it stays"
        many = "letters were never accepted and are still no records of their pipeline: they stay"
        print(number_of(totals.invalid, single, many), file=sys.stderr)
    return int(Exit.OK)


def _tell_incomplete(letters: int) -> None:
    if letters:
        what = "no record, or only its beginning (damaged, too_large, unfinished)"
        one, many = f"letter holds {what}: it stays", f"letters hold {what}: they stay"
        print(number_of(letters, one, many), file=sys.stderr)


def _dead_letters(data_dir: Path, pipeline: str) -> DeadLetters:
    return stored_journals(data_dir, [pipeline])[pipeline].dead_letters


def _move(
    arguments: argparse.Namespace,
    found: dict[str, DeadLetters],
    into: Callable[[str], DeadLetters],
) -> int:
    """Feeds dead letters into another pipeline; see `ingestd.journal.sqlite.moves`."""
    target, totals = arguments.into, Counter[str]()
    check = _check(arguments.settings, target)
    sources = {name: letters for name, letters in found.items() if name != target}
    for name, one in counted(sources, _filter(arguments)).items():
        totals["incomplete"] += one.incomplete
        if one.letters > one.marked + one.incomplete:
            marked = sources[name].move(_filter(arguments), one.last, check, target)
            totals["invalid"] += marked.invalid
            totals["moved"] += sources[name].finish_moves(into).get(target, 0)
    if arguments.json:
        say_json({name: totals[name] for name in ("moved", "incomplete", "invalid")})
        return int(Exit.OK)
    moved = number_of(totals["moved"], "dead letter was", "dead letters were")
    say(f"{moved} moved into pipeline {target}")
    _tell_incomplete(totals["incomplete"])
    if totals["invalid"]:
        single = f"letter is no record of {target}: it stays"
        many = f"letters are no records of {target}: they stay"
        print(number_of(totals["invalid"], single, many), file=sys.stderr)
    return int(Exit.OK)


def pipeline_of(settings: Settings, pipeline: str) -> PipelineSettings:
    """The settings of a pipeline; those of the default one if they do not name it any more."""
    every = settings.pipeline_settings()
    return every.get(pipeline, every["default"])


def _check(settings: Settings, pipeline: str) -> Callable[[bytes], str]:
    """The check of a payload as a record of a pipeline, as the daemon makes it, too."""
    own = pipeline_of(settings, pipeline)
    return partial(
        record_fault,
        form=own.format,
        record_bytes_max=own.record_bytes_max,
        depth_max=own.json_depth_max,
    )


def _edit(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    if len(arguments.id) != 1:
        raise UsageError(problem="edit needs the number of one dead letter (see ingestd dead list)")
    chosen = LetterFilter(ids=frozenset(arguments.id))
    for name, kept in letters_of(found, chosen, whole=True):
        if kept.letter.reason == "damaged" or kept.marked:
            why = "is being requeued" if kept.marked else "holds no record (damaged)"
            raise UsageError(problem=f"dead letter {kept.id} {why}")
        form = pipeline_of(arguments.settings, name).format
        payload, left_in = _edited(arguments, kept.letter.payload, is_json=form == "json")
        text = f"; your text is in {left_in}" if left_in else ""
        if payload == kept.letter.payload:
            print("nothing was changed", file=sys.stderr)
            _remove(left_in)
            if arguments.json:
                say_json({"id": kept.id, "pipeline": name, "edited": False})
            return int(Exit.OK)
        if fault := _check(arguments.settings, name)(payload):
            raise UsageError(problem=f"that is no record of pipeline {name}: {fault}{text}")
        if not found[name].edit(kept.id, kept.letter.payload, payload):
            problem = f"dead letter {kept.id} was changed or requeued meanwhile{text}"
            raise UsageError(problem=problem)
        _remove(left_in)
        if arguments.json:
            say_json({"id": kept.id, "pipeline": name, "edited": True})
        else:
            say(f"dead letter {kept.id} was edited and will be requeued")
        return int(Exit.OK)
    raise UsageError(problem=f"dead letter {arguments.id[0]} has gone")


def _edited(arguments: argparse.Namespace, payload: bytes, *, is_json: bool) -> tuple[bytes, str]:
    """The new payload, and the file that an editor has left it in, or an empty text.

    Raises:
        UsageError: the flags do not fit the record, or the editor failed.
        ConfigError: the file can't be read.
    """
    left_in = ""
    if arguments.set:
        text = with_values(payload, arguments.set)
    elif arguments.input is not None:
        try:
            text = sys.stdin.buffer.read() if arguments.input == "-" else _read(arguments.input)
        except OSError as error:
            problem = f"{arguments.input}: {error.strerror or error}"
            raise ConfigError(problem=problem) from error
    else:
        text, left_in = _from_editor(payload, is_json=is_json)
    if text.endswith(b"\n") and not payload.endswith(b"\n"):
        text = text[:-1].removesuffix(b"\r")  # of the last line, not of the record
    if is_json:
        new = _formatted(text, -1)
        text = payload if new == _formatted(payload, -1) else new
    return text, left_in


def _formatted(payload: bytes, indent: int) -> bytes:
    """JSON in another form; anything else as it is, for the check to name its fault."""
    try:
        return msgspec.json.format(payload, indent=indent)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return payload


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _from_editor(payload: bytes, *, is_json: bool) -> tuple[bytes, str]:
    """The payload as an editor leaves it behind in a private file, and the file."""
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(problem="without a terminal, edit needs --set or --input")
    if is_json:
        payload = _formatted(payload, 2)
    words = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        editor = shlex.split(words) or ["vi"]
    except ValueError as error:
        raise UsageError(problem=f"EDITOR is {words!r}: {error}; nothing was changed") from None
    # In a private folder: many editors put a new file, with a mode of its own, in place of it.
    path = str(
        Path(tempfile.mkdtemp(prefix="ingestd-")) / f"payload.{'json' if is_json else 'txt'}"
    )
    before = payload + (b"" if payload.endswith(b"\n") else b"\n")
    Path(path).write_bytes(before)
    try:
        code = subprocess.call([*editor, path])  # noqa: S603  the operator's own
    except OSError as error:
        _remove(path)
        raise UsageError(problem=f"{editor[0]}: {error.strerror} (set EDITOR)") from error
    if code:
        _remove(path)
        raise UsageError(problem=f"{editor[0]} failed ({code}): nothing was changed")
    try:
        text = _read(path)
    except OSError as error:
        _remove(path)
        gone = f"{editor[0]} has left no {path} ({error.strerror}): nothing was changed"
        raise UsageError(problem=gone) from error
    return (payload if text == before else text), path


def _remove(left_in: str) -> None:
    """Removes the folder that an editor has worked in."""
    if left_in:
        shutil.rmtree(Path(left_in).parent, ignore_errors=True)


def with_values(record: bytes, values: Sequence[tuple[list[str], object]]) -> bytes:
    """A JSON record with values set in it, each at the tokens of its JSON Pointer.

    All other values stay as they are written.

    Raises:
        UsageError: it is no JSON, or a pointer leads through something that has no members.
    """
    for tokens, value in values:
        try:
            record = _with_value(record, tokens, value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(problem=f"--set needs a record that is JSON: {error}") from error
        except (LookupError, ValueError) as error:
            problem = f"--set: there is no place /{'/'.join(tokens)} in the record"
            raise UsageError(problem=problem) from error
    return record


def _with_value(text: bytes, tokens: Sequence[str], value: object) -> bytes:
    """A JSON text with a value at some tokens; a member that is missing is made.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is no JSON.
        LookupError, ValueError: there is no such place.
    """
    if not tokens:
        return msgspec.json.encode(value)
    token, *rest = tokens
    root = msgspec.json.decode(text, type=msgspec.Raw)  # all of it, before a part is looked at
    if bytes(root).lstrip()[:1] == b"[":
        elements = msgspec.json.decode(text, type=list[msgspec.Raw])
        elements[int(token)] = msgspec.Raw(_with_value(elements[int(token)], rest, value))
        return msgspec.json.encode(elements)
    if bytes(root).lstrip()[:1] != b"{":
        raise LookupError(token)
    members = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    inner = members.get(token, msgspec.Raw(b"{}"))
    members[token] = msgspec.Raw(_with_value(inner, rest, value))
    return msgspec.json.encode(members)


def _assignment(written: str) -> tuple[list[str], object]:
    """The tokens of a JSON Pointer, and the value."""
    key, sign, value = written.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{written!r} should be KEY=VALUE")
    tokens = [key]
    if key.startswith("/"):
        tokens = [one.replace("~1", "/").replace("~0", "~") for one in key[1:].split("/")]
    try:
        text = value.encode()
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return tokens, value
    except (UnicodeEncodeError, RecursionError):
        raise argparse.ArgumentTypeError("has a value that is no JSON and no text") from None
    return tokens, msgspec.Raw(text)


def _before(marked: int) -> str:
    more = number_of(marked, "more was", "more were")
    return f", {more} marked before" if marked else ""


def _purge(arguments: argparse.Namespace, found: dict[str, DeadLetters]) -> int:
    chosen = _filter(arguments)
    if chosen.is_open and not arguments.all:
        raise UsageError(problem="purge needs a filter, or --all (see ingestd dead purge --help)")
    there = counted(found, chosen)
    letters = sum(one.letters - one.marked for one in there.values())
    size = sum(one.bytes for one in there.values())
    if (
        letters
        and not arguments.yes
        and not confirmed(f"delete {number_of(letters, 'dead letter')} ({size} bytes)")
    ):
        print("nothing was deleted", file=sys.stderr)
        return int(Exit.USAGE)
    gone = purge(found, chosen, there)
    marked = sum(one.marked for one in there.values())
    if arguments.json:
        say_json({"deleted": gone, "requeued": marked})
        return int(Exit.OK)
    say(f"{number_of(gone, 'dead letter')} deleted")
    if marked:
        staying = number_of(marked, "dead letter is", "dead letters are")
        print(f"{staying} being requeued, and not deleted", file=sys.stderr)
    return int(Exit.OK)
