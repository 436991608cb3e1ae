"""Settings of the fetch source: what is downloaded, how, and its bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from ingestd.config.network import check_headers, split_urls
from ingestd.config.sections import FilePath, Section
from ingestd.config.units import Count, Seconds, Size, Switch, show_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_DAY = 86400.0


class FetchSettings(Section):
    """`[fetch]`: what is downloaded, how, and its bounds."""

    urls: Annotated[tuple[str, ...], BeforeValidator(split_urls)] = Field(
        (), description="what to download: http and https URLs"
    )
    file: FilePath = Field(
        "", description="a file of URLs, one a line, # comments; - is standard input"
    )
    follow: Switch = Field(
        False, description="the URLs are streams without an end: connect again when one ends"
    )
    every: Seconds = Field(
        0.0, ge=0, le=366 * _DAY, description="ask each URL again after this; 0s downloads once"
    )
    headers: Annotated[dict[str, str], BeforeValidator(check_headers)] = Field(
        default_factory=dict, description="sent to the origins of the URLs only"
    )
    concurrency: Count = Field(4, ge=1, le=1024, description="most downloads at once")
    concurrency_per_host: Count = Field(
        2, ge=1, le=1024, description="most downloads at once from one host"
    )
    inflight_bytes_max: Size = Field(
        16 * _MIB,
        ge=1,
        le=_TIB,
        description="decompressed but not yet committed, all URLs together; then reading waits",
    )
    wire_bytes_max: Size = Field(
        64 * _GIB, ge=1, le=1024 * _TIB, description="largest body as it is sent"
    )
    bytes_max: Size = Field(
        256 * _GIB, ge=1, le=1024 * _TIB, description="largest body after decompression"
    )
    window_max: Size = Field(
        8 * _MIB,
        ge=1024,
        le=2 * _GIB,
        description="largest window of a zstd file; --long and --ultra -22 make 128MiB",
    )
    connect_timeout: Seconds = Field(
        10.0, gt=0, le=3600, description="a connection has to be there after this, TLS included"
    )
    silence_timeout: Seconds = Field(
        60.0, gt=0, le=_DAY, description="without a byte for this long it is given up"
    )
    redirects_max: Count = Field(10, ge=0, le=100, description="most redirects in a row")
    attempts_max: Count = Field(
        8, ge=1, le=10**6, description="tries without progress; then the URL is given up"
    )
    backoff: Seconds = Field(
        0.5, ge=0, le=_DAY, description="wait before the second try; doubles with each"
    )
    backoff_max: Seconds = Field(60.0, ge=0, le=_DAY, description="longest wait")
    retry_after_max: Seconds = Field(
        300.0, ge=0, le=_DAY, description="longest wait that a server's Retry-After is given"
    )
    allow_private: Switch = Field(
        False, description="connect to private, loopback and other special addresses, too"
    )
    trust_env: Switch = Field(
        False, description="use the proxies that the environment names (http_proxy, …)"
    )


def problems_of(fetch: FetchSettings, *, runs: bool) -> Iterator[tuple[str, str]]:
    """Finds settings that cannot work together: (key below `fetch`, what is wrong) for each.

    Args:
        fetch: the section.
        runs: whether the source runs, so that it needs a URL.
    """
    if runs and not (fetch.urls or fetch.file):
        yield "urls", "no URL: say some here, or name a file of them in fetch.file"
    if fetch.follow and fetch.every:
        yield "every", "a stream that is followed (fetch.follow) has no end"
    if fetch.backoff_max < fetch.backoff:
        longest, first = show_seconds(fetch.backoff_max), show_seconds(fetch.backoff)
        yield "backoff_max", f"{longest} is shorter than fetch.backoff ({first})"
