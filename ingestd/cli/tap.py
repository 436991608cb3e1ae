"""`ingestd tap` prints records as they pass through a running daemon."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from ingestd.base.errors import Exit
from ingestd.cli.arguments import add_where, positive
from ingestd.cli.healthcheck import AdminClient, add_admin_client
from ingestd.cli.output import add_json, fail, number_of, put

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DESCRIPTION = """\
Prints records as they pass a stage, as one JSON object a line, until --limit or Ctrl-C. It never
slows the pipeline: it looks at what it has time for, and says on stderr how many records it passed
over. It asks the daemon at admin.listen; beyond a loopback address that takes a token with the role
admin, and admin.payloads = "always".

exit codes: 0 done; 1 no answer, refused, or the daemon has ended it; 2 usage; 78 configuration"""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the flags."""
    parser.set_defaults(leaf=parser)
    parser.add_argument(
        "pipeline", nargs="?", metavar="PIPELINE", help="only this one; all without it"
    )
    parser.add_argument(
        "--stage", choices=("accepted", "processed", "dead"), default="accepted",
        help="accepted: durable; processed: the handler is done; dead: given up [accepted]",
    )  # fmt: skip
    add_where(parser)
    parser.add_argument(
        "--sample", type=_share, metavar="PART", help="only this part of them: 0.01, or 1%%"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="stop after so many records")
    add_json(parser, "JSON lines, as without it")
    add_admin_client(parser)


def _share(written: str) -> float:
    try:
        number = float(written.removesuffix("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{written!r} is not a number") from None
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("should be above 0 and at most 1")
    return number


def execute(arguments: argparse.Namespace) -> int:
    """Prints the records; returns the exit code.

    Raises:
        IngestdError: there is no answer, or it was refused; the message is one line.
    """
    query: list[tuple[str, object]] = [("stage", arguments.stage)]
    query += [("where", condition) for condition in arguments.where]
    for name in ("pipeline", "sample", "limit"):
        if getattr(arguments, name) is not None:
            query.append((name, getattr(arguments, name)))
    answer = AdminClient(arguments).get(f"/v1/tap?{_encoded(query)}", streams=True)
    ended: list[str] = []
    try:
        for line in _lines(answer, arguments.limit, ended):
            if not put(line):
                break
    except KeyboardInterrupt:
        return int(Exit.OK)
    if ended:
        fail(ended[0])
    return int(Exit.UNEXPECTED if ended else Exit.OK)


def _encoded(query: Sequence[tuple[str, object]]) -> str:
    """The query of a URL; a name in another encoding than the locale's is one that is unknown."""
    return urlencode(query, errors="replace")


def _lines(
    answer: http.client.HTTPResponse, limit: int | None, ended: list[str]
) -> Iterator[bytes]:
    """The lines of the records; what is said about the tap itself goes to stderr."""
    shown, why = 0, "the daemon has ended the tap"
    try:
        while shown != limit and (line := answer.readline()):
            if line.startswith(b'{"lost":'):
                lost = json.loads(line)["lost"]
                passed = number_of(lost, "record has passed", "records have passed")
                print(f"{passed} without a look", file=sys.stderr)
                continue
            if line == b"\n":
                continue
            shown += 1
            yield line
    except (OSError, http.client.HTTPException) as error:
        why = f"{why}: {error or type(error).__name__}"
    if shown != limit:
        ended.append(why)
