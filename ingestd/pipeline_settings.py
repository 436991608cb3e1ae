"""Settings of a pipeline: its sections, what it inherits, and what suits its sink."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from ingestd.base.record import Format  # noqa: TC001  pydantic reads it
from ingestd.codecs.lines import record_fault
from ingestd.config.sections import (
    Own,
    Reloadable,
    Section,
    defaults_of,
    table_fault,
    unusable,
    with_tables,
)
from ingestd.config.units import Count, Seconds, Size, parse_size, parse_words, show_size
from ingestd.execution.settings import (
    ExecutorKind,
    ExecutorSettings,
    HandlerSettings,
    RetrySettings,
)
from ingestd.execution.settings import problems_of as execution_problems
from ingestd.handlers.target import own_sink
from ingestd.journal.settings import (
    DeadSettings,
    DedupeSettings,
    JournalKind,
    JournalSettings,
    JsonPointer,
    beyond_a_row,
)
from ingestd.registry import EXECUTORS, JOURNALS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ingestd.registry import Components

_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_DAY = 86400.0
_WINDOW_MAX = 64
"""Batches that are filled as one."""


# -- kinds of journals and executors, with the tables of those that have settings of their own -----


def _kinds(components: Components, base: type, above: type[Section]) -> Kinds:
    def is_kind(kind: Any) -> bool:
        return isinstance(kind, type) and issubclass(kind, base)

    def fault(name: str, kind: Any) -> str:
        # A function has no settings.
        return table_fault(name, kind.settings, above) if is_kind(kind) else ""

    kinds, faults = components.load_kinds(fault)
    made = {name: kind() for name, kind in kinds.items() if is_kind(kind)}
    tables: dict[str, type[Section]] = {name: kind.settings for name, kind in made.items()}
    tables |= {
        name: unusable(Section, fault)
        for name, fault in faults.items()
        if not table_fault(name, Section, above)
    }
    return Kinds(made, faults, with_tables(above, tables))


class Kinds(NamedTuple):
    """Kinds of a component of a pipeline that other packages add.

    Attributes:
        made: those with settings of their own, by name.
        unusable: why others cannot be used.
        model: the section, with a table for each.
    """

    made: Mapping[str, Any]
    unusable: Mapping[str, str]
    model: Any


_KINDS = {
    "journal": _kinds(JOURNALS, JournalKind, JournalSettings),
    "executor": _kinds(EXECUTORS, ExecutorKind, ExecutorSettings),
}
if TYPE_CHECKING:
    JournalTables = JournalSettings
    ExecutorTables = ExecutorSettings
else:
    JournalTables = _KINDS["journal"].model
    ExecutorTables = _KINDS["executor"].model


def _of_a_kind(key: str, section: JournalSettings | ExecutorSettings) -> Iterator[tuple[str, str]]:
    """Finds what is wrong with the kind that a section names, and in its table."""
    kinds, name = _KINDS[key], section.kind
    if name in kinds.unusable:
        yield f"{key}.kind", kinds.unusable[name]
    elif name in kinds.made:
        for inner, text in kinds.made[name].problems(section.own):
            yield f"{key}.{name}.{inner}", text


class BatchSettings(Section):
    """`[batch]`: bounds of a batch; the first one that is met closes it."""

    records_max: Annotated[Count, Reloadable()] = Field(
        1000, ge=1, le=10**7, description="maximum of records in a batch"
    )
    bytes_max: Annotated[Size, Reloadable()] = Field(
        4 * _MIB, ge=1, le=16 * _GIB, description="maximum of bytes in a batch"
    )
    age_max: Annotated[Seconds, Reloadable()] = Field(
        1.0, ge=0, le=_DAY, description="maximum age of a batch, from its oldest record on"
    )
    key: JsonPointer = Field(
        "", description="JSON Pointer of a value; records with the same one are handled in order"
    )

    def bounds(self) -> dict[str, Any]:
        """Returns the bounds by name."""
        return self.model_dump(include={"records_max", "bytes_max", "age_max"})


class RouteSettings(Section):
    """`[route]`: other pipelines for some of the records that come to this one."""

    field: JsonPointer = Field(
        "", description="JSON Pointer of the value that chooses a pipeline; empty: none does"
    )
    to: dict[str, str] = Field(
        default_factory=dict,
        max_length=1000,
        description="pipelines by value, in which * is any characters",
    )
    default: str = Field(
        "", description="pipeline of records with another value, or none; empty: they are invalid"
    )

    @property
    def targets(self) -> dict[str, str]:
        """The pipelines that it names, by the key in the section."""
        named = {f"to.{value}": to for value, to in self.to.items()}
        return {**named, "default": self.default} if self.default else named


def route_problems(
    name: str, pipelines: Mapping[str, PipelineSettings]
) -> Iterator[tuple[str, str]]:
    """Finds what is wrong with the route of a pipeline: (key, problem) for each.

    Args:
        name: of the pipeline.
        pipelines: all of them.
    """
    own = pipelines[name]
    route = own.route
    if not route.field:
        if route.targets:
            yield "route.field", "is empty: name the value that chooses, as /type"
        return
    if own.format != "json":
        yield "route.field", f"records of the format {own.format} have no fields"
    if not route.targets:
        yield "route.to", "is empty, and so is route.default: no record could be accepted"
    for key, to in route.targets.items():
        if to not in pipelines:
            yield f"route.{key}", f"there is no pipeline {to!r}"
            continue
        other = pipelines[to]
        if other.format != "json":
            yield f"route.{key}", f"{to!r} has the format {other.format}, not json"
        elif to != name and other.route.field:
            yield f"route.{key}", f"{to!r} has a route itself, and a record is routed once"
        for bound in ("record_bytes_max", "json_depth_max"):
            if getattr(other, bound) < getattr(own, bound):
                yield f"route.{key}", f"{bound} of {to!r} is less than that of {name!r}"


class QueueSettings(Section):
    """`[queue]`: bounds of the records in memory; beyond them records wait on disk."""

    chunks_max: Count = Field(1024, ge=1, le=10**6, description="maximum of chunks in memory")
    bytes_max: Size = Field(16 * _MIB, ge=1, le=_TIB, description="maximum of bytes in memory")


class PipelineDrainSettings(Section):
    """`[pipelines.NAME.drain]`: draining of a pipeline."""

    timeout: Seconds = Field(
        30.0, ge=0, le=_DAY, description="time limit; records that are left stay in the journal"
    )


class PipelineSettings(Section):
    """One pipeline, everything filled in. The daemon gets these from `pipeline_settings()`."""

    EXAMPLE = ("clicks", ("handler", "target"))

    format: Format = Field("json", description="format of the records")
    record_bytes_max: Size = Field(_MIB, ge=1, le=_GIB, description="largest record")
    json_depth_max: Count = Field(128, ge=1, le=512, description="deepest nesting of a JSON record")
    batch: Own[BatchSettings] = defaults_of(BatchSettings)
    queue: Own[QueueSettings] = defaults_of(QueueSettings)
    handler: Own[HandlerSettings] = defaults_of(HandlerSettings)
    executor: Own[ExecutorTables] = defaults_of(ExecutorTables)
    retry: Own[RetrySettings] = defaults_of(RetrySettings)
    journal: Own[JournalTables] = defaults_of(JournalTables)
    dead: Own[DeadSettings] = defaults_of(DeadSettings)
    dedupe: Own[DedupeSettings] = defaults_of(DedupeSettings)
    drain: Own[PipelineDrainSettings] = defaults_of(PipelineDrainSettings)
    route: Own[RouteSettings] = defaults_of(RouteSettings)

    def batch_window(self) -> dict[str, int]:
        """The window of the batcher: with `batch.key` two batches for each worker, filled as one.

        As many batches without a common key can be with the workers, and lie ready before them.
        """
        if not self.batch.key:
            return {}
        workers = max(self.executor.workers, self.executor.workers_max)
        most = min(2 * workers, _WINDOW_MAX)
        window = 1 << (most - 1).bit_length()
        return {"window": window, "window_bytes_max": self.queue.bytes_max // 2}

    def record_fault(self, value: bytes) -> str:
        """Describes in one line why bytes are no record of this pipeline; empty if they are."""
        return record_fault(value, self.format, self.record_bytes_max, self.json_depth_max)


def plain(value: Any) -> Any:
    """A model as the table that was written for it; anything else as it is."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in value.model_fields_set}
    return value


