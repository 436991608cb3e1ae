"""`ingestd run [HANDLER]` runs the daemon."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ingestd.cli.arguments import add_settings as add_arguments
from ingestd.cli.configured import Configuration
from ingestd.host.process import (
    ignore_hangups,
    move_input,
    occupy_standard_streams,
    split_off,
)
from ingestd.host.systemd import Notifier, take_sockets

if TYPE_CHECKING:
    import argparse

    from ingestd.settings import Settings

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """\
Accepts records, writes them to disk, and hands them to HANDLER in batches.

HANDLER is module:name (the current folder is importable) or the name of a sink; without one,
records go to files in the data directory (the sink jsonl).

exit codes: 0 drained, or the rest is safe in the journal; 1 unexpected; 2 usage;
65 no record of an input was accepted, or none processed;
75 accepted records were lost or the journal failed; 78 configuration"""


def execute(arguments: argparse.Namespace) -> int:
    """Runs until the daemon has drained; returns its exit code."""
    # Both are for this process, by its id: before process 1 of a container forks.
    notifier, passed = Notifier.take(os.environ), take_sockets(os.environ)
    split_off()
    ignore_hangups()
    occupy_standard_streams()
    configuration = Configuration(arguments)
    loaded = configuration.load()
    settings = loaded.settings
    from ingestd.daemon import serve  # noqa: PLC0415  help and check need none of it

    def again(running: Settings) -> Settings:
        return configuration.load(running).settings

    # Where no source reads standard input a handler in a thread may have it.
    input_fd = move_input() if any(one.reads_input for one in settings.running_sources()) else 0
    return serve(
        settings,
        again=again,
        effective=configuration.effective,
        config=str(loaded.file or ""),
        notifier=notifier,
        passed=passed,
        input_fd=input_fd,
    )
