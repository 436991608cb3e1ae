"""Settings: one frozen model a section, checked at start; a stage sees only its own.

Sizes are `int` bytes and times `float` seconds once they are here. `Settings(...)` takes exactly
the values that its caller gives; flags, environment, secrets and files are read in `config/`.
A component's section is in its own folder, those of a pipeline are in `pipeline_settings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ingestd.base.record import Format  # noqa: TC001  pydantic reads it
from ingestd.config.keys import SOURCES as SOURCES_TABLE
from ingestd.config.keys import Schema
from ingestd.config.loader import Change, plan
from ingestd.config.network import check_address, check_hosts, show_url, split_address
from ingestd.config.sections import (
    Choice,
    LateModels,
    Own,
    Reloadable,
    Secret,
    Section,
    Shown,
    ValidationProblems,
    defaults_of,
    own_name,
    table_fault,
)
from ingestd.config.units import Count, Seconds, Share, Size, Switch, Words, show_size
from ingestd.execution.settings import HandlerSettings, RetrySettings
from ingestd.http.settings import CredentialSettings
from ingestd.journal.settings import DeadSettings, DedupeSettings, beyond_a_row
from ingestd.pipeline_settings import (
    BatchSettings,
    ExecutorTables,
    JournalTables,
    PipelineDrainSettings,
    PipelineSettings,
    QueueSettings,
    RouteSettings,
    inherit,
    plain,
    problems_of,
    route_problems,
    with_hints,
)
from ingestd.registry import SOURCES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from ingestd.http.settings import HttpSettings
    from ingestd.sources.base import SourceKind

DEFAULT_PIPELINE = "default"

_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_DAY = 86400.0


def _path(value: object) -> object:
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise ValueError("should be the path of a folder")
    return value


def _address_or_off(value: str) -> str:
    return check_address(value) if value else value


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


SourceName = Annotated[str, AfterValidator(partial(own_name, what="a source"))]


class SourceSettings(Section):
    """`[source]`: the source of a daemon that has one."""

    kind: Annotated[str, Choice(SOURCES.names)] = Field("http", description="source of records")
    pipeline: str = Field(DEFAULT_PIPELINE, description="pipeline of records that name none")


class AdminTokenSettings(CredentialSettings):
    """`[admin.tokens.NAME]`: an operator with a token, and what it may do."""

    EXAMPLE = ("ops", ("hash",))

    role: Literal["reader", "admin"] = Field(
        "reader", description="reader: may read; admin: may change things too"
    )


AdminTokenName = Annotated[str, AfterValidator(partial(own_name, what="a token"))]


class AdminSettings(Section):
    """`[admin]`: health, metrics, status, the console and its API."""

    listen: Annotated[str, AfterValidator(_address_or_off)] = Field(
        "127.0.0.1:8081",
        description='listen address for health, metrics and status, HOST:PORT; "" disables it',
    )
    hosts: Annotated[Words, AfterValidator(check_hosts)] = Field(
        (),
        max_length=1000,
        description="accepted Host names, beside IP addresses and localhost; * is all",
    )
    token_required: Annotated[Switch, Reloadable()] = Field(
        False, description="demand a token for reading on a loopback address too"
    )
    payloads: Annotated[Literal["loopback", "always", "never"], Reloadable()] = Field(
        "loopback", description="show the payloads of records: on a loopback address, or anywhere"
    )
    tokens: Annotated[dict[AdminTokenName, Own[AdminTokenSettings]], Reloadable()] = Field(
        default_factory=dict, max_length=1000, description="operators with a token, by name"
    )


HOOK_KINDS = ("dead_letters", "sink_down", "sink_back", "journal_near", "paused")
"""Events that a hook can tell of."""


def _hook_url(value: str) -> str:
    from ingestd.sinks.connection import target_of  # noqa: PLC0415  few daemons have a hook

    target_of(value)
    return value


def _hook_secret(value: SecretStr) -> SecretStr:
    from ingestd.http.signatures import signing_key  # noqa: PLC0415  few daemons have a hook

    signing_key(value.get_secret_value())
    return value


def _hook_kinds(value: tuple[str, ...]) -> tuple[str, ...]:
    for one in value:
        if one not in HOOK_KINDS:
            raise ValueError(f"{one!r} is none of {', '.join(HOOK_KINDS)}")
    return value


class HookSettings(Section):
    """`[hooks.NAME]`: signed POSTs when something needs a person."""

    EXAMPLE = ("ops", ("url",))

    url: Annotated[str, AfterValidator(_hook_url), Shown(show_url)] = Field(
        description="URL of the receiver"
    )
    secret: Annotated[Secret, AfterValidator(_hook_secret)] = Field(
        description="secret of Standard Webhooks signatures, whsec_ and base64"
    )
    on: Annotated[Words, AfterValidator(_hook_kinds)] = Field(
        HOOK_KINDS, min_length=1, description="events that it tells of"
    )
    every: Seconds = Field(
        300.0, ge=1, le=86400, description="shortest time between two messages of one kind"
    )
    paused_after: Seconds = Field(
        3600.0, ge=0, le=31_536_000, description="time after which a pause is too long"
    )


HookName = Annotated[str, AfterValidator(partial(own_name, what="a hook"))]


class LogSettings(Section):
    """`[log]`: lines on stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Reloadable()] = Field(
        "info", description="least severe level that is logged"
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else json"
    )