def inherit(top: Mapping[str, Any], table: Any) -> Any:
    """A pipeline's table with what it leaves out from the top level, before any checking."""
    if not isinstance(table, Mapping):
        return table
    filled = dict(table)
    for key, field in PipelineSettings.model_fields.items():
        if key not in top or (key == "handler" and key in table) or key == "route":
            continue
        above, own = plain(top[key]), plain(table.get(key, {}))
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            filled.setdefault(key, above)
        elif isinstance(above, Mapping) and isinstance(own, Mapping):
            known = {name: value for name, value in above.items() if name in section.model_fields}
            filled[key] = _merged(known, own, section)
    return filled


def _merged(
    above: Mapping[str, Any], own: Mapping[str, Any], section: type[BaseModel]
) -> dict[str, Any]:
    """A section with what it leaves out from the one above, and the tables in it likewise."""
    merged = {**above, **own}
    for name in above.keys() & own.keys():
        inner, outer = plain(own[name]), plain(above[name])
        within = section.model_fields[name].annotation if name in section.model_fields else None
        if (
            isinstance(within, type)
            and issubclass(within, BaseModel)
            and isinstance(inner, Mapping)
            and isinstance(outer, Mapping)
        ):
            merged[name] = _merged(outer, inner, within)
    return merged


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


def with_hints(table: Any) -> Any:
    """A pipeline's table, with the bounds that suit its sink where the user says nothing."""
    if not isinstance(table, Mapping):
        return table
    handler, batch, queue = (plain(table.get(key, {})) for key in ("handler", "batch", "queue"))
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


def problems_of(pipeline: PipelineSettings) -> Iterator[tuple[str, str]]:
    """Finds settings of a pipeline that cannot work together: (key, what is wrong) for each."""
    yield from _of_a_kind("journal", pipeline.journal)
    yield from _of_a_kind("executor", pipeline.executor)
    yield from execution_problems(pipeline.retry, pipeline.executor, pipeline.handler)
    for key, pointer in {
        "batch.key": pipeline.batch.key,
        "dedupe.key": pipeline.dedupe.key,
    }.items():
        if pointer and pipeline.format != "json":
            yield key, f"a value in a record needs format = json (it is {pipeline.format})"
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
