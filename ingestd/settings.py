"""Settings: one frozen model a section, checked at start; a stage sees only its own.

Sizes are `int` bytes and times `float` seconds once they are here. `Settings(...)` takes exactly
the values that its caller gives; flags, environment, secrets and files are read in `config/`.
A component's section is in its own folder; here are those of the daemon and of a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ingestd.base.errors import ConfigError
from ingestd.base.record import Format  # noqa: TC001  pydantic reads it
from ingestd.codecs.lines import record_fault
from ingestd.config.keys import SOURCES as SOURCES_TABLE
from ingestd.config.keys import Schema
from ingestd.config.loader import Change, plan
from ingestd.config.network import check_address, check_hosts, split_address
from ingestd.config.sections import Choice, Reloadable, Section, ValidationProblems, own_name
from ingestd.config.units import Count, Seconds, Size, Words, parse_size, parse_words, show_size
from ingestd.execution.settings import ExecutorSettings, HandlerSettings, RetrySettings
from ingestd.execution.settings import problems_of as execution_problems
from ingestd.handlers.target import own_sink
from ingestd.journal.settings import DeadSettings, JournalSettings, beyond_a_row
from ingestd.registry import SOURCES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

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


def source_name(value: str) -> str:
    """See `own_name`."""
    return own_name(value, "a source")


SourceName = Annotated[str, AfterValidator(source_name)]


class SourceSettings(Section):
    """`[source]`: the source of a daemon that has one."""

    kind: Annotated[str, Choice(SOURCES.names)] = Field("http", description="source of records")
    pipeline: str = Field(DEFAULT_PIPELINE, description="pipeline of records that name none")


class AdminSettings(Section):
    """`[admin]`: health, metrics and status."""

    listen: Annotated[str, AfterValidator(_address_or_off)] = Field(
        "127.0.0.1:8081",
        description='listen address for health, metrics and status, HOST:PORT; "" disables it',
    )
    hosts: Annotated[Words, AfterValidator(check_hosts)] = Field(
        (),
        max_length=1000,
        description="accepted Host names, beside IP addresses and localhost; * is all",
    )


class LogSettings(Section):
    """`[log]`: lines on stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Reloadable()] = Field(
        "info", description="least severe level that is logged"
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else json"
    )


class BatchSettings(Section):
    """`[batch]`: bounds of a batch; the first one that is met closes it."""

    records_max: Count = Field(1000, ge=1, le=10**7, description="maximum of records in a batch")
    bytes_max: Size = Field(4 * _MIB, ge=1, le=16 * _GIB, description="maximum of bytes in a batch")
    age_max: Seconds = Field(
        1.0, ge=0, le=_DAY, description="maximum age of a batch, from its oldest record on"
    )


class QueueSettings(Section):
    """`[queue]`: bounds of the records in memory; beyond them records wait on disk."""

    chunks_max: Count = Field(1024, ge=1, le=10**6, description="maximum of chunks in memory")
    bytes_max: Size = Field(16 * _MIB, ge=1, le=_TIB, description="maximum of bytes in memory")


class PipelineDrainSettings(Section):
    """`[pipelines.NAME.drain]`: draining of a pipeline."""

    timeout: Seconds = Field(
        30.0, ge=0, le=_DAY, description="time limit; records that are left stay in the journal"
    )


class DrainSettings(PipelineDrainSettings):
    """`[drain]`: draining of the daemon."""

    delay: Seconds = Field(
        0.0, ge=0, le=3600, description="time of serving after SIGTERM while not ready"
    )


class PipelineSettings(Section):
    """One pipeline, everything filled in. The daemon gets these from `pipeline_settings()`."""

    EXAMPLE = ("clicks", ("handler", "target"))

    format: Format = Field("json", description="format of the records")
    record_bytes_max: Size = Field(_MIB, ge=1, le=_GIB, description="largest record")
    json_depth_max: Count = Field(128, ge=1, le=512, description="deepest nesting of a JSON record")
    batch: Annotated[BatchSettings, Reloadable()] = BatchSettings()
    queue: QueueSettings = QueueSettings()
    handler: HandlerSettings = HandlerSettings()
    executor: ExecutorSettings = ExecutorSettings()
    retry: RetrySettings = RetrySettings()
    journal: JournalSettings = JournalSettings()
    dead: DeadSettings = DeadSettings()
    drain: PipelineDrainSettings = PipelineDrainSettings()

    def record_fault(self, value: bytes) -> str:
        """Describes in one line why bytes are no record of this pipeline; empty if they are."""
        return record_fault(value, self.format, self.record_bytes_max, self.json_depth_max)


