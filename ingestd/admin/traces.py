"""Traces: spans of requests and of tries of batches, sent to an OpenTelemetry collector over OTLP.

The daemon has two kinds of spans. A *request span* begins when a request with records has been let
in, and ends with its answer; its parent is the span of the client. From there on the request is
part of that span: its `traceparent` stands in the log and in the envelopes of its records, in place
of the client's. An *attempt span* is one call of the handler with one batch. Batches gather records
of many traces, so it begins a trace of its own, with a link to each request span that its records
came by.

Invariants:

1. Without `traces.enabled` nothing here is imported, and requests and batches cost one comparison
   with `None`.
2. Nothing waits for the collector. Spans wait in the queue of OpenTelemetry's `BatchSpanProcessor`
   (`OTEL_BSP_MAX_QUEUE_SIZE`, 2,048), from which a thread of its own sends them; beyond it the
   oldest go. Leaving waits for them for `CLOSE_SECONDS`, and leaves the thread behind then.
3. A batch has `LINKS_MAX` links at most, or `OTEL_SPAN_LINK_COUNT_LIMIT`, and at most
   `LOOKED_MAX` different envelopes are read for them.
4. The decision is made before a span is. Of requests without a trace the part `traces.ratio` begins
   one; the others keep the quick way (`sources/http/quick.py`). A batch has attempt spans if one of
   its records is in a trace that is sampled; if none of them is in any trace, by the same ratio and
   its id, so that all of its tries have one or none has.
5. A span has names, numbers and classes of errors: no payload, and no message of an error, because
   that may quote one.
6. At most `ANSWER_BYTES_MAX` of a collector's answer are held; the connection of a longer one is
   dropped. A credential provider's session (`OTEL_PYTHON_EXPORTER_OTLP_HTTP_*`) stays as it is.
7. What OpenTelemetry logs goes to the daemon's log and nowhere else, each kind of line once in
   `LOG_SECONDS`, and without the secrets of its environment variables, which it quotes.

Everything that OpenTelemetry's environment variables say (the collector's address, headers,
certificates, the sampler, the name of the service, the bounds of queue and spans) is left to them:
operators know them, and settings of the same meaning would contradict them. `ratio` is not one of
these: a sampler is asked with a span at hand, which costs more than a quick request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
import zlib
from collections import deque
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import msgspec

from ingestd import __version__
from ingestd.base.append import AppendCounts
from ingestd.base.envelope import EnvelopeRuns
from ingestd.base.errors import ConfigError
from ingestd.base.logging import get_logger
from ingestd.base.tasks import OwnThread
from ingestd.handlers.options import redactor
from ingestd.handlers.outcome import error_kind

try:
    from opentelemetry import trace
    from opentelemetry.context import Context, attach, detach
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from requests import Session
except ImportError as error:
    _missing = str(error)
else:
    _missing = ""
    _ROOT = Context()
    _FLAGS = TraceFlags(0), TraceFlags(TraceFlags.SAMPLED)
    _extract = TraceContextTextMapPropagator().extract

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from ingestd.base.append import Append
    from ingestd.base.batch import TriedBatch
    from ingestd.handlers.outcome import Job, Result
    from ingestd.pipeline import Pipeline

CLOSE_SECONDS = 2.0
"""How long leaving waits for the last spans to be sent."""
ANSWER_BYTES_MAX = 65_536
LINKS_MAX = 128
LOOKED_MAX = 1000
LOG_SECONDS = 60.0
LOG_KINDS_MAX = 100
WANTED_MAX = 100

ABANDONED = "abandoned"
"""The outcome of a try whose worker was ended with it."""

_LIBRARY = "opentelemetry"
_SYSTEM = "ingestd"
_PROVIDERS = [
    f"OTEL_PYTHON_EXPORTER_OTLP_HTTP_{kind}CREDENTIAL_PROVIDER" for kind in ("", "TRACES_")
]
_SERVER_ERROR = 500
_SECRET_CHARS_MIN = 6
"""A shorter word is no secret, but part of others."""

log = get_logger()


def demand_opentelemetry() -> None:
    """Checks that traces can be made.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if _missing:
        raise ConfigError(
            problem="traces.enabled: needs OpenTelemetry's SDK and its exporter over HTTP:"
            f" pip install 'ingestd[otel]' ({_missing})"
        )


