"""Settings of standard input."""

from __future__ import annotations

from pydantic import Field

from ingestd.config.sections import Section
from ingestd.config.units import Size  # noqa: TC001  pydantic reads it

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
