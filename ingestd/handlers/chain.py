"""A function of one record in front of a handler, and several handlers for one batch.

`handler.transform` gets each record and gives one record, `None` for none, or a list of several.
What it gives travels under the batch's id; the first record that is made of one keeps its id, the
others have a number behind it. `Reject`, and any exception, is that record's; `Retry`,
`Unavailable` and `Blocked` are the batch's.

`handler.targets` are called in order, each with the same records under the same id. The batch is
done when all are done. When one fails, all are called again, under the same id: this is why each
of them has to know a batch that it has stored. What one rejects becomes a dead letter, and the
others get it all the same. Where one of several wants single records again the batch is tried again
whole, for under a new id the others would take these records for new ones.

With `handler.validate = "accept"` a process has a `Validation` in place of all that: it decodes
what a source received, with the decoders that a worker has, and calls nothing.
"""

from __future__ import annotations

import asyncio
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import msgspec

from ingestd.base import envelope as envelopes
from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch, Blocked, PartFailed, Reject, Retry, Unavailable
from ingestd.handlers.call import call, call_async, check_of, close, close_async
from ingestd.handlers.decode import CannotDecode, Decoder, decoder_for, json_schema
from ingestd.handlers.load import (
    HandlerSpec,
    NotAHandler,
    annotation_of,
    check_executor,
    code_of,
    load,
)
from ingestd.handlers.outcome import (
    UNAVAILABLE,
    Failure,
    Job,
    Rejection,
    Result,
    SinkFinding,
    SinkRun,
    error_kind,
)
from ingestd.handlers.target import find, refuse
from ingestd.handlers.text import describe, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ingestd.handlers.runner import HandlerConfig

T = TypeVar("T")


class Transformed(NamedTuple):
    """A job behind a transform.

    Attributes:
        job: with the records that were made; `None` if there are none.
        places: for each of them the place of the record that it was made of.
        rejections: of records that it said no to.
    """

    job: Job | None
    places: Sequence[int]
    rejections: list[Rejection]


class Transform:
    """The function of `handler.transform`.

    Args:
        target: `module:callable`.
        record_format: `json`, `text` or `bytes`, of what comes and of what is made.

    Attributes:
        decoder: of what comes.

    Raises:
        HandlerLoadError: it is none, or its annotation does not fit the format.
    """

    def __init__(self, target: str, record_format: str) -> None:
        self.target = target
        found: Any = find(target)
        if isinstance(found, type) or not callable(found):
            refuse(target, "handler.transform is a function of one record")
        code = getattr(code_of(found), "__code__", None)
        if code is not None and code.co_flags & _NOT_PLAIN:
            refuse(target, "handler.transform returns what it makes: no async, no yield")
        try:
            wanted = "a transform is called with one argument, the record"
            self.decoder = decoder_for(annotation_of(found, wanted), record_format)
        except (NotAHandler, CannotDecode) as error:
            refuse(target, str(error), error)
        self._function: Callable[[Any], Any] = found
        self._encode = _ENCODERS[record_format]

    def apply(self, job: Job) -> Transformed:
        """Calls the function with each record.

        Raises:
            Exception: `Retry`, `Unavailable` or `Blocked` of the function's, or a MemoryError.
        """
        values, rejections = self.decoder.decode(job.records)
        gone = {one.index for one in rejections}
        ids = Batch(None, job).ids
        made: list[bytes] = []
        names: list[str] = []
        places: list[int] = []
        left = (place for place in range(job.records.count) if place not in gone)
        for place, value in zip(left, values, strict=True):
            try:
                found = self._made(value)
            except (Retry, Unavailable, Blocked, MemoryError):
                raise
            except Reject as said:
                rejections.append(Rejection(place, "rejected", plain(said.why)))
                continue
            except Exception as error:  # noqa: BLE001  it is the user's code
                rejections.append(Rejection(place, "rejected", describe(error)))
                continue
            made += found
            places += [place] * len(found)
            names += [f"{ids[place]}-{n}" if n else ids[place] for n in range(len(found))]
        if not made:
            return Transformed(None, (), rejections)
        has_breaks = any(b"\n" in one for one in made)
        records = Records.sized(made) if has_breaks else Records.lines(made)
        records = records._replace(names=tuple(names), envelopes=_envelopes(job.records, places))
        job = msgspec.structs.replace(job, records=records, spans=[Span(0, 0, len(made))])
        return Transformed(job, places, rejections)

    def _made(self, value: Any) -> list[bytes]:
        given = self._function(value)
        if given is None:
            return []
        every = given if type(given) is list else [given]
        return [self._encode(one) for one in every]


def _envelopes(records: Records, places: Sequence[int]) -> bytes:
    """The envelopes of what was made of the records at some places."""
    if not records.envelopes:
        return b""
    every = envelopes.singles(records.envelopes, records.count)
    return envelopes.joined([(1, every[place]) for place in places])


_NOT_PLAIN = 0x20 | 0x80 | 0x200  # inspect.CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR
_well_formed = msgspec.json.Decoder(msgspec.Raw).decode


