"""The source `fetch`: lines and events from URLs. Begin with `source.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.sources.base import SourceKind
from ingestd.sources.fetch.settings import FetchSettings, problems_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class FetchSourceKind(SourceKind):
    """`kind = "fetch"`."""

    settings = FetchSettings
    block_bytes = 4 * 1024**2
    source = "ingestd.sources.fetch.source:FetchSource"

    def problems(
        self,
        settings: FetchSettings,
        *,
        formats: Mapping[str, str],  # noqa: ARG002
        default: str,  # noqa: ARG002
        runs: bool,
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        return problems_of(settings, runs=runs)

    def reads_input(self, settings: FetchSettings) -> bool:
        """See `SourceKind`."""
        return settings.file == "-"
