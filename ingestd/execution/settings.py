"""Settings of the handler, of the executor that runs it, and of retries."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ingestd.config.sections import Choice, Section
from ingestd.config.units import Count, PerSecond, Seconds, Size, Words, show_seconds
from ingestd.handlers.options import FilePath, options_of
from ingestd.handlers.target import own_sink
from ingestd.registry import EXECUTORS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from concurrent.futures import Executor

OPTIONS_DEPTH_MAX = 16

_MIB = 1024**2
_TIB = 1024**4
_DAY = 86400.0


def _options(value: object) -> object:
    return _plain_data(value, OPTIONS_DEPTH_MAX)


def _plain_data(value: object, depth: int) -> object:
    """Checks that a value is plain data, which worker processes get unchanged."""
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


def _callable(value: str) -> str:
    module, colon, name = value.partition(":")
    if value and not (module and colon and name):
        raise ValueError("should be module:callable")
    return value


with warnings.catch_warnings():
    # Of `validate`, which hides a method of pydantic's that has another name since version 2.
    warnings.filterwarnings("ignore", 'Field name "validate"', UserWarning)

    class HandlerSettings(Section):
        """`[handler]`: the handler that gets the batches."""

        target: str = Field(
            "jsonl", min_length=1, description="module:name of your function or class, or a sink"
        )
        options: Annotated[dict[str, Any], BeforeValidator(_options)] = Field(
            default_factory=dict, description="keyword arguments for a handler class or a sink"
        )

        transform: Annotated[str, AfterValidator(_callable)] = Field(
            "", description="module:callable for each record in front of the handler"
        )
        targets: Words = Field(
            (),
            max_length=16,
            description="handlers that get each batch, in order, instead of target",
        )

        validate: Literal["process", "accept"] = Field(  # type: ignore[assignment]
            "process",
            description="place where records have to fit the handler's annotation: process: its"
            " worker; accept: before they are accepted, so that clients are told",
        )

        @property
        def all_targets(self) -> tuple[str, ...]:
            """The handlers that get each batch, in order."""
            return self.targets or (self.target,)

        def options_for(self, target: str) -> Mapping[str, Any]:
            """The options of one of the handlers."""
            return self.options.get(target, {}) if self.targets else self.options

        def path_options(self) -> Collection[tuple[str, ...]]:
            """See `Section`."""
            found = {target: options_of(own_sink(target)) for target in self.all_targets}
            return [
                (target, name) if self.targets else (name,)
                for target, struct in found.items()
                if struct is not None
                for name in struct.named(FilePath)
            ]


class ExecutorSettings(Section):
    """`[executor]`: the executor that runs the handler, and its workers."""

    kind: Annotated[str, Choice(EXECUTORS.names)] = Field(
        "auto",
        description="auto: process for your function, async for your coroutine, thread for a sink",
    )
    factory: Annotated[str, AfterValidator(_callable)] = Field(
        "", description="module:callable that returns a concurrent.futures.Executor for the handler"
    )
    workers: Count = Field(
        4, ge=1, le=1024, description="maximum of batches that are handled at once"
    )
    workers_max: Count = Field(
        0, ge=0, le=1024, description="up to so many while latency stays flat; 0: always workers"
    )
    timeout: Seconds = Field(60.0, gt=0, le=30 * _DAY, description="timeout of one call")
    batches_per_second: PerSecond = Field(
        0.0, ge=0, le=10**6, description="maximum of calls a second, retries included; 0: no limit"
    )
    records_per_second: PerSecond = Field(
        0.0, ge=0, le=10**9, description="maximum of records in these a second; 0: no limit"
    )

    @property
    def is_throttled(self) -> bool:
        """Tells if calls are held to a rate."""
        return self.batches_per_second > 0 or self.records_per_second > 0

    @property
    def own(self) -> Any:
        """The table `[executor.KIND]` of its kind; `None` if that has none."""
        return getattr(self, self.kind, None)


class ExecutorKind:
    """Base class of a kind of executor with settings of its own, in the table `[executor.NAME]`.

    It is imported with the settings, also for `--help`: what is large is imported in `build`.

    Attributes:
        settings: its table.
    """

    settings: ClassVar[type[Section]] = Section

    def problems(self, own: Any) -> Iterable[tuple[str, str]]:  # noqa: ARG002
        """Finds settings that cannot work together: (key in the table, problem) for each."""
        return ()

    def build(self, own: Any) -> Executor:
        """Builds an executor, as the callable of `executor.factory` does; may block.

        Called in a thread, and again after an executor has failed.
        """
        raise NotImplementedError


class RetrySettings(Section):
    """`[retry]`: retries of batches whose handler raised."""

    attempts_max: Count = Field(
        8, ge=1, le=10**6, description="maximum of tries, the first one included"
    )
    backoff: Seconds = Field(
        0.5, ge=0, le=_DAY, description="wait before the second try; doubles with each further one"
    )
    backoff_max: Seconds = Field(60.0, ge=0, le=30 * _DAY, description="longest wait between tries")
    waiting_records_max: Count = Field(
        50_000,
        ge=1,
        le=10**9,
        description="bound of records that wait for a retry; then new ones are probes only",
    )
    waiting_bytes_max: Size = Field(
        256 * _MIB, ge=1, le=1024 * _TIB, description="bound of their bytes in the journal"
    )
    give_up_after: Seconds = Field(
        _DAY,
        ge=0,
        le=3650 * _DAY,
        description="time after which a failing record is given up although nothing succeeds",
    )


def uncalled(handler: HandlerSettings) -> str:
    """Explains why `handler.target` would never be called; empty if it would."""
    if not handler.targets:
        return ""
    return f"{handler.target} would get nothing, as handler.targets is set too"


def problems_of(
    retry: RetrySettings, executor: ExecutorSettings, handler: HandlerSettings
) -> Iterator[tuple[str, str]]:
    """Finds settings that cannot work together: (key, what is wrong) for each."""
    is_default = handler.target == HandlerSettings.model_fields["target"].default
    if not is_default and (problem := uncalled(handler)):
        # It may be a HANDLER of the command line, which would never be called.
        yield "handler.target", problem
    for target in handler.targets:
        if handler.targets.count(target) > 1:
            yield "handler.targets", f"{target} is there more than once"
    for name, table in handler.options.items() if handler.targets else ():
        if name not in handler.targets:
            yield "handler.options", f"{name!r} is none of handler.targets, which have a table each"
        elif not isinstance(table, dict):
            yield "handler.options", f"{name!r} should be a table, of the options of that target"
    if retry.backoff_max < retry.backoff:
        longest, first = show_seconds(retry.backoff_max), show_seconds(retry.backoff)
        yield "retry.backoff_max", f"{longest} is shorter than retry.backoff ({first})"
    if 0 < executor.workers_max < executor.workers:
        problem = f"{executor.workers_max} is less than executor.workers ({executor.workers})"
        yield "executor.workers_max", problem
    if executor.factory and executor.kind != "auto":
        problem = "executor.factory says what the handler runs in; leave it out"
        yield "executor.kind", f"{problem} (it is {executor.kind})"
