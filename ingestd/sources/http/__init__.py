"""The source `http` accepts records over HTTP. Begin with `source.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.http.settings import HttpSettings, has_one_principal, problems_of, signatures_valid
from ingestd.sources.base import KeyNeeds, SourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.base import Source, SourceContext


class HttpSourceKind(SourceKind):
    """`kind = "http"`."""

    settings = HttpSettings
    listens = True
    feeds_all = True
    stored_whole = ("request_bytes_max", "decompressed_bytes_max")

    def problems(
        self, settings: HttpSettings, *, formats: Mapping[str, str], default: str, runs: bool
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        if runs:
            yield from problems_of(settings, formats, default)

    def keys(self, settings: HttpSettings) -> KeyNeeds:
        """See `SourceKind`."""
        return KeyNeeds(
            settings.idempotency_ttl,
            settings.idempotency_keys_max,
            signatures_valid(settings),
            shared=not has_one_principal(settings),
        )

    def check(
        self, settings: HttpSettings, formats: Mapping[str, Format], default: str
    ) -> Sequence[str]:
        """See `SourceKind`."""
        from ingestd.sources.http.access import read_access  # noqa: PLC0415  the server's, large

        return read_access(settings, formats, default).doubts

    def build(self, settings: HttpSettings, context: SourceContext) -> Source:
        """See `SourceKind`."""
        from ingestd.sources.http.source import HttpSource  # noqa: PLC0415  the server is large

        return HttpSource(
            settings,
            context.pipelines,
            default=context.pipeline,
            on_request=context.on_request,
            sockets=context.sockets,
        )
