"""The seam of ingestion protocols over HTTP: routes, a codec for each body, and the answers.

An endpoint is built at the start and again at each reload, from an `EndpointContext`. For each
request the handler finds the route, authenticates, and calls in this order: `open` before the body,
`BodyCodec.verify` with the body as it came, `BodyCodec.decode` with the body decompressed, and
`answer` before the commit, so that the answer can be stored beside an idempotency key. A `Problem`
of any of these steps ends the request with what `error` makes of it. A method among
`RouteSpec.probes` is answered by `probe`, and its body is not read.

An endpoint is one file: its class, its settings, and a line in the registry or an entry point of
the group `ingestd.endpoints`. It is imported when something is written in its table, and for
`--help`: what is large is imported where it is used.
"""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pydantic import Field

from ingestd.base.append import scoped
from ingestd.codecs.json import DEPTH_MAX
from ingestd.config.sections import Section
from ingestd.http.credentials import TOKEN_SCHEMES
from ingestd.http.response import PROBLEM, Response
from ingestd.http.routing import path_of
from ingestd.sources.http.headers import safe_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ingestd.base.append import AppendCounts, SenderIds
    from ingestd.base.record import Format
    from ingestd.codecs.lines import Parsed
    from ingestd.handlers.outcome import Rejection
    from ingestd.http.auth import Principal
    from ingestd.http.credentials import TokenScheme
    from ingestd.http.problem import Problem
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.base import Intake
    from ingestd.sources.http.headers import RequestEnvelopes
    from ingestd.sources.http.result import IngestResult
    from ingestd.sources.screening import ScreenedIntake

SIGNATURE = ("signature",)
"""The body's signature, which `BodyCodec.verify` checks, is the way to authenticate."""
OPEN = ()
"""The way to authenticate of routes that are for every client, such as a probe of health."""
PIPELINE = "{pipeline}"
"""The variable of a path template that takes the names of pipelines."""
ANY = "*"
"""In `RouteSpec.targets`: each value of the variable that has no target of its own."""
QUICK_BYTES = 4 * 1024
"""A body of this size is decoded quickly whatever is in it."""


class BodyLimits(NamedTuple):
    """Bounds of one request to one pipeline.

    Attributes:
        records_max: most records in a body.
        record_bytes_max: a longer record is invalid.
        depth_max: JSON that is nested deeper is invalid.
        invalid_kept: so many invalid records are kept as dead letters.
        bytes_max: most bytes of a body that a codec decompresses itself.
        by_pipeline: those of all pipelines, for a body that goes to several.
    """

    records_max: int
    record_bytes_max: int
    depth_max: int = DEPTH_MAX
    invalid_kept: int = 10
    bytes_max: int = 32 * 1024**2
    by_pipeline: Mapping[str, BodyLimits] = MappingProxyType({})