def _json(value: Any) -> bytes:
    if isinstance(value, bytes):
        _well_formed(value)
        return value
    return msgspec.json.encode(value)


def _text(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str.encode(value)


def _bytes(value: Any) -> bytes:
    return bytes(memoryview(value))


_ENCODERS: dict[str, Callable[[Any], bytes]] = {"json": _json, "text": _text, "bytes": _bytes}


# -- several handlers ------------------------------------------------------------------------------


class ChainPart(NamedTuple):
    """One handler of a chain.

    Attributes:
        spec: of the handler.
        options: its own.
    """

    spec: HandlerSpec
    options: Mapping[str, object]


class Chain:
    """The instance that a worker calls: a transform, then each handler."""

    def __init__(
        self, transform: Transform | None, parts: Sequence[tuple[HandlerSpec, Any]]
    ) -> None:
        self._transform = transform
        self._parts = parts

    def __call__(self, batch: Batch[bytes]) -> None:
        """Calls all of it with a batch.

        Raises:
            PartFailed: one of the handlers failed; the others may have stored the batch.
        """
        changed = self._changed(batch)
        if changed.job is None:
            return
        for spec, handler in self._parts:
            self._take(batch, spec, changed, call(spec, handler, changed.job))

    def _changed(self, batch: Batch[bytes]) -> Transformed:
        job = batch.job
        if self._transform is None:
            return Transformed(job, range(job.records.count), [])
        changed = self._transform.apply(job)
        for rejection in changed.rejections:
            batch.adopt(rejection)
        return changed

    def _take(
        self, batch: Batch[bytes], spec: HandlerSpec, changed: Transformed, result: Result
    ) -> None:
        """Says of the batch's records what a handler said of those that were made of them."""
        several = len(self._parts) > 1
        prefix = f"{spec.target}: " if several else ""
        count = changed.job.records.count if changed.job is not None else 0
        failure = result.failure
        done = 0 if failure else count - len(result.rejections) - len(result.retries)
        error = error_kind(failure) if failure else ""
        batch.runs.append(SinkRun(len(batch.runs), result.seconds, done, error))
        if result.failure is not None:
            raise PartFailed(_prefixed(result.failure, prefix))
        if several and result.retries:
            first = result.retries[0]
            error = f"{prefix}{len(result.retries)} records are to be tried again: {first.error}"
            is_down = all(one.is_unavailable for one in result.retries)
            raise PartFailed(Failure(UNAVAILABLE if is_down else "raised", plain(error)))
        for retry in result.retries:
            place = changed.places[retry.index]
            batch.adopt(msgspec.structs.replace(retry, index=place))
        for one in result.rejections:
            place = changed.places[one.index]
            batch.adopt(Rejection(place, one.reason, plain(prefix + one.error)))

    def check(self) -> list[SinkFinding]:
        """Findings of each handler that has a `check()`; one that fails hides no other."""
        found: list[SinkFinding] = []
        for spec, handler in self._parts:
            try:
                look = check_of(spec, handler)
                found += self._prefixed(spec, look() if look is not None else ())
            except Exception as error:  # noqa: BLE001  a sink that is down, say
                found += self._prefixed(spec, [SinkFinding("error", describe(error))])
        return found

    def _prefixed(self, spec: HandlerSpec, found: Iterable[SinkFinding]) -> list[SinkFinding]:
        prefix = f"{spec.target}: " if len(self._parts) > 1 else ""
        return [SinkFinding(one.level, prefix + one.text) for one in found]

    def close(self) -> None:
        """Closes every handler.

        Raises:
            PartFailed: one of them did not close; the others did.
        """
        self._raise([close(spec, handler) for spec, handler in self._parts])

    def _raise(self, failures: Sequence[Failure | None]) -> None:
        for failure in failures:
            if failure is not None:
                raise PartFailed(failure)


class AsyncChain(Chain):
    """A chain with a handler that has to be awaited; the others run in threads meanwhile."""

    async def __call__(self, batch: Batch[bytes]) -> None:  # type: ignore[override]
        """See `Chain`."""
        changed = await _beside(self._changed, batch)
        job = changed.job
        if job is None:
            return
        for spec, handler in self._parts:
            if spec.is_async:
                result = await call_async(spec, handler, job)
            else:
                result = await _beside(call, spec, handler, job)
            self._take(batch, spec, changed, result)

    async def check(self) -> list[SinkFinding]:  # type: ignore[override]
        """See `Chain`."""
        found: list[SinkFinding] = []
        for spec, handler in self._parts:
            try:
                look = check_of(spec, handler)
                given = look() if look is not None else ()
                found += self._prefixed(spec, await given if isawaitable(given) else given)
            except Exception as error:  # noqa: BLE001
                found += self._prefixed(spec, [SinkFinding("error", describe(error))])
        return found

    async def close(self) -> None:  # type: ignore[override]
        """See `Chain`."""
        self._raise(
            [
                await close_async(spec, handler) if spec.is_async else close(spec, handler)
                for spec, handler in self._parts
            ]
        )


async def _beside(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a thread; one that is cancelled ends no sooner than the function.

    Else the next batch would have the instances that the thread is still in, or they be closed.
    """
    cancelled = False

    def unless_cancelled() -> T | None:
        return None if cancelled else function(*arguments)

    running = asyncio.ensure_future(asyncio.to_thread(unless_cancelled))
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        running.exception()  # nobody asks for it any more
        raise asyncio.CancelledError
    return cast("T", running.result())


def _prefixed(failure: Failure, prefix: str) -> Failure:
    if not prefix:
        return failure
    return msgspec.structs.replace(failure, error=plain(prefix + failure.error))


class ChainSpec(NamedTuple):
    """Facts about a chain before it is made; has what `HandlerSpec` has."""

    target: str
    transform: Transform | None
    parts: tuple[ChainPart, ...]
    is_async: bool
    is_class: bool = True
    wants_batch: bool = True
    decoder: Decoder = Decoder(None)

    @property
    def full_name(self) -> str:
        """The names of all its parts, in order."""
        names = [part.spec.full_name for part in self.parts]
        return " > ".join([self.transform.target, *names] if self.transform else names)

    def check_options(self, _options: Mapping[str, object]) -> None:
        """See `HandlerSpec.check_options`."""
        for part in self.parts:
            part.spec.check_options(part.options)

    def secrets_of(self, _options: Mapping[str, object]) -> list[str]:
        """See `HandlerSpec.secrets_of`."""
        return [one for part in self.parts for one in part.spec.secrets_of(part.options)]

    def create(self, _options: Mapping[str, object], **place: str) -> Chain:
        """See `HandlerSpec.create`."""
        made: list[tuple[HandlerSpec, Any]] = []
        try:
            for spec, options in self.parts:
                made.append((spec, spec.create(options, **place)))
        except BaseException:
            for spec, handler in made:
                close(spec, handler)
            raise
        return (AsyncChain if self.is_async else Chain)(self.transform, made)


def load_configured(config: HandlerConfig) -> HandlerSpec | ChainSpec:
    """The handler of a pipeline, with what stands in front of it and beside it.

    Raises:
        HandlerLoadError: a part of it can't be loaded, or can't run in this executor.
    """
    record_format, executor = config.record_format, config.executor
    if config.validates:
        return load_validation(config)
    if not (config.transform or config.targets):
        return load(config.target, record_format=record_format, executor=executor)
    targets = config.targets or (config.target,)
    parts = []
    for target in targets:
        options = config.options.get(target, {}) if config.targets else config.options
        parts.append(ChainPart(load(target, record_format=record_format, executor="auto"), options))
    transform = Transform(config.transform, record_format) if config.transform else None
    name, is_async = ", ".join(targets), any(part.spec.is_async for part in parts)
    check_executor(name, executor, is_async=is_async)
    return ChainSpec(name, transform, tuple(parts), is_async)


# -- validation without a handler ------------------------------------------------------------------

SCHEMA_BYTES_MAX = 128 * 1024
"""A larger schema is not told."""


class Validation:
    """Decodes batches, and rejects the records that do not fit.

    Args:
        decoders: each has to take a record.
        name: of the pipeline.
    """

    def __init__(self, decoders: Sequence[Decoder], name: str) -> None:
        self._decoders = decoders
        self._name = name

    def __call__(self, batch: Batch[bytes]) -> None:
        """Rejects what does not fit; the first decoder that refuses a record says why."""
        for decoder in reversed(self._decoders):
            for rejection in decoder.decode(batch.job.records)[1]:
                batch.adopt(rejection)

    @property
    def schema(self) -> bytes:
        """`[schema, {name: schema that it refers to}]` as JSON; empty if there is none to tell."""
        try:
            made = [json_schema(one.record, f"{self._name}.") for one in self._decoders]
            schemas = [schema for schema, _ in made]
            schema = schemas[0] if len(schemas) == 1 else {"allOf": schemas}
            named = {name: one for _, others in made for name, one in others.items()}
            told = msgspec.json.encode([schema, named])
        except Exception:  # noqa: BLE001  a type of the user's may have none, or raise
            return b""
        return told if len(told) <= SCHEMA_BYTES_MAX else b""


def load_validation(config: HandlerConfig) -> HandlerSpec:
    """The `Validation` that a process calls in place of the handler of a pipeline.

    Records are decoded as a transform asks, if there is one: what it makes is not there yet.

    Raises:
        HandlerLoadError: a part of it can't be loaded, or every record fits.
    """
    form = config.record_format
    targets = (config.transform,) if config.transform else config.targets or (config.target,)
    if config.transform:
        decoders = [Transform(config.transform, form).decoder]
    else:
        decoders = [load(one, record_format=form, executor="auto").decoder for one in targets]
    checking = [one for one in decoders if one.one is not None and one.record is not Any]
    name = ", ".join(targets)
    if not checking:
        refuse(
            name,
            'handler.validate = "accept" has nothing to validate, because its annotation takes'
            f" every record of the format {form}: name a type in it, or leave handler.validate out",
        )
    validation = Validation(checking, config.pipeline)
    return HandlerSpec(
        name, validation, form, is_class=False, is_async=False, wants_batch=True,
        decoder=Decoder(None),
    )  # fmt: skip
