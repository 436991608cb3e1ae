"""`ingestd init [DIR]` writes a small project: handler, settings, tests, deployment files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.errors import Exit, UsageError
from ingestd.cli.output import add_json, say, say_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ingestd.cli.output import Parser

PROJECT = Path(__file__).with_name("project")
FILES = {
    "app.py": "the handler: a class, with the type of its records",
    "test_app.py": "its tests: python -m pytest",
    "ingestd.toml": "settings, which run and check find here",
    "Dockerfile": "an image with the handler",
    "compose.yaml": "that image, for docker compose",
    "ingestd.service.d/app.conf": "for systemd",
}
"""Paths in the project, each from `project/PATH.txt`, and what they are."""

DESCRIPTION = f"""\
Writes a small project to DIR, else to the current folder: {", ".join(FILES)}.
Files that are there already are an error, and then nothing is written."""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:  # noqa: ARG001 - as all commands
    """Adds the folder."""
    parser.set_defaults(leaf=parser)
    add_json(parser)
    parser.add_argument("folder", metavar="DIR", nargs="?", default=".", help="folder; is made")


def execute(arguments: argparse.Namespace) -> int:
    """Writes all files, or none.

    Raises:
        UsageError: one is there already, or the folder cannot be written.
    """
    folder = Path(arguments.folder)
    there = [name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if there:
        raise UsageError(problem=f"{folder}: there is {', '.join(there)}; nothing was written")
    from ingestd import __version__  # noqa: PLC0415  reading it takes as long as the rest

    written: list[Path] = []
    try:
        for name in FILES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = (PROJECT / f"{name}.txt").read_text().replace("VERSION", __version__)
            with path.open("x") as file:  # nothing that came meanwhile is overwritten
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        where = error.filename or folder
        raise UsageError(problem=f"{where}: {error.strerror}; nothing was written") from error
    if arguments.json:
        files = zip(written, FILES.values(), strict=True)
        say_json({"files": [{"path": str(path), "is": what} for path, what in files]})
        return int(Exit.OK)
    width = max(len(str(path)) for path in written)
    for path, what in zip(written, FILES.values(), strict=True):
        say(f"{path!s:<{width}}  {what}")
    go = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    say(f"\nnext: {go}ingestd dev")
    return int(Exit.OK)
