"""Settings: one frozen model a section, checked at start; a stage sees only its own.

Sizes are `int` bytes and times `float` seconds once they are here. `Settings(...)` takes exactly
what its caller says; flags, environment, secrets and files are read in `base/layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ingestd.base.access import (
    TlsSettings,
    TokenName,
    TokenSettings,
    WebhookName,
    WebhookSettings,
)
from ingestd.base.address import split_address
from ingestd.base.contradictions import ContradictionError, contradictions
from ingestd.base.hosts import check_hosts
from ingestd.base.origins import check_origins
from ingestd.base.section import FilePath, Section, own_name
from ingestd.base.units import (  # noqa: TC001  pydantic reads them
    Count,
    Seconds,
    Share,
    Size,
    Switch,
    Words,
)
from ingestd.base.urls import check_headers, split_urls

DEFAULT_PIPELINE = "default"
OPTIONS_DEPTH_MAX = 16

_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_DAY = 86400.0

Format = Literal["json", "text", "bytes"]


def _options(value: object) -> object:
    return _plain_data(value, OPTIONS_DEPTH_MAX)


def _plain_data(value: object, depth: int) -> object:
    """Only what crosses to worker processes as it is."""
    if depth < 0:
        raise ValueError(f"is nested deeper than {OPTIONS_DEPTH_MAX}")
    if isinstance(value, dict):
        return {_name(key): _plain_data(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item, depth - 1) for item in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("should be UTF-8 text") from None
        return value
    if isinstance(value, int | float):
        return value
    raise ValueError("should be text, a number, a boolean, a list or a table")


def _name(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ValueError("should have text as keys")
    return key


def _path(value: object) -> object:
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise ValueError("should be the path of a folder")
    return value


def _address(value: str) -> str:
    split_address(value)
    return value


def _address_or_off(value: str) -> str:
    return _address(value) if value else value


def pipeline_name(value: str) -> str:
    """The name of a pipeline beside `default`, as it is.

    Raises:
        ValueError: it is none; the message says why.
    """
    own_name(value, "a pipeline")
    if value == DEFAULT_PIPELINE:
        raise ValueError(f"the pipeline {DEFAULT_PIPELINE!r} is set at the top level")
    return value


PipelineName = Annotated[str, AfterValidator(pipeline_name)]


class SourceSettings(Section):
    """`[source]`: where records come in."""

    kind: Literal["http", "stdin", "fetch"] = Field("http", description="where records come in")
    pipeline: str = Field(
        DEFAULT_PIPELINE, description="the pipeline that records without a named one go to"
    )


class HttpSettings(Section):
    """`[http]`: the door for records, and its bounds."""

    listen: Annotated[str, AfterValidator(_address)] = Field(
        "127.0.0.1:8080", description="address for records, HOST:PORT"
    )
    reuse_port: Switch = Field(
        False, description="other daemons may listen on the same port, and share what comes"
    )
    wire_bytes_max: Size = Field(
        16 * _MIB, ge=1, le=_TIB, description="largest body as it is sent, before decompression"
    )
    body_bytes_max: Size = Field(
        32 * _MIB, ge=1, le=_TIB, description="largest body after decompression"
    )
    records_max: Count = Field(100_000, ge=1, le=10**9, description="most records in one request")
    invalid_kept: Count = Field(
        10,
        ge=0,
        le=100,
        description="invalid records of one request that are kept as dead letters",
    )
    inflight_bytes_max: Size = Field(
        48 * _MIB,
        ge=1,
        le=_TIB,
        description="bodies being read or waiting for their commit, all requests together",
    )
    connections_max: Count = Field(4096, ge=1, le=1_000_000, description="most open connections")
    connections_per_client_max: Count = Field(
        1024, ge=0, le=1_000_000, description="most open connections of one client; 0: no bound"
    )
    head_timeout: Seconds = Field(
        10.0, gt=0, le=_DAY, description="the head of a request has to be there after this"
    )
    body_rate_min: Size = Field(
        1024, ge=0, le=_GIB, description="a body that comes slower, a second, is ended; 0: no bound"
    )
    inflate_ratio_max: Count = Field(
        200,
        ge=0,
        le=1_000_000,
        description="a body that grows more when decompressed is refused; 0: no bound",
    )
    body_timeout: Seconds = Field(
        30.0, gt=0, le=_DAY, description="a body has to be there after this"
    )
    keepalive_timeout: Seconds = Field(
        15.0, ge=0, le=_DAY, description="an idle connection is closed after this"
    )
    requests_max: Count = Field(
        1024, ge=1, le=1_000_000, description="most requests in progress; then 503"
    )
    client_share: Share = Field(
        0.5,
        gt=0,
        le=1,
        description="what one client may hold of requests and bytes in flight while others wait",
    )
    wait_max: Seconds = Field(
        60.0,
        ge=0,
        le=3600,
        description="longest that Prefer: wait makes an answer wait; 0s ignores it",
    )
    streams_max: Count = Field(
        64,
        ge=0,
        le=100_000,
        description="most chunked bodies of lines that are accepted in pieces at once",
    )
    stream_silence_max: Seconds = Field(
        300.0, gt=0, le=_DAY, description="a stream that sends nothing for so long is ended"
    )
    idempotency_ttl: Seconds = Field(
        _DAY, gt=0, le=366 * _DAY, description="an Idempotency-Key is remembered this long"
    )
    idempotency_keys_max: Count = Field(
        1_000_000, ge=1, le=10**9, description="most Idempotency-Keys remembered, a pipeline"
    )
    cors_origins: Annotated[Words, AfterValidator(check_origins)] = Field(
        (), max_length=1000, description="origins whose pages may read the answers; * is every one"
    )
    hosts: Annotated[Words, AfterValidator(check_hosts)] = Field(
        (),
        max_length=1000,
        description="names it is asked for, beside IP addresses and localhost; * is every one",
    )
    allow_anonymous: bool = Field(
        False, description="who says nothing may send everything, also on a public address"
    )
    tls: TlsSettings = TlsSettings()
    tokens: dict[TokenName, TokenSettings] = Field(
        default_factory=dict, max_length=1000, description="clients that prove who they are"
    )
    webhooks: dict[WebhookName, WebhookSettings] = Field(
        default_factory=dict, max_length=1000, description="signed deliveries, by name"
    )


class StdinSettings(Section):
    """`[stdin]`: bounds of standard input."""

    inflight_bytes_max: Size = Field(
        16 * _MIB, ge=1, le=_TIB, description="read but not yet committed; then reading waits"
    )


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


class AdminSettings(Section):
    """`[admin]`: health, metrics and status."""

    listen: Annotated[str, AfterValidator(_address_or_off)] = Field(
        "127.0.0.1:8081",
        description='address for health, metrics and status, HOST:PORT; "" switches it off',
    )
    hosts: Annotated[Words, AfterValidator(check_hosts)] = Field(
        (),
        max_length=1000,
        description="names it is asked for, beside IP addresses and localhost; * is every one",
    )


class LogSettings(Section):
    """`[log]`: lines on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least important lines that are written"
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto is console on a terminal, else json"
    )