class TracesSettings(Section):
    """`[traces]`: spans for OpenTelemetry, whose environment variables say where they go."""

    enabled: Switch = Field(
        False, description="send spans of requests and of batches (needs the extra otel)"
    )
    ratio: Share = Field(
        1.0, ge=0, le=1, description="share of requests without a traceparent that begin a trace"
    )


class DrainSettings(PipelineDrainSettings):
    """`[drain]`: draining of the daemon."""

    delay: Seconds = Field(
        0.0, ge=0, le=3600, description="time of serving after SIGTERM while not ready"
    )


class ConfiguredSource(NamedTuple):
    """A source that a daemon with these settings has.

    Attributes:
        name: of `[sources.NAME]`, or the kind.
        kind: of the source.
        key: of its table: `http`, `sources.web`.
        settings: its section.
        pipeline: the name of the one for records that name none.
        routed: pipelines that its route names.
    """

    name: str
    kind: str
    key: str
    settings: Section
    pipeline: str
    routed: Collection[str] = ()

    @property
    def component(self) -> SourceKind:
        """The kind, as the registry knows it."""
        return KINDS[self.kind]

    @property
    def reads_input(self) -> bool:
        """Tells if it reads standard input."""
        return self.component.reads_input(self.settings)

    def feeds(self, pipeline: str) -> bool:
        """Tells if records of it can go to a pipeline."""
        return self.component.feeds_all or pipeline == self.pipeline or pipeline in self.routed

    def told(self, text: str) -> str:
        """A text of the component's, with the name of the source where it has one of its own."""
        return text if self.key == self.kind else f"{self.key}: {self.renamed(text)}"

    def renamed(self, text: str) -> str:
        """A text of the component's, with the names of settings as they are in its table.

        `http.listen` is a setting of `[http]`, which a source `[sources.web]` does not read.
        """
        return re.sub(rf"(?<![\w./]){self.kind}\.(?=[a-z_]+\b)", f"{self.key}.", text)


