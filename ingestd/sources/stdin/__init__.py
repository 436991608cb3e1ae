"""The source `stdin`: lines from standard input. Begin with `source.py`."""

from __future__ import annotations

from ingestd.sources.base import SourceKind
from ingestd.sources.stdin.settings import StdinSettings


class StdinSourceKind(SourceKind):
    """`kind = "stdin"`."""

    settings = StdinSettings
    block_bytes = 1024**2
    source = "ingestd.sources.stdin.source:StdinSource"

    def reads_input(self, settings: StdinSettings) -> bool:  # noqa: ARG002
        """See `SourceKind`."""
        return True
