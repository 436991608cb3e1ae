"""`ingestd peek` prints pending records, without taking them."""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.clock import shown
from ingestd.base.envelope import facts_of
from ingestd.base.errors import Exit
from ingestd.cli.arguments import add_data_dir, add_where, positive
from ingestd.cli.configured import configured
from ingestd.cli.lines import write_lines
from ingestd.cli.output import number_of
from ingestd.codecs.pointer import Where
from ingestd.journal.build import stored_journals
from ingestd.journal.handling import payload_fields

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ingestd.journal.sqlite.check import SqliteFile
    from ingestd.journal.sqlite.offline import PendingRecord

DESCRIPTION = """\
Prints the records that are accepted and not yet settled, one a line, oldest first: those of sealed
batches, then the others. It reads the journal, with or without a running daemon, and takes and
changes nothing. A record that is JSON is printed as it is, on one line; any other one as a JSON
string, or as an object with payload_base64 if it is no UTF-8.

exit codes: 0 done; 1 some records can't be read; 2 usage; 78 configuration, or no journal"""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the flags."""
    parser.set_defaults(leaf=parser)
    parser.add_argument(
        "pipeline", nargs="?", metavar="PIPELINE", help="only this one; all without it"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="stop after so many records")
    add_where(parser)
    parser.add_argument(
        "--json", "--envelope", action="store_true",
        help="an object a record: id, accepted_at, batch and its attempts, envelope, payload",
    )  # fmt: skip
    add_data_dir(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Prints the records; returns the exit code.

    Raises:
        IngestdError: a journal can't be read; the message is one line.
    """
    settings = configured(arguments).settings
    only = [arguments.pipeline] if arguments.pipeline else []
    where, damaged = Where(arguments.where), list[str]()
    records = _records(stored_journals(settings.data_dir, only), where, damaged)
    write_lines(
        as_object(name, one) if arguments.json else as_record(one.payload or b"")
        for name, one in islice(records, arguments.limit)
    )
    if damaged:
        unread = number_of(len(damaged), "record")
        print(f"{unread} can't be read (ingestd journal verify)", file=sys.stderr)
    return int(Exit.UNEXPECTED if damaged else Exit.OK)


def _records(
    journals: dict[str, SqliteFile], where: Where, damaged: list[str]
) -> Iterator[tuple[str, PendingRecord]]:
    for name, journal in journals.items():
        for record in journal.pending():
            if record.payload is None:
                damaged.append(record.id)
            elif where.holds(record.payload):
                yield name, record


def as_record(payload: bytes) -> bytes:
    """A record as one line of JSON."""
    fields = payload_fields(payload)
    try:
        is_json = "payload" in fields and bool(msgspec.json.decode(payload, type=msgspec.Raw))
    except (msgspec.DecodeError, RecursionError):
        is_json = False
    if not is_json:
        return msgspec.json.encode(fields.get("payload", fields)) + b"\n"
    if b"\n" in payload or b"\r" in payload:  # between its tokens: within a text they are escaped
        payload = msgspec.json.format(payload, indent=-1)
    return payload + b"\n"


def as_object(pipeline: str, record: PendingRecord) -> bytes:
    """A record with all that is known of it, as one line of JSON."""
    facts: dict[str, object] = {
        "pipeline": pipeline,
        "id": record.id,
        "accepted_at": shown(record.accepted_at),
        "batch": record.batch,
        "attempts": record.attempts,
        "envelope": facts_of(record.envelope),
        **payload_fields(record.payload or b""),
    }
    return msgspec.json.encode(facts) + b"\n"