class Head(NamedTuple):
    """The head of a request whose client may send here.

    Attributes:
        method: of the request.
        target: as the request line has it, query included.
        headers: in any case.
        value: the path's variable; empty if the template has none.
        format: of the pipeline's records.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    value: str
    format: Format


class Delivery(NamedTuple):
    """A body, or its records for one pipeline, under the sender's own name for it.

    Attributes:
        key: its idempotency key; that of `verify` is `scoped`.
        fingerprint: the same when it is delivered again.
    """

    key: str
    fingerprint: bytes

    def of(self, principal: str) -> Delivery:
        """The same with a key that no other principal has."""
        return self._replace(key=scoped(principal, safe_key(self.key)))


class Decoded(NamedTuple):
    """The records of a body that go to one pipeline.

    Attributes:
        parsed: the records; one part of several may have invalid ones alone, and one that has only
            `notes` has none.
        pipeline: where they go to; empty for that of the route.
        delivery: their idempotency key, if the protocol has it in the body.
        token: that authenticates them, if the protocol has it in the body.
        ids: that their sender gave the records, if the protocol has some: those that were accepted
            before are not accepted again, and count as accepted.
        notes: what the answer needs to know of them, for the endpoint.
        rejected: of the records that the codec decoded, those that were found not to fit; they are
            invalid in `parsed`.
        is_routed: a `[route]` chose the pipeline: if it refuses the part, the request is refused.
    """

    parsed: Parsed
    pipeline: str = ""
    delivery: Delivery | None = None
    token: str = ""
    ids: SenderIds | None = None
    notes: object = None
    rejected: Sequence[Rejection] = ()
    is_routed: bool = False


class BodyCodec(Protocol):
    """Reads one body. A subclass inherits the defaults.

    Attributes:
        streamable: the body is lines in the pipeline's format; they may be accepted in pieces.
        verifies: `verify` has something to check, or gives an idempotency key.
        routes: a body may go to other pipelines than that of its route, or to several.
        encoding: the body's `Content-Encoding`, if the protocol tells it in another place.
    """

    streamable: bool = False
    verifies: bool = False
    routes: bool = False
    encoding: str = ""

    def verify(self, wire: bytes) -> Delivery | None:  # noqa: ARG002 - see the docstring
        """Checks the body as it came; in a thread if it is large.

        Raises:
            Problem: 400 or 401.
        """
        return None

    @abstractmethod
    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """Returns the records of a body, one part a pipeline; pure, in a thread if large.

        No parts are a request that is answered and has no records. Parts are accepted each for
        itself: the answer tells what became of each.

        Raises:
            Problem: 400 if nothing can be accepted, 413 if it is too much.
        """

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """Decodes on the event loop what takes a few milliseconds at most; `None` leaves the rest.

        Raises:
            Problem: see `decode`.
        """
        return self.decode(body, limits) if len(body) < QUICK_BYTES else None


class Target(NamedTuple):
    """The end of a route.

    Attributes:
        pipeline: its name.
        principal: of the requests, where the body's signature authenticates them; else empty.
    """

    pipeline: str
    principal: str = ""


class RouteSpec(NamedTuple):
    """One path template.

    Attributes:
        path: with at most one variable: `/v1/records/{pipeline}`. It labels the metrics.
        targets: by value of the variable; the only value is empty if there is no variable.
        methods: that carry a body of records.
        auth: the ways to authenticate: some of `TOKEN_SCHEMES`, `TokenScheme`s of the protocol's,
            `IN_BODY` (`Decoded.token`); or `SIGNATURE` or `OPEN` alone.
        probes: methods that `Endpoint.probe` answers. `OPTIONS` is answered by the server if it is
            not among them, and for the preflight of a browser.
    """

    path: str
    targets: Mapping[str, Target]
    methods: tuple[str, ...] = ("POST",)
    auth: tuple[str | TokenScheme, ...] = TOKEN_SCHEMES
    probes: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        """The template's variable with its braces; empty if it has none."""
        brace = self.path.find("{")
        return self.path[brace : self.path.index("}") + 1] if brace >= 0 else ""

    def path_of(self, value: str) -> str:
        """Returns the path for a value of the variable."""
        return self.path.replace(self.variable, value) if self.variable else self.path


class Description(NamedTuple):
    """One route for `/openapi.json` and the page at `/`.

    Attributes:
        takes: the bodies, in a line.
        operation: members of the OpenAPI operation, in place of the common ones; one that is `None`
            is left out.
        examples: titles, and the arguments of curl before the URL.
    """

    takes: str
    operation: Mapping[str, Any]
    examples: Sequence[tuple[str, str]] = ()


class EndpointSettings(Section):
    """`[http.endpoints.NAME]`, with the settings that an endpoint adds."""

    pipeline: str = Field("", description='pipeline of its records; "" switches the endpoint off')


class EndpointContext(NamedTuple):
    """The daemon as an endpoint's constructor sees it.

    Attributes:
        settings: `[http]`.
        formats: of the records of each pipeline, by name.
        default: the pipeline of requests that name none: `EndpointSettings.pipeline`, if the
            endpoint has that.
        problems: gets a line for everything that is wrong; then the endpoint is not used.
        own: the endpoint's settings.
    """

    settings: HttpSettings
    formats: Mapping[str, Format]
    default: str
    problems: list[str]
    own: Any = None


