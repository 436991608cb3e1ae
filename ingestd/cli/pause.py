"""`ingestd pause` and `ingestd resume` stop and start the dispatch of pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.clock import shown
from ingestd.base.errors import DataDirError, Exit, UsageError
from ingestd.cli.arguments import add_data_dir
from ingestd.cli.configured import configured
from ingestd.cli.output import add_json, say, say_json
from ingestd.execution.dispatch_control import PauseMark
from ingestd.host.data_dir import pipeline_folder

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from ingestd.settings import Settings

DESCRIPTION = """\
A paused pipeline accepts records, and gives no batch to its handler until it is resumed; batches
that a worker has already are finished. It stays paused through restarts of the daemon. Works with
or without a running daemon, which takes it up within a second.

exit codes: 0 done; 1 unexpected; 2 usage; 78 configuration, or no data directory"""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the names of pipelines and the location."""
    parser.set_defaults(leaf=parser)
    parser.add_argument(
        "pipelines", nargs="*", default=[], metavar="PIPELINE", help="only these; else all"
    )
    add_json(parser, "a JSON line for each pipeline")
    add_data_dir(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Pauses or resumes pipelines, and prints a line for each.

    Raises:
        UsageError: there is no pipeline of that name.
        DataDirError: the data directory can't be used.
    """
    found = _folders(configured(arguments).settings, arguments.pipelines)
    for name, folder in found.items():
        mark = PauseMark(folder)
        try:
            since = mark.since()
        except OSError as error:
            raise DataDirError(path=folder, problem=error.strerror or error) from error
        is_pause = arguments.command == "pause"
        if is_pause:
            mark.put()
        else:
            mark.remove()
        if arguments.json:
            at = shown(since) if since else None
            say_json({"pipeline": name, "paused": is_pause, "was_paused_since": at})
        elif is_pause:
            say(f"{name}: was paused already, since {shown(since)}" if since else f"{name}: paused")
        else:
            say(f"{name}: resumed" if since else f"{name}: was not paused")
    return int(Exit.OK)


def _folders(settings: Settings, named: Sequence[str]) -> dict[str, Path]:
    """The folders of the pipelines that are named, or of all.

    Raises:
        UsageError: there is no pipeline of that name.
        DataDirError: one of them has no folder yet.
    """
    data_dir = settings.data_dir
    known = dict.fromkeys(settings.pipeline_settings())
    known |= dict.fromkeys(path.name for path in sorted(data_dir.glob("pipelines/*/")))
    for name in named:
        if name not in known:
            raise UsageError(
                problem=f"there is no pipeline {name!r}; there are: {', '.join(known)}"
            )
    folders = {name: pipeline_folder(data_dir, name) for name in named or known}
    if not named:
        folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    for name in named:
        if not folders[name].is_dir():
            problem = f"there is nothing of pipeline {name!r} in it: no daemon has run with it"
            raise DataDirError(path=data_dir, problem=problem)
    if not folders:
        raise DataDirError(path=data_dir, problem="there is no such folder")
    return folders
