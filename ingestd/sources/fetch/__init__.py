"""The source `fetch`: lines and events from URLs. Begin with `source.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from ingestd.config.network import check_headers, show_url, split_urls
from ingestd.config.sections import FilePath, Section, Shown, masked
from ingestd.config.units import Count, Seconds, Size, Switch, show_seconds
from ingestd.sources.base import SourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_DAY = 86400.0


def _without_secrets(urls: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(show_url(url) for url in urls)


class FetchSettings(Section):
    """`[fetch]`: URLs to download, waits and bounds."""

    urls: Annotated[tuple[str, ...], BeforeValidator(split_urls), Shown(_without_secrets)] = Field(
        (), description="http and https URLs to download"
    )
    file: FilePath = Field(
        "", description="file of URLs, one a line, # comments; - is standard input"
    )
    follow: Switch = Field(
        False, description="treat URLs as endless streams: connect again when one ends"
    )
    every: Seconds = Field(
        0.0, ge=0, le=366 * _DAY, description="interval of repeated downloads; 0s downloads once"
    )
    headers: Annotated[dict[str, str], BeforeValidator(check_headers), Shown(masked)] = Field(
        default_factory=dict, description="request headers, sent to the origins of the URLs only"
    )
    concurrency: Count = Field(4, ge=1, le=1024, description="maximum of concurrent downloads")
    concurrency_per_host: Count = Field(
        2, ge=1, le=1024, description="maximum of concurrent downloads from one host"
    )
    inflight_bytes_max: Size = Field(
        16 * _MIB,
        ge=1,
        le=_TIB,
        description="bound of bytes read but not committed, all URLs together; then reading waits",
    )
    response_bytes_max: Size = Field(
        64 * _GIB, ge=1, le=1024 * _TIB, description="largest body before decompression"
    )
    decompressed_bytes_max: Size = Field(
        256 * _GIB, ge=1, le=1024 * _TIB, description="largest body after decompression"
    )
    window_max: Size = Field(
        8 * _MIB,
        ge=1024,
        le=2 * _GIB,
        description="largest window of a zstd file; --long and --ultra -22 make 128MiB",
    )
    connect_timeout: Seconds = Field(
        10.0, gt=0, le=3600, description="timeout of connecting, TLS included"
    )
    silence_timeout: Seconds = Field(
        60.0, gt=0, le=_DAY, description="timeout without any byte; then the connection is closed"
    )
    redirects_max: Count = Field(10, ge=0, le=100, description="maximum of redirects in a row")
    attempts_max: Count = Field(
        8, ge=1, le=10**6, description="maximum of tries without progress; then the URL is given up"
    )
    backoff: Seconds = Field(
        0.5, ge=0, le=_DAY, description="wait before the second try; doubles with each further one"
    )
    backoff_max: Seconds = Field(60.0, ge=0, le=_DAY, description="longest wait between tries")
    retry_after_max: Seconds = Field(
        300.0, ge=0, le=_DAY, description="longest wait for a server's Retry-After"
    )
    allow_private: Switch = Field(
        False, description="allow connections to private, loopback and other special addresses"
    )
    trust_env: Switch = Field(
        False, description="use the proxies of the environment (http_proxy, …)"
    )


def problems_of(fetch: FetchSettings, *, runs: bool) -> Iterator[tuple[str, str]]:
    """Finds settings that cannot work together: (key below `fetch`, what is wrong) for each.

    Args:
        fetch: the section.
        runs: the source runs, so it needs a URL.
    """
    if runs and not (fetch.urls or fetch.file):
        yield "urls", "no URL: list some here, or name a file of them in fetch.file"
    if fetch.follow and fetch.every:
        yield "every", "a stream that is followed (fetch.follow) has no end"
    if fetch.backoff_max < fetch.backoff:
        longest, first = show_seconds(fetch.backoff_max), show_seconds(fetch.backoff)
        yield "backoff_max", f"{longest} is shorter than fetch.backoff ({first})"


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
