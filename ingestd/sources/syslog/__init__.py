"""The source `syslog`: messages over UDP, TCP and TLS. Begin with `codec.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field

from ingestd.config.units import Size  # noqa: TC001  pydantic reads it
from ingestd.sources.tcp.settings import (
    TCP,
    TLS,
    UDP,
    ListenAddresses,
    TcpSettings,
    TcpSourceKind,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MIB = 1024**2
_GIB = 1024**3


def _check_zone(name: str) -> str:
    try:
        if name:
            ZoneInfo(name)
    except (ValueError, OSError, LookupError):
        raise ValueError(f"{name[:80]!r} is no time zone that this machine knows") from None
    return name


class SyslogSettings(TcpSettings):
    """`[syslog]`: addresses and bounds of the source `syslog`."""

    listen: ListenAddresses = Field(
        ("tcp://127.0.0.1:5514", "udp://127.0.0.1:5514"),
        min_length=1,
        max_length=64,
        description="listen addresses: tcp://, tls:// or udp://HOST:PORT",
    )
    records: Literal["parsed", "raw"] = Field(
        "parsed", description="parsed: JSON objects; raw: messages as they came, for text pipelines"
    )
    timezone: Annotated[str, AfterValidator(_check_zone)] = Field(
        "", description="time zone of timestamps that name none; empty: that of this machine"
    )
    udp_buffer: Size = Field(
        4 * _MIB, ge=4096, le=_GIB, description="receive buffer in the kernel of each UDP address"
    )
    udp_queue_bytes_max: Size = Field(
        16 * _MIB,
        ge=65536,
        le=64 * _GIB,
        description="bound of datagrams read but not committed; then new ones are dropped",
    )


class SyslogSourceKind(TcpSourceKind):
    """`kind = "syslog"`."""

    settings = SyslogSettings
    table = "syslog"
    transports = (TCP, TLS, UDP)
    block_bytes = 4 * _MIB
    source = "ingestd.sources.syslog.source:SyslogSource"

    def problems(
        self, settings: Any, *, formats: Mapping[str, str], default: str, runs: bool
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        yield from super().problems(settings, formats=formats, default=default, runs=runs)
        form = formats.get(default, "json")
        fitting = "json" if settings.records == "parsed" else "text"
        if runs and form not in (fitting, "json" if fitting == "json" else "bytes"):
            text = f"{settings.records} records are {fitting}; {default!r} has the format {form}"
            yield "records", text