class ConfiguredSource(NamedTuple):
    """A source that a daemon with these settings has.

    Attributes:
        name: of `[sources.NAME]`, or the kind.
        kind: of the source.
        key: of its table: `http`, `sources.web`.
        settings: its section.
        pipeline: the name of the one for records that name none.
    """

    name: str
    kind: str
    key: str
    settings: Section
    pipeline: str

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
        return self.component.feeds_all or pipeline == self.pipeline

    def told(self, text: str) -> str:
        """A text of the component's, with the name of the source where it has one of its own."""
        return text if self.key == self.kind else f"{self.key}: {text}"


class _General(BaseSettings):
    """The settings that stand before those of the sources."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    data_dir: Annotated[Path, BeforeValidator(_path)] = Field(
        Path("ingestd-data"), description="folder of the journals and of the sinks' files"
    )
    format: Format = Field("json", description="format of the records")
    record_bytes_max: Size = Field(_MIB, ge=1, le=_GIB, description="largest record")
    json_depth_max: Count = Field(128, ge=1, le=512, description="deepest nesting of a JSON record")
    source: SourceSettings = SourceSettings()


def _load_kinds(taken: Collection[str]) -> tuple[dict[str, SourceKind], dict[str, str]]:
    """The kinds of sources by name, and of those that cannot be used, why.

    One that cannot be imported is no reason for a daemon that does not use it not to start.
    """
    kinds: dict[str, SourceKind] = {}
    unusable: dict[str, str] = {}
    for name in SOURCES.names():
        try:
            kind: SourceKind = SOURCES.load(name)()
            _check_kind(name, kind, taken)
        except (ConfigError, ValueError, TypeError, AttributeError) as error:
            unusable[name] = str(error)
        else:
            kinds[name] = kind
    return kinds, unusable


def _check_kind(name: str, kind: SourceKind, taken: Collection[str]) -> None:
    own_name(name, "a kind of source")
    if name in taken or {"kind", "pipeline"} & kind.settings.model_fields.keys():
        raise ValueError("it has the name of a setting, or a setting kind or pipeline")


_LATER = {"sources", "pipelines", "admin", "log", "drain", *PipelineSettings.model_fields}
KINDS, UNUSABLE = _load_kinds({*_LATER, *_General.model_fields})
"""The kinds of sources by name, and why others that are registered cannot be used."""


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
    _Entries = Annotated[
        Union[tuple(map(_entry, [*KINDS, *UNUSABLE]))],  # noqa: UP007
        Field(discriminator="kind"),
    ]
    _tables = {name: (kind.settings, kind.settings()) for name, kind in KINDS.items()}
    _named = Field(default_factory=dict, max_length=1000, description="more sources, by name")
    _WithSources = create_model(
        "_WithSources", __base__=_General, **_tables, sources=(dict[SourceName, _Entries], _named)
    )


class Settings(_WithSources):
    """Everything, at top level for the pipeline `default`; `pipelines` come filled in.

    A table under `pipelines` takes what it leaves out, key by key, from the top level; a `handler`
    table is taken whole, because options belong to their target. A kind of source has its own
    table; tables under `sources` are more of them, and take nothing from there.
    """

    admin: AdminSettings = AdminSettings()
    log: LogSettings = LogSettings()
    batch: Annotated[BatchSettings, Reloadable()] = BatchSettings()
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
    def _fill_pipelines(cls, values: dict[str, Any]) -> Any:
        named = values.get("pipelines")
        if not isinstance(named, Mapping):
            return _with_hints(values)
        filled = {
            name: _with_hints(inherit(values, _plain(table))) for name, table in named.items()
        }
        return _with_hints({**values, "pipelines": filled})

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        problems = validation_errors(self)
        if problems:
            raise ValidationProblems(problems)
        return self

    def pipeline_settings(self) -> dict[str, PipelineSettings]:
        """All pipelines by name, `default` first, everything filled in."""
        default = PipelineSettings(
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
            section = getattr(self, kind)
            found.append(ConfiguredSource(kind, kind, kind, section, self.source.pipeline))
        for name, entry in self.sources.items():
            pipeline = entry.pipeline or self.source.pipeline
            key = f"{SOURCES_TABLE}.{name}"
            found.append(ConfiguredSource(name, entry.kind, key, entry, pipeline))
        return found

    def section_of(self, source: ConfiguredSource) -> Section:
        """The section of a source in these settings."""
        has_own = source.key != source.kind
        section: Section = self.sources[source.name] if has_own else getattr(self, source.kind)
        return section


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


def hints_for(targets: Iterable[str]) -> dict[str, Any]:
    """Settings of `[batch]` that suit the sinks of ingestd's among some handlers: the largest."""
    found: dict[str, Any] = {}
    for target in targets:
        hints = getattr(own_sink(target), "BATCH", None)
        wanted: dict[str, Any] = hints._asdict() if hints is not None else {}
        for key, value in wanted.items():
            if value is not None:
                found[key] = max(value, found.get(key, value))
    return found