class BatchSettings(Section):
    """`[batch]`: a batch is closed by whichever bound it meets first."""

    records_max: Count = Field(1000, ge=1, le=10**7, description="most records in a batch")
    bytes_max: Size = Field(4 * _MIB, ge=1, le=16 * _GIB, description="most bytes in a batch")
    age_max: Seconds = Field(
        1.0, ge=0, le=_DAY, description="a batch goes when its oldest record is this old"
    )


class QueueSettings(Section):
    """`[queue]`: what of the journal is kept in memory; beyond it records wait on disk."""

    chunks_max: Count = Field(1024, ge=1, le=10**6, description="most chunks in memory")
    bytes_max: Size = Field(16 * _MIB, ge=1, le=_TIB, description="most bytes in memory")


class HandlerSettings(Section):
    """`[handler]`: who gets the batches."""

    target: str = Field(
        "jsonl", min_length=1, description="module:name of your function or class, or a sink"
    )
    options: Annotated[dict[str, Any], BeforeValidator(_options)] = Field(
        default_factory=dict, description="keyword arguments for a handler class or a sink"
    )


class ExecutorSettings(Section):
    """`[executor]`: what the handler runs in."""

    kind: Literal["auto", "process", "thread", "async"] = Field(
        "auto",
        description="auto: process for your function, async for your coroutine, thread for a sink",
    )
    workers: Count = Field(4, ge=1, le=1024, description="most batches that are handled at once")
    timeout: Seconds = Field(60.0, gt=0, le=30 * _DAY, description="one call may take this long")


class RetrySettings(Section):
    """`[retry]`: what happens when the handler raises."""

    attempts_max: Count = Field(8, ge=1, le=10**6, description="tries, the first one counted")
    backoff: Seconds = Field(
        0.5, ge=0, le=_DAY, description="wait before the second try; doubles with each"
    )
    backoff_max: Seconds = Field(60.0, ge=0, le=30 * _DAY, description="longest wait")
    waiting_records_max: Count = Field(
        50_000,
        ge=1,
        le=10**9,
        description="records that may wait; then new ones are tried as probes only",
    )
    waiting_bytes_max: Size = Field(
        256 * _MIB, ge=1, le=1024 * _TIB, description="what these may take in the journal"
    )
    give_up_after: Seconds = Field(
        _DAY, ge=0, le=3650 * _DAY, description="a record fails so long while nothing succeeds"
    )


class JournalSettings(Section):
    """`[journal]`: the durable store of what is accepted and not yet done."""

    kind: Literal["sqlite", "memory"] = Field(
        "sqlite", description="memory is fast and loses what it holds with the process"
    )
    bytes_max: Size = Field(
        8 * _GIB, ge=1, le=1024 * _TIB, description="at this size new records are refused (503)"
    )
    free_min: Size = Field(
        256 * _MIB,
        ge=0,
        le=1024 * _TIB,
        description="with less free on its disk new records are refused (503)",
    )


