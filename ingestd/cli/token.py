"""`ingestd token` makes an access token, or the hash of one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ingestd.base.errors import Exit, UsageError
from ingestd.cli.output import add_json, say, say_json
from ingestd.http.credentials import hash_of, make_token

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

DESCRIPTION = """\
Prints a new random token to stdout, and to stderr its hash and how to use both.
With --hash it reads a token from stdin, one line, and prints its hash to stdout.

The token is for the client. The daemon needs only the hash (http.tokens.NAME.hash, or
admin.tokens.NAME.hash)."""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the flag."""
    parser.set_defaults(leaf=parser)
    parser.add_argument("--hash", action="store_true", help="hash the token on stdin")
    add_json(parser, "print one JSON object with the token and its hash to stdout")


def execute(arguments: argparse.Namespace) -> int:
    """Prints a token or a hash.

    Raises:
        UsageError: what is on stdin is no token.
    """
    if arguments.hash:
        hashed = _hash(sys.stdin.readline(4096).strip())
        if arguments.json:
            say_json({"hash": hashed})
        else:
            say(hashed)
        return int(Exit.OK)
    token = make_token()
    if arguments.json:
        say_json({"token": token, "hash": hash_of(token)})
        return int(Exit.OK)
    say(token)
    for line in (
        hash_of(token),
        "",
        "The line on stdout is the token, and is shown only now. The daemon gets the hash:",
        f"  --http.tokens.NAME.hash {hash_of(token)}",
        "or, for the console and the API of the admin address:",
        f"  --admin.tokens.NAME.hash {hash_of(token)} --admin.tokens.NAME.role admin",
        "and the client sends:",
        "  Authorization: Bearer TOKEN",
    ):
        print(line, file=sys.stderr)
    return int(Exit.OK)


def _hash(token: str) -> str:
    try:
        return hash_of(token)
    except ValueError as error:
        raise UsageError(problem=f"the token on stdin {error}") from None
