"""Settings that all sources over TCP have: addresses, bounds, deadlines, TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, Field

from ingestd.config.network import is_loopback, split_address
from ingestd.config.sections import Reloadable, Section
from ingestd.config.units import Count, Seconds, Share, Size, Words
from ingestd.http.settings import TlsSettings, problems_of_tls
from ingestd.sources.base import SourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format

_DAY = 86400.0
_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
TCP, TLS, UDP = "tcp", "tls", "udp"


class ListenAddress(NamedTuple):
    """One address of `listen`.

    Attributes:
        transport: `tcp`, `tls` or `udp`.
        text: `HOST:PORT`.
    """

    transport: str
    text: str


def parse_listen_address(word: str) -> ListenAddress:
    """Reads `HOST:PORT`, with `tcp://`, `tls://` or `udp://` before it or without, which is TCP.

    Raises:
        ValueError: it is none; the message says what is.
    """
    scheme, mark, rest = word.partition("://")
    if not mark:
        scheme, rest = TCP, word
    if scheme not in (TCP, TLS, UDP):
        raise ValueError(f"{word[:80]!r} should begin with tcp://, tls:// or udp://")
    split_address(rest)
    return ListenAddress(scheme, rest)


def _check_listen(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        parse_listen_address(word)
    return words


ListenAddresses = Annotated[Words, AfterValidator(_check_listen)]
"""The type of `listen`."""


class TcpSettings(Section):
    """The part of a section that all sources over TCP have."""

    listen: ListenAddresses = Field(
        (), min_length=1, max_length=64, description="listen addresses: [tcp|tls]://HOST:PORT"
    )
    connections_max: Count = Field(
        1024, ge=1, le=1_000_000, description="maximum of open connections"
    )
    inflight_bytes_max: Size = Field(
        32 * _MIB,
        ge=1,
        le=_TIB,
        description="bound of bytes read but not committed; then reading waits",
    )
    client_share: Share = Field(
        0.5,
        gt=0,
        le=1,
        description="share of connections and bytes in flight of one client while others wait",
    )
    idle_timeout: Seconds = Field(
        3600.0, gt=0, le=366 * _DAY, description="timeout of connections that send nothing"
    )
    frame_timeout: Seconds = Field(
        30.0, gt=0, le=_DAY, description="timeout of reading a message that was begun"
    )
    frame_rate_min: Size = Field(
        1024,
        ge=0,
        le=_GIB,
        description="minimum rate of a message that was begun, bytes per second; 0: no bound",
    )
    allow_anonymous: bool = Field(
        False, description="accept clients without a certificate, also on a public address"
    )
    tls: Annotated[TlsSettings, Reloadable()] = TlsSettings()

    @property
    def demands_proof(self) -> bool:
        """Tells if the protocol itself authenticates its clients."""
        return False

    def addresses(self, *transports: str) -> list[str]:
        """`HOST:PORT` of the addresses with one of some transports."""
        found = map(parse_listen_address, self.listen)
        return [one.text for one in found if one.transport in transports]


class TcpSourceKind(SourceKind):
    """Base class of kinds of sources over TCP. A subclass has `settings` and `source`.

    Attributes:
        table: the name of the kind, and of its table.
        transports: of `listen`.
        formats: of pipelines that its records can go to; empty for all.
        proof: advice to one that every client could reach.
    """

    proof: ClassVar[str] = "require certificates"
    settings: ClassVar[type[Section]] = TcpSettings
    table: ClassVar[str]
    transports: ClassVar[Sequence[str]] = (TCP, TLS)
    formats: ClassVar[Sequence[Format]] = ()
    listens = True

    def addresses(self, settings: TcpSettings) -> Sequence[str]:
        """See `SourceKind`."""
        return settings.addresses(TCP, TLS)

    def problems(
        self,
        settings: Any,
        *,
        formats: Mapping[str, str],
        default: str,
        runs: bool,
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        own: TcpSettings = settings
        for key, text in problems_of_tls(own.tls, f"{self.table}.tls"):
            yield f"tls.{key}", text
        for address in map(parse_listen_address, own.listen):
            if address.transport not in self.transports:
                yield "listen", f"{self.table} has no {address.transport}://"
            if address.transport == TLS and not own.tls.certificate:
                yield "listen", f"tls://{address.text} needs {self.table}.tls.certificate"
            elif runs and (text := self.at_large(own, address)):
                yield "listen", f"{address.text} {text}"
        if runs and self.formats and formats.get(default, self.formats[0]) not in self.formats:
            takes = " or ".join(self.formats)
            problem = f"{default!r} has the format {formats[default]}; records of"
            yield "pipeline", f"{problem} {self.table} are {takes}"

    def at_large(self, settings: TcpSettings, address: ListenAddress) -> str:
        """Explains an address that is open to all clients without a setting; empty if not."""
        shows = address.transport == TLS and settings.tls.client_required
        proof = shows or settings.demands_proof
        if settings.allow_anonymous or proof or is_loopback(address.text):
            return ""
        return (
            f"is reachable from other machines, and every client could send; {self.proof}"
            f" ({self.table}.tls.client_ca and {self.table}.tls.client_required, on tls://), or set"
            f" {self.table}.allow_anonymous = true"
        )

    def check(
        self,
        settings: TcpSettings,
        formats: Mapping[str, Format],  # noqa: ARG002
        default: str,  # noqa: ARG002
    ) -> Sequence[str]:
        """See `SourceKind`."""
        from ingestd.http.tls import read_tls  # noqa: PLC0415  the server's

        return read_tls(settings.tls, f"{self.table}.tls").doubts
