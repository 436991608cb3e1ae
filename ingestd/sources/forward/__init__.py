"""The source `forward`: Fluentd's protocol over TCP and TLS. Begin with `codec.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, SecretStr

from ingestd.config.sections import FilePath, Secret, Section, own_name
from ingestd.config.units import Count, Seconds, Size, show_size
from ingestd.sources.base import KeyNeeds
from ingestd.sources.tcp.settings import ListenAddresses, TcpSettings, TcpSourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.base import Source, SourceContext

_DAY = 86400.0
_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_UNSET = SecretStr("")


class ForwardUserSettings(Section):
    """`[forward.users.NAME]`: a user that may send, beside the shared key."""

    EXAMPLE = ("shop", ("file",))

    password: Secret = Field(_UNSET, description="password of the user")
    file: FilePath = Field("", description="file of passwords, one a line; each is accepted")


UserName = Annotated[str, AfterValidator(lambda name: own_name(name, "a user"))]


class ForwardSettings(TcpSettings):
    """`[forward]`: addresses and bounds of the source `forward`."""

    listen: ListenAddresses = Field(
        ("tcp://127.0.0.1:24224",),
        min_length=1,
        max_length=64,
        description="listen addresses: tcp:// or tls://HOST:PORT",
    )
    shared_key: Secret = Field(_UNSET, description="shared key of the handshake")
    shared_key_file: FilePath = Field(
        "", description="file of shared keys, one a line; each is accepted"
    )
    users: dict[UserName, ForwardUserSettings] = Field(
        default_factory=dict, max_length=1000, description="users of the handshake, by name"
    )
    hostname: str = Field(
        "ingestd", min_length=1, max_length=255, description="name in the handshake"
    )
    inflight_bytes_max: Size = Field(
        40 * _MIB,
        ge=1,
        le=_TIB,
        description="bound of bytes read but not committed; then reading waits",
    )
    message_bytes_max: Size = Field(
        9 * _MIB, ge=1024, le=_GIB, description="largest message before decompression"
    )
    decompressed_bytes_max: Size = Field(
        15 * _MIB, ge=1024, le=_GIB, description="largest message after decompression, and as JSON"
    )
    # Equal lines within a second are 250 times their size in gzip, and 5,000 in zstd; and a client
    # sends what is refused again. What it takes is bounded by `decompressed_bytes_max` as well.
    inflate_ratio_max: Count = Field(
        0, ge=0, le=10**6, description="largest compression ratio beyond 1 MiB; 0: no bound"
    )
    records_max: Count = Field(
        100_000, ge=1, le=10**8, description="maximum of records in a message"
    )
    idempotency_ttl: Seconds = Field(
        3600.0, gt=0, le=366 * _DAY, description="lifetime of the id of a chunk"
    )
    idempotency_keys_max: Count = Field(
        1_000_000, ge=1, le=10**9, description="maximum of stored ids of chunks per pipeline"
    )

    @property
    def demands_proof(self) -> bool:
        """See `TcpSettings`."""
        return bool(self.shared_key.get_secret_value() or self.shared_key_file)


class ForwardSourceKind(TcpSourceKind):
    """`kind = "forward"`."""

    settings = ForwardSettings
    table = "forward"
    formats = ("json",)
    proof = "set forward.shared_key, require certificates"
    stored_whole = ("decompressed_bytes_max",)

    def problems(
        self, settings: Any, *, formats: Mapping[str, str], default: str, runs: bool
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        yield from super().problems(settings, formats=formats, default=default, runs=runs)
        if settings.users and not settings.demands_proof:
            yield "users", "users need a shared key: set forward.shared_key or its file"
        for name, user in settings.users.items():
            if not (user.password.get_secret_value() or user.file):
                yield f"users.{name}", "has neither a password nor a file of passwords"
        needed = settings.message_bytes_max + 2 * settings.decompressed_bytes_max + _MIB
        if settings.inflight_bytes_max < needed:
            bound = show_size(settings.inflight_bytes_max)
            parts = "message_bytes_max, twice decompressed_bytes_max and 1 MiB"
            text = f"{bound} has no room for one message: {show_size(needed)}, {parts}"
            yield "inflight_bytes_max", text

    def keys(self, settings: Any) -> KeyNeeds:
        """See `SourceKind`."""
        return KeyNeeds(
            settings.idempotency_ttl, settings.idempotency_keys_max, 0.0, shared=True, ids_max=0
        )

    def check(self, settings: Any, formats: Mapping[str, Format], default: str) -> Sequence[str]:
        """See `SourceKind`."""
        from ingestd.sources.forward.handshake import read_secrets  # noqa: PLC0415  see `build`

        read_secrets(settings)
        return super().check(settings, formats, default)

    def build(self, settings: ForwardSettings, context: SourceContext) -> Source:
        """See `SourceKind`."""
        from ingestd.sources.forward.codec import ForwardCodec  # noqa: PLC0415  it needs this module
        from ingestd.sources.forward.handshake import read_secrets  # noqa: PLC0415
        from ingestd.sources.tcp.source import TcpSource  # noqa: PLC0415  large

        secrets = read_secrets(settings)
        intake = context.pipelines[context.pipeline]
        return TcpSource(
            settings,
            context,
            lambda peer: ForwardCodec(peer, settings, intake, secrets),
            table=self.table,
        )