class Traces:
    """The traces of a daemon. It is the process's tracer provider, also for handlers in threads.

    Args:
        ratio: part of the requests without a trace that begins one, from 0 to 1.

    Attributes:
        requests: traces requests.

    Raises:
        ConfigError: OpenTelemetry is not installed, or an environment variable of its is wrong.
    """

    def __init__(self, ratio: float) -> None:
        demand_opentelemetry()
        self._logs = _LibraryLogs()
        try:
            resource = Resource.create()
            if str(resource.attributes["service.name"]).startswith("unknown_service"):
                named = Resource({"service.name": _SYSTEM, "service.version": __version__})
                resource = resource.merge(named)
            limits = SpanLimits()
            self._provider = TracerProvider(
                resource=resource, span_limits=limits, shutdown_on_exit=False
            )
            self._provider.add_span_processor(BatchSpanProcessor(_exporter()))
        except Exception as error:
            self._logs.end()
            told = self._logs.redact(str(error))
            problem = f"traces: OpenTelemetry's environment variables do not do: {told}"
            raise ConfigError(problem=problem) from error
        trace.set_tracer_provider(self._provider)
        tracer = self._provider.get_tracer(_SYSTEM, __version__)
        self.requests = RequestTraces(tracer, ratio)
        links = LINKS_MAX if limits.max_links is None else min(limits.max_links, LINKS_MAX)
        self._of = partial(AttemptTraces, tracer, ratio=ratio, links_max=links)
        self._attempts: list[AttemptTraces] = []

    def follow(self, pipeline: Pipeline) -> None:
        """Has each try of a batch of a pipeline traced."""
        attempts = self._of(pipeline.name)
        self._attempts.append(attempts)
        pipeline.dispatcher.around = attempts.run
        pipeline.settlements.recent.on_tried = attempts.tried

    async def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Ends what is open, sends what waits for so long at most, and ends."""
        for one in self._attempts:
            one.close()
        thread = OwnThread("traces-end")
        ending = asyncio.get_running_loop().run_in_executor(thread, self._provider.shutdown)
        thread.shutdown(wait=False)
        done, _ = await asyncio.wait({ending}, timeout=seconds)
        if not done:
            log.warning("spans_abandoned", problem=f"the collector took none for {seconds:g} s")
        self._logs.end()


# -- the collector ---------------------------------------------------------------------------------


def _exporter() -> OTLPSpanExporter:
    """Makes what sends spans. A session that is given to it takes the place of a provider's."""
    if any(os.environ.get(name) for name in _PROVIDERS):
        return OTLPSpanExporter()
    session = Session()
    session.hooks["response"].append(_bound_answer)
    return OTLPSpanExporter(session=session)


def _bound_answer(response: Any, **_: Any) -> None:
    """Bounds the body of an answer, before it is read: the exporter reads it whole."""
    raw = response.raw
    pieces = raw.stream

    def bounded(*args: Any, **options: Any) -> Iterator[bytes]:
        size = 0
        for piece in pieces(*args, **options):
            size += len(piece)
            if size > ANSWER_BYTES_MAX:
                raw.close()
                return
            yield piece

    raw.stream = bounded


# -- requests --------------------------------------------------------------------------------------


class _RequestSpan:
    """The span of a request in progress, and the records of it that were accepted."""

    __slots__ = ("records", "span")

    def __init__(self, span: Any) -> None:
        self.span = span
        self.records = 0


_current: ContextVar[_RequestSpan | None] = ContextVar("request_span", default=None)


class RequestTraces:
    """Traces requests; see `sources.http.headers.RequestTracer`.

    Args:
        tracer: OpenTelemetry's.
        ratio: see `Traces`.
    """

    def __init__(self, tracer: Any, ratio: float) -> None:
        self._tracer = tracer
        self._ratio = ratio
        self._wanted = 0

    @property
    def counts(self) -> type[AppendCounts]:
        """See `RequestTracer`."""
        return _TracedCounts

    def wants(self) -> bool:
        """See `RequestTracer`; the next request without a trace has a span then."""
        if random.random() >= self._ratio:  # noqa: S311
            return False
        self._wanted = min(self._wanted + 1, WANTED_MAX)
        return True

    def begin(self, method: str, path: str, pipeline: str, trace: Mapping[str, str]) -> str:
        """See `RequestTracer`."""
        if trace:
            parent = _extract(trace, context=_ROOT)
        elif self._wanted or random.random() < self._ratio:  # noqa: S311
            self._wanted = max(0, self._wanted - 1)
            parent = _ROOT
        else:
            return ""
        facts = {
            "http.request.method": method,
            "http.route": path,
            "messaging.system": _SYSTEM,
            "messaging.operation.name": "accept",
            "messaging.destination.name": pipeline,
        }
        span = _start(self._tracer, f"{method} {path}", SpanKind.SERVER, facts, parent=parent)
        if span is None:
            return ""
        _current.set(_RequestSpan(span))
        return _traceparent(span)

    def end(self, status: int, problem: str) -> None:
        """See `RequestTracer`."""
        current = _current.get()
        if current is None:
            return
        _current.set(None)
        facts: dict[str, Any] = {
            "http.response.status_code": status,
            "messaging.batch.message_count": current.records,
        }
        if problem:
            facts["error.type"] = problem
        _end(current.span, facts, error=problem if status >= _SERVER_ERROR else "")


