"""The source `stdin`: lines from standard input. Begin with `source.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.sources.base import SourceKind
from ingestd.sources.stdin.settings import StdinSettings

if TYPE_CHECKING:
    from ingestd.sources.base import Source, SourceContext


class StdinSourceKind(SourceKind):
    """`kind = "stdin"`."""

    settings = StdinSettings
    block_bytes = 1024**2

    def reads_input(self, settings: StdinSettings) -> bool:  # noqa: ARG002
        """See `SourceKind`."""
        return True

    def build(self, settings: StdinSettings, context: SourceContext) -> Source:
        """See `SourceKind`."""
        from ingestd.sources.stdin.source import StdinSource  # noqa: PLC0415  not for --help

        return StdinSource(
            settings,
            context.pipelines[context.pipeline],
            name=context.name,
            fd=context.input_fd,
            stderr=context.stderr,
            is_interrupted=context.is_interrupted,
        )