class Endpoint(Protocol):
    """One ingestion protocol. A subclass inherits the defaults.

    Attributes:
        settings: its table, `[http.endpoints.NAME]`, whose `pipeline` switches it on; `None` for
            those of ingestd that are always there.
        formats: of pipelines that its records can go to; empty for all.
        routes: its paths; none if it is not in use.
        is_pure: codecs keep nothing of a body, and an answer depends on head and result alone. Then
            requests with the same head share the codec, and the answer for a number of records.
        prefix: paths below it that are no routes are 404 in its own form; empty if there are none.
        request_headers: that pages of other origins may send, beside the usual ones.
        response_headers: that they may read, beside the usual ones.
        keep_headers: request headers that envelopes keep, beside those of `http.keep_headers`.
    """

    settings: ClassVar[type[EndpointSettings] | None] = EndpointSettings
    formats: ClassVar[Sequence[Format]] = ()
    routes: Sequence[RouteSpec]
    is_pure: bool = False
    prefix: str = ""
    request_headers: Sequence[str] = ()
    response_headers: Sequence[str] = ()
    keep_headers: Sequence[str] = ()

    @classmethod
    def check(cls, own: Any, formats: Mapping[str, Format]) -> Iterable[tuple[str, str]]:  # noqa: ARG003
        """Finds settings that cannot work together: (key in its table, problem) for each.

        Args:
            own: its table.
            formats: of the records of each pipeline.
        """
        return ()

    @abstractmethod
    def open(self, head: Head) -> BodyCodec:
        """Chooses the codec, before the body: the only switch on type and format.

        Raises:
            Problem: 400 or 415.
        """

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """Makes the answer to a request that was accepted, as a whole or in some of its parts."""
        return result.response()

    def error(self, problem: Problem, head: Head) -> Response:  # noqa: ARG002
        """Makes the answer to a request that was not: any of 400 to 503, also before the body."""
        return problem_response(problem)

    def probe(self, head: Head) -> Response:  # noqa: ARG002
        """Answers a method of `RouteSpec.probes`.

        Raises:
            Problem: it cannot be answered.
        """
        return Response(204, b"", b"")

    @abstractmethod
    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:
        """Describes one of its routes.

        Args:
            route: the one.
            target: the value of its variable, or empty for all values together.
            form: of the pipeline's records; `None` if it is not public.
        """


class Route(NamedTuple):
    """One path of an endpoint that leads to a pipeline.

    Attributes:
        endpoint: reads the bodies.
        spec: the path's template.
        value: the variable of this path.
        intake: of the pipeline.
        limits: of one request.
        envelopes: packs those of its records.
        counts: of the endpoint.
        principal: of the requests, where the body's signature authenticates them.
        intakes: of all pipelines.
        screens: of those pipelines that do not take every record.
    """

    endpoint: Endpoint
    spec: RouteSpec
    value: str
    intake: Intake
    limits: BodyLimits
    envelopes: RequestEnvelopes
    counts: AppendCounts
    principal: Principal | None = None
    intakes: Mapping[str, Intake] = MappingProxyType({})
    screens: Mapping[str, ScreenedIntake] = MappingProxyType({})

    @property
    def is_routed(self) -> bool:
        """Tells if records may go to other pipelines than this one, whatever the codec."""
        screen = self.screens.get(self.intake.name)
        return screen is not None and screen.is_routed

    def head_of(self, method: str, target: str, headers: Mapping[str, str]) -> Head:
        """The head of a request to it."""
        value = self.value
        if value == ANY:
            before, _, behind = self.spec.path.partition(self.spec.variable)
            path = path_of(target, method)
            value = path[len(before) : len(path) - len(behind)]
        return Head(method, target, headers, value, self.intake.format)


class UnknownPath(NamedTuple):
    """Paths below an endpoint's that are none of its routes.

    Attributes:
        endpoint: answers them.
        spec: the template whose variable has no such value; `None` if there is none.
    """

    endpoint: Endpoint
    spec: RouteSpec | None = None

    def head_of(self, method: str, target: str, headers: Mapping[str, str]) -> Head:
        """The head of a request to one of them."""
        return Head(method, target, headers, "", "json")


def problem_response(problem: Problem) -> Response:
    """Returns a problem document."""
    return Response(problem.kind.status, PROBLEM, problem.body(), problem.headers)