class _TracedCounts(AppendCounts):
    """Counts of an endpoint that count for the span of the request as well."""

    __slots__ = ()

    def accepted(self, append: Append) -> None:
        """See `AppendCounts`."""
        super().accepted(append)
        current = _current.get()
        if current is not None:
            current.records += append.records.count


# -- tries of batches ------------------------------------------------------------------------------


class _Attempt(NamedTuple):
    """A try that is over, and whose outcome is not known yet.

    Attributes:
        span: of it.
        at: when it was over, nanoseconds since the epoch.
        facts: more attributes.
        error: the class of its failure, or empty.
    """

    span: Any
    at: int
    facts: dict[str, Any]
    error: str

    def end(self, outcome: str) -> None:
        """Ends the span."""
        facts = {**self.facts, "ingestd.batch.outcome": outcome}
        if self.error:
            facts["error.type"] = self.error
        _end(self.span, facts, error=self.error, at=self.at)


class AttemptTraces:
    """Traces the tries of one pipeline's batches; on the event loop.

    Args:
        tracer: OpenTelemetry's.
        pipeline: its name.
        ratio: see `Traces`.
        links_max: links of a span.
    """

    def __init__(self, tracer: Any, pipeline: str, *, ratio: float, links_max: int) -> None:
        self._tracer = tracer
        self._pipeline = pipeline
        self._ratio = ratio
        self._links_max = links_max
        # By batch, oldest first: a try can be over before the commit of the one before it. Those
        # without a span have a place too: a sampler may want one try and not the other.
        self._open: dict[str, deque[_Attempt | None]] = {}

    async def run(self, job: Job, call: Callable[[Job], Awaitable[Result]]) -> Result:
        """Calls with a job, inside of a span if it is to have one."""
        span = self._begin(job)
        if span is None:
            result = await call(job)
            self._open.setdefault(job.batch, deque()).append(None)
            return result
        # Threads and coroutines of handlers run in copies of this task's context.
        token = attach(trace.set_span_in_context(span, _ROOT))
        try:
            result = await call(msgspec.structs.replace(job, traceparent=_traceparent(span)))
        except BaseException as raised:
            _Attempt(span, time.time_ns(), {}, type(raised).__name__).end(ABANDONED)
            raise
        finally:
            detach(token)
        facts = {
            "ingestd.handler.seconds": result.seconds,
            "ingestd.batch.rejected": len(result.rejections),
            "ingestd.batch.retried": len(result.retries),
        }
        error = "" if result.failure is None else error_kind(result.failure)
        attempt = _Attempt(span, time.time_ns(), facts, error)
        self._open.setdefault(job.batch, deque()).append(attempt)
        return result

    def _begin(self, job: Job) -> Any:
        """Begins the span of a try; `None` if it has none."""
        try:
            links = self._links(job)
        except (ValueError, LookupError):  # envelopes that are damaged
            links = None
        if links is None:
            return None
        facts: dict[str, Any] = {
            "messaging.system": _SYSTEM,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": self._pipeline,
            "messaging.batch.message_count": job.records.count,
            "ingestd.batch.id": job.batch,
            "ingestd.batch.attempt": job.attempt,
        }
        if job.lineage:
            facts["ingestd.batch.split_from"] = job.lineage[-1]
        name = f"process {self._pipeline}"
        return _start(self._tracer, name, SpanKind.CONSUMER, facts, links=links)

    def _links(self, job: Job) -> list[Link] | None:
        """The links of the span of a try; `None` if the try has no span."""
        found: list[Link] = []
        seen: set[str] = set()
        runs = EnvelopeRuns(job.records.envelopes, job.records.count)
        for one in islice(runs.different(), LOOKED_MAX):
            if len(found) >= self._links_max:
                break
            if not one.traceparent or one.traceparent in seen:
                continue
            seen.add(one.traceparent)
            context = _context_of(one.traceparent)
            if context is not None and context.trace_flags.sampled:
                found.append(Link(context))
        if found:
            return found
        chosen = zlib.crc32(job.batch.encode()) < self._ratio * 2**32
        return [] if chosen and not seen else None

    def tried(self, tried: TriedBatch) -> None:
        """Ends the span of a try, whose outcome is known now."""
        attempts = self._open.get(tried.id)
        if attempts is None:
            return
        if (attempt := attempts.popleft()) is not None:
            attempt.end(tried.outcome)
        if not attempts:
            del self._open[tried.id]

    def close(self) -> None:
        """Ends spans whose outcome is not known: the worker was ended."""
        while self._open:
            for attempt in self._open.popitem()[1]:
                if attempt is not None:
                    attempt.end(ABANDONED)