def _with_hints(table: Any) -> Any:
    """A pipeline's table, with the bounds that suit its sink where the user says nothing."""
    if not isinstance(table, Mapping):
        return table
    handler, batch, queue = (_plain(table.get(key, {})) for key in ("handler", "batch", "queue"))
    if not all(isinstance(one, Mapping) for one in (handler, batch, queue)):
        return table
    try:
        targets = parse_words(handler.get("targets", ())) or (handler.get("target", "jsonl"),)
    except ValueError:  # which the model says better
        return table
    hints = hints_for(targets)
    if not hints:
        return table
    filled = {**table, "batch": {**hints, **batch}}
    if "bytes_max" in hints and "bytes_max" not in batch:
        if "bytes_max" in queue:
            # The user's bound; two batches are to find room in it.
            with suppress(ValueError):
                room = parse_size(queue["bytes_max"])
                filled["batch"]["bytes_max"] = max(1, min(hints["bytes_max"], room // 2))
        else:
            room = max(2 * hints["bytes_max"], QueueSettings().bytes_max)
            filled["queue"] = {**queue, "bytes_max": room}
    return filled


def plan_reload(running: Settings, new: Settings) -> Change[Settings]:
    """Compares the settings in effect with new ones; see `plan`."""
    return plan(running, new, validation_errors)


def validation_errors(settings: Settings) -> list[tuple[str, str]]:
    """(dotted key, problem) for each; the key is the one that is most likely to be changed."""
    if settings.source.kind in UNUSABLE:
        return [("source.kind", UNUSABLE[settings.source.kind])]
    pipelines = settings.pipeline_settings()
    problems = [*_of_sources(settings, pipelines)]
    if settings.source.pipeline not in pipelines:
        problems.append(("source.pipeline", f"there is no pipeline {settings.source.pipeline!r}"))
    for name, pipeline in pipelines.items():
        prefix = "" if name == DEFAULT_PIPELINE else f"pipelines.{name}."
        problems.extend((prefix + key, text) for key, text in _in_a_pipeline(pipeline))
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
            yield f"{source.key}.{key}", text
        for key in source.component.stored_whole if runs and has_rows else ():
            if text := beyond_a_row(getattr(source.settings, key)):
                yield f"{source.key}.{key}", text


def _clashes(settings: Settings, running: Sequence[ConfiguredSource]) -> Iterator[tuple[str, str]]:
    """Finds sources that need the same address, or standard input."""
    addresses: dict[str, str] = {}
    listening = [(one.key, one.settings) for one in running if one.component.listens]
    for key, section in (*listening, ("admin", settings.admin)):
        listen: str = getattr(section, "listen", "")
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
    return f"{bound} has no room for two blocks of input ({show_size(block)})"


def _in_a_pipeline(pipeline: PipelineSettings) -> Iterator[tuple[str, str]]:
    yield from execution_problems(pipeline.retry, pipeline.executor, pipeline.handler)
    if pipeline.queue.bytes_max < pipeline.batch.bytes_max:
        room, batch = show_size(pipeline.queue.bytes_max), show_size(pipeline.batch.bytes_max)
        text = f"{room} has no room for one batch of batch.bytes_max ({batch})"
        yield "queue.bytes_max", text
    if pipeline.journal.kind == "sqlite":
        # A record is stored whole, and so are the dead letters of a batch.
        sizes = {"record_bytes_max": pipeline.record_bytes_max}
        sizes["batch.bytes_max"] = pipeline.batch.bytes_max
        for key, size in sizes.items():
            if text := beyond_a_row(size):
                yield key, text


SCHEMA = Schema(Settings)
"""The keys of all settings."""