class DeadSettings(Section):
    """`[dead]`: the records that were given up."""

    bytes_max: Size = Field(
        _GIB,
        ge=1,
        le=1024 * _TIB,
        description="at this size no further batch goes to the handler; records are accepted on",
    )
    invalid_bytes_max: Size = Field(
        64 * _MIB,
        ge=1,
        le=_TIB,
        description="of records that were never accepted so much is kept; a sender has a quarter",
    )
    age_max: Seconds = Field(
        0.0,
        ge=0,
        le=36500 * _DAY,
        description="older dead letters go; 0s keeps them until a person purges them",
    )


class PipelineDrainSettings(Section):
    """`[pipelines.NAME.drain]`: how a pipeline leaves."""

    timeout: Seconds = Field(
        30.0, ge=0, le=_DAY, description="what is not done then stays in the journal"
    )


class DrainSettings(PipelineDrainSettings):
    """`[drain]`: how the daemon leaves."""

    delay: Seconds = Field(
        0.0, ge=0, le=3600, description="go on serving this long after SIGTERM, not ready any more"
    )


class PipelineSettings(Section):
    """One pipeline, everything filled in. The daemon gets these from `pipeline_settings()`."""

    format: Format = Field("json", description="what a record is")
    record_bytes_max: Size = Field(_MIB, ge=1, le=_GIB, description="largest record")
    json_depth_max: Count = Field(128, ge=1, le=512, description="deepest nesting of a JSON record")
    batch: BatchSettings = BatchSettings()
    queue: QueueSettings = QueueSettings()
    handler: HandlerSettings = HandlerSettings()
    executor: ExecutorSettings = ExecutorSettings()
    retry: RetrySettings = RetrySettings()
    journal: JournalSettings = JournalSettings()
    dead: DeadSettings = DeadSettings()
    drain: PipelineDrainSettings = PipelineDrainSettings()


class Settings(BaseSettings):
    """Everything, at top level for the pipeline `default`; `pipelines` come filled in.

    A table under `pipelines` takes what it leaves out, key by key, from the top level; a `handler`
    table is taken whole, because options belong to their target.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    data_dir: Annotated[Path, BeforeValidator(_path)] = Field(
        Path("ingestd-data"), description="folder of the journals and of what sinks write"
    )
    format: Format = Field("json", description="what a record is")
    record_bytes_max: Size = Field(_MIB, ge=1, le=_GIB, description="largest record")
    json_depth_max: Count = Field(128, ge=1, le=512, description="deepest nesting of a JSON record")
    source: SourceSettings = SourceSettings()
    http: HttpSettings = HttpSettings()
    stdin: StdinSettings = StdinSettings()
    fetch: FetchSettings = FetchSettings()
    admin: AdminSettings = AdminSettings()
    log: LogSettings = LogSettings()
    batch: BatchSettings = BatchSettings()
    queue: QueueSettings = QueueSettings()
    handler: HandlerSettings = HandlerSettings()
    executor: ExecutorSettings = ExecutorSettings()
    retry: RetrySettings = RetrySettings()
    journal: JournalSettings = JournalSettings()
    dead: DeadSettings = DeadSettings()
    drain: DrainSettings = DrainSettings()
    pipelines: dict[PipelineName, PipelineSettings] = Field(
        default_factory=dict, max_length=1000, description="more pipelines, by name"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller passes: the other sources let unknown names and lost files pass."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _fill_pipelines(cls, values: dict[str, Any]) -> dict[str, Any]:
        named = values.get("pipelines")
        if not isinstance(named, Mapping):
            return values
        filled = {name: inherit(values, _plain(table)) for name, table in named.items()}
        return {**values, "pipelines": filled}

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        problems = contradictions(self)
        if problems:
            raise ContradictionError(problems)
        return self

    def pipeline_settings(self) -> dict[str, PipelineSettings]:
        """All pipelines by name, `default` first, everything filled in."""
        default = PipelineSettings(
            **{key: getattr(self, key) for key in PipelineSettings.model_fields}
        )
        return {DEFAULT_PIPELINE: default, **self.pipelines}


def _plain(value: Any) -> Any:
    """A model as the table that was written for it; anything else as it is."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def inherit(top: Mapping[str, Any], table: Any) -> Any:
    """A pipeline's table with what it leaves out from the top level, before any checking."""
    if not isinstance(table, Mapping):
        return table
    filled = dict(table)
    for key, field in PipelineSettings.model_fields.items():
        if key not in top or (key == "handler" and key in table):
            continue
        above, own = _plain(top[key]), _plain(table.get(key, {}))
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            filled.setdefault(key, above)
        elif isinstance(above, Mapping) and isinstance(own, Mapping):
            known = {name: value for name, value in above.items() if name in section.model_fields}
            filled[key] = {**known, **own}
    return filled