def _context_of(traceparent: str) -> SpanContext | None:
    """The context that a `traceparent` names; OpenTelemetry's own reader takes ten times as long.

    Sources have checked those of requests. Brokers hand on what their messages say.
    """
    _, trace_id, span_id, flags, *_ = [*traceparent.split("-"), "", "", "", ""]
    try:
        context = SpanContext(
            int(trace_id, 16),
            int(span_id, 16),
            is_remote=True,
            trace_flags=_FLAGS[int(flags, 16) & 1],
        )
    except ValueError:
        return None
    return context if context.is_valid else None


# -- spans: what goes wrong with one costs no request and no batch --------------------------------


def _start(
    tracer: Any,
    name: str,
    kind: SpanKind,
    facts: Mapping[str, Any],
    *,
    parent: Context | None = None,
    links: Sequence[Link] = (),
) -> Any:
    """Starts a span; `None` if the sampler does not want it."""
    try:
        span = tracer.start_span(name, parent or _ROOT, kind, facts, links)
    except Exception:
        log.exception("span_failed")
        return None
    return span if span.is_recording() else None


def _end(span: Any, facts: Mapping[str, Any], *, error: str = "", at: int | None = None) -> None:
    try:
        span.set_attributes(facts)
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(at)
    except Exception:
        log.exception("span_failed")


def _traceparent(span: Any) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


# -- what OpenTelemetry logs -----------------------------------------------------------------------


def secret_words(environ: Mapping[str, str]) -> list[str]:
    """The words of OpenTelemetry's variables that may be a secret, the longest first.

    These are the values of headers, and queries and passwords of addresses. A text of several words
    may be quoted with other white space between them.
    """
    texts: list[str] = []
    for kind in ("", "TRACES_"):
        for header in environ.get(f"OTEL_EXPORTER_OTLP_{kind}HEADERS", "").split(","):
            name, sign, value = header.partition("=")
            texts.append(value if sign else name)  # without a sign all of it may be the value
        address = environ.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT", "")
        texts.append(address.partition("?")[2])
        user, sign, _ = address.partition("://")[2].partition("/")[0].rpartition("@")
        texts.append(user.partition(":")[2] if sign else "")
    words = {word for text in texts for word in (*text.split(), *unquote(text).split())}
    return sorted((word for word in words if len(word) >= _SECRET_CHARS_MIN), key=len, reverse=True)


class _LibraryLogs(logging.Handler):
    """Hands on what OpenTelemetry logs: a collector that is down costs two lines a minute.

    Attributes:
        redact: replaces secrets in a text.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        self.redact = redactor(secret_words(os.environ))
        self._logger = logging.getLogger(_LIBRARY)
        self._propagated, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """As the event `library_logged`, with the number of lines like it that were left out."""
        kind, now = (record.name, str(record.msg)), time.monotonic()
        at, left_out = self._told.get(kind, (-math.inf, 0))
        if now - at < LOG_SECONDS:
            self._told[kind] = at, left_out + 1
            return
        if len(self._told) >= LOG_KINDS_MAX:
            self._told.clear()
        self._told[kind] = now, 0
        write = log.error if record.levelno >= logging.ERROR else log.warning
        facts: dict[str, Any] = {"left_out": left_out} if left_out else {}
        if record.exc_info:
            facts["exc_info"] = record.exc_info
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  arguments that do not fit their format
            message = str(record.msg)
        write("library_logged", logger=record.name, message=self.redact(message), **facts)

    def end(self) -> None:
        """Gives the logger back."""
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated
