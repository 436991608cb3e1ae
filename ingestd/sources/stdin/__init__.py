"""The source `stdin`: lines from standard input. Begin with `source.py`."""

from __future__ import annotations

from pydantic import Field

from ingestd.config.sections import Section
from ingestd.config.units import Size  # noqa: TC001  pydantic reads it
from ingestd.sources.base import SourceKind

_MIB = 1024**2
_TIB = 1024**4


class StdinSettings(Section):
    """`[stdin]`: bounds of standard input."""

    inflight_bytes_max: Size = Field(
        16 * _MIB,
        ge=1,
        le=_TIB,
        description="bound of bytes read but not committed; then reading waits",
    )


class StdinSourceKind(SourceKind):
    """`kind = "stdin"`."""

    settings = StdinSettings
    block_bytes = 1024**2
    source = "ingestd.sources.stdin.source:StdinSource"

    def reads_input(self, settings: StdinSettings) -> bool:  # noqa: ARG002
        """See `SourceKind`."""
        return True