class _General(BaseSettings):
    """The settings that stand before those of the sources."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", defer_build=True, validate_default=False
    )

    data_dir: Annotated[Path, BeforeValidator(_path)] = Field(
        Path("ingestd-data"), description="folder of the journals and of the sinks' files"
    )
    format: Format = Field("json", description="format of the records")
    record_bytes_max: Size = Field(_MIB, ge=1, le=_GIB, description="largest record")
    json_depth_max: Count = Field(128, ge=1, le=512, description="deepest nesting of a JSON record")
    source: Own[SourceSettings] = defaults_of(SourceSettings)


def _kind_fault(name: str, kind: type[SourceKind]) -> str:
    if {"kind", "pipeline"} & kind.settings.model_fields.keys():
        return "it has a setting kind or pipeline"
    return (
        f"{name!r} is the name of a setting"
        if name in _LATER
        else table_fault(name, kind.settings, _General)
    )


_LATER = {
    "sources", "pipelines", "admin", "hooks", "log", "traces", "drain",
    *PipelineSettings.model_fields,
}  # fmt: skip
_LOADED, UNUSABLE = SOURCES.load_kinds(_kind_fault)
KINDS: dict[str, SourceKind] = {name: kind() for name, kind in _LOADED.items()}
"""The kinds of sources by name, and why others that are registered cannot be used."""


@lru_cache(1000)
def _entry(kind: str) -> type[Section]:
    """The model of `[sources.NAME]` with a kind."""
    fields: dict[str, Any] = {
        "kind": (Literal[kind], Field(description="source of records")),
        "pipeline": (str, Field("", description="pipeline of its records; empty: source.pipeline")),
    }
    if kind in UNUSABLE:
        return create_model(f"No_{kind}", __base__=_UnusableSource, **fields)
    base = KINDS[kind].settings
    make: Any = create_model
    made = make(f"{base.__name__}_{kind}", __base__=base, **fields)
    made.EXAMPLE = ("web", ("kind",))
    entry: type[Section] = made
    return entry


def _entries() -> list[type[Section]]:
    return [_entry(kind) for kind in (*KINDS, *UNUSABLE)]


def _checked_entry(value: Any) -> Section:
    """A table `[sources.NAME]`, checked by the model of its kind."""
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "should be a table")
    kinds = ", ".join(map(repr, (*KINDS, *UNUSABLE)))
    if "kind" not in value:
        raise PydanticCustomError("kind_missing", f"needs a kind: {kinds}")
    kind = value["kind"]
    if kind not in (*KINDS, *UNUSABLE):
        facts = {"tag": str(kind), "expected_tags": kinds}
        raise PydanticCustomError("union_tag_invalid", "{tag} is none of {expected_tags}", facts)
    return _entry(kind).model_validate(value)


class _UnusableSource(Section):
    model_config = ConfigDict(extra="allow")
    kind: str

    @model_validator(mode="after")
    def _refuse(self) -> _UnusableSource:
        raise ValueError(UNUSABLE[self.kind])


if TYPE_CHECKING:

    class _WithSources(_General):
        http: HttpSettings
        sources: dict[str, Any]
else:
    _tables = {
        name: (Own[kind.settings], defaults_of(kind.settings)) for name, kind in KINDS.items()
    }
    _Entries = Annotated[
        dict[SourceName, Annotated[Any, PlainValidator(_checked_entry)]], LateModels(_entries)
    ]
    _named = Field(default_factory=dict, max_length=1000, description="more sources, by name")
    _WithSources = create_model(
        "_WithSources", __base__=_General, **_tables, sources=(_Entries, _named)
    )


class Settings(_WithSources):
    """Everything, at top level for the pipeline `default`; `pipelines` come filled in.

    A table under `pipelines` takes what it leaves out, key by key, from the top level; a `handler`
    table is taken whole, because options belong to their target. A kind of source has its own
    table; tables under `sources` are more of them, and take nothing from there.
    """

    admin: Own[AdminSettings] = defaults_of(AdminSettings)
    hooks: dict[HookName, Own[HookSettings]] = Field(
        default_factory=dict, max_length=100, description="signed POSTs on events, by name"
    )
    log: Own[LogSettings] = defaults_of(LogSettings)
    traces: Own[TracesSettings] = defaults_of(TracesSettings)
    batch: Own[BatchSettings] = defaults_of(BatchSettings)
    queue: Own[QueueSettings] = defaults_of(QueueSettings)
    handler: Own[HandlerSettings] = defaults_of(HandlerSettings)
    executor: Own[ExecutorTables] = defaults_of(ExecutorTables)
    retry: Own[RetrySettings] = defaults_of(RetrySettings)
    journal: Own[JournalTables] = defaults_of(JournalTables)
    dead: Own[DeadSettings] = defaults_of(DeadSettings)
    dedupe: Own[DedupeSettings] = defaults_of(DedupeSettings)
    drain: Own[DrainSettings] = defaults_of(DrainSettings)
    route: Own[RouteSettings] = defaults_of(RouteSettings)
    pipelines: dict[PipelineName, Own[PipelineSettings]] = Field(
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
    def _fill_pipelines(cls, values: dict[str, Any]) -> Any:
        named = values.get("pipelines")
        if not isinstance(named, Mapping):
            return with_hints(values)
        filled = {name: with_hints(inherit(values, plain(table))) for name, table in named.items()}
        return with_hints({**values, "pipelines": filled})

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        problems = validation_errors(self)
        if problems:
            raise ValidationProblems(problems)
        return self

    def pipeline_settings(self) -> dict[str, PipelineSettings]:
        """All pipelines by name, `default` first, everything filled in."""
        # Not checked again.
        default = PipelineSettings.model_construct(
            **{key: getattr(self, key) for key in PipelineSettings.model_fields}
        )
        return {DEFAULT_PIPELINE: default, **self.pipelines}

    def running_sources(self) -> list[ConfiguredSource]:
        """The sources that a daemon has.

        With `[sources.NAME]` these; the one of `source.kind` too if it is said, or alone.
        """
        found = []
        kind = self.source.kind
        if not self.sources or "kind" in self.source.model_fields_set:
            section, to = getattr(self, kind), self.source.pipeline
            found.append(ConfiguredSource(kind, kind, kind, section, to, self._routed_from(to)))
        for name, entry in self.sources.items():
            pipeline = entry.pipeline or self.source.pipeline
            key = f"{SOURCES_TABLE}.{name}"
            routed = self._routed_from(pipeline)
            found.append(ConfiguredSource(name, entry.kind, key, entry, pipeline, routed))
        return found

    def _routed_from(self, pipeline: str) -> Collection[str]:
        if pipeline == DEFAULT_PIPELINE:
            route = self.route
        elif pipeline in self.pipelines:
            route = self.pipelines[pipeline].route
        else:
            return ()
        return set(route.targets.values()) if route.field else ()

    def unread(self) -> Iterator[tuple[str, str]]:
        """Yields (kind, what to do) for tables that no source reads beside `[sources.NAME]`.

        Without such tables it is `source.kind` that chooses, and other tables wait for their turn.
        """
        read = {source.kind for source in self.running_sources() if source.key == source.kind}
        for kind in KINDS if self.sources else ():
            if kind not in read and getattr(self, kind).model_dump(exclude_defaults=True):
                text = f"no source reads [{kind}], because there are tables [sources.NAME]: set"
                text += f' source.kind = "{kind}", or put its keys into a table [sources.NAME] of'
                yield kind, f"{text} that kind"

    def section_of(self, source: ConfiguredSource) -> Section:
        """The section of a source in these settings."""
        has_own = source.key != source.kind
        section: Section = self.sources[source.name] if has_own else getattr(self, source.kind)
        return section


def plan_reload(running: Settings, new: Settings) -> Change[Settings]:
    """Compares the settings in effect with new ones; see `plan`."""
    return plan(running, new, validation_errors)


def validation_errors(settings: Settings) -> list[tuple[str, str]]:
    """(dotted key, problem) for each; the key is the one that is most likely to be changed."""
    if settings.source.kind in UNUSABLE:
        return [("source.kind", UNUSABLE[settings.source.kind])]
    pipelines = settings.pipeline_settings()
    problems = [*_of_sources(settings, pipelines)]
    problems += [
        (f"admin.tokens.{name}", "needs one of token, hash and file")
        for name, token in settings.admin.tokens.items()
        if not token.has_token
    ]
    if settings.admin.token_required and not settings.admin.tokens:
        problems.append(("admin.token_required", "there is no token (admin.tokens.NAME.hash)"))
    if settings.source.pipeline not in pipelines:
        problems.append(("source.pipeline", f"there is no pipeline {settings.source.pipeline!r}"))
    for name, pipeline in pipelines.items():
        prefix = "" if name == DEFAULT_PIPELINE else f"pipelines.{name}."
        problems.extend((prefix + key, text) for key, text in problems_of(pipeline))
        problems.extend((prefix + key, text) for key, text in route_problems(name, pipelines))
        if text := _without_room(settings, name, pipeline):
            problems.append((f"{prefix}journal.bytes_max", text))
    return problems


def _of_sources(
    settings: Settings, pipelines: Mapping[str, PipelineSettings]
) -> Iterator[tuple[str, str]]:
    running = settings.running_sources()
    yield from _clashes(settings, running)
    formats = {name: pipeline.format for name, pipeline in pipelines.items()}
    has_rows = any(pipeline.journal.kind == "sqlite" for pipeline in pipelines.values())
    built = {source.key: source for source in running}
    for kind in KINDS:  # what is wrong in a table is said, also if nothing uses it
        section = getattr(settings, kind)
        built.setdefault(kind, ConfiguredSource(kind, kind, kind, section, ""))
    for source in built.values():
        runs, default = source in running, source.pipeline
        if runs and default not in pipelines and source.key != source.kind:
            yield f"{source.key}.pipeline", f"there is no pipeline {default!r}"
        for key, text in source.component.problems(
            source.settings, formats=formats, default=default, runs=runs
        ):
            yield f"{source.key}.{key}", source.renamed(text)
        for key in source.component.stored_whole if runs and has_rows else ():
            if text := beyond_a_row(getattr(source.settings, key)):
                yield f"{source.key}.{key}", text


def _clashes(settings: Settings, running: Sequence[ConfiguredSource]) -> Iterator[tuple[str, str]]:
    """Finds sources that need the same address, or standard input."""
    addresses: dict[str, str] = {}
    listening = [(one.key, at) for one in running for at in one.component.addresses(one.settings)]
    for key, listen in (*listening, ("admin", settings.admin.listen)):
        if listen in addresses and split_address(listen)[1] != 0:
            yield f"{key}.listen", f"{addresses[listen]}.listen is {listen} too"
        elif listen:
            addresses[listen] = key
    reading = [source for source in running if source.reads_input]
    for source in reading[1:]:
        key = "source.kind" if source.key == source.kind else f"{source.key}.kind"
        yield key, f"{reading[0].key} reads standard input too, and only one source can"


def _without_room(settings: Settings, name: str, pipeline: PipelineSettings) -> str:
    """Refuses a journal that one append of a stream can't fit: it would be tried for ever.

    A client gets 413 for that; a stream has no such answer.
    """
    feeding = [one for one in settings.running_sources() if one.feeds(name)]
    blocks = [one.component.block_bytes for one in feeding if one.component.block_bytes]
    block = pipeline.record_bytes_max + max(blocks, default=0)
    if not blocks or pipeline.journal.bytes_max >= 2 * block:
        return ""
    bound = show_size(pipeline.journal.bytes_max)
    return f"{bound} has no room for two blocks of input ({show_size(2 * block)})"


SCHEMA = Schema(Settings)
"""The keys of all settings."""
