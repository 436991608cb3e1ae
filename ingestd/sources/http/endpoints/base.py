"""The seam of ingestion protocols over HTTP: routes, a codec for each body, and the answers.

An endpoint is built at the start and again at each reload, from an `EndpointContext`. For each
request the handler finds the route, authenticates, and calls in this order: `open` before the body,
`BodyCodec.verify` with the body as it came, `BodyCodec.decode` with the body decompressed, and
`answer` before the commit, so that the answer can be stored beside an idempotency key. A `Problem`
of any of these steps ends the request with what `error` makes of it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ingestd.codecs.json import DEPTH_MAX
from ingestd.http.auth import TOKEN_SCHEMES
from ingestd.http.response import PROBLEM, Response

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.codecs.lines import Parsed
    from ingestd.http.auth import Principal
    from ingestd.http.problem import Problem
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.base import Intake
    from ingestd.sources.http.result import IngestResult

SIGNATURE = ("signature",)
"""The body's signature, which `BodyCodec.verify` checks, is the way to authenticate."""
PIPELINE = "{pipeline}"
"""The variable of a path template that takes the names of pipelines."""
QUICK_BYTES = 4 * 1024
"""A body of this size is decoded quickly whatever is in it."""


class BodyLimits(NamedTuple):
    """Bounds of one request to one pipeline.

    Attributes:
        records_max: most records in a body.
        record_bytes_max: a longer record is invalid.
        depth_max: JSON that is nested deeper is invalid.
        invalid_kept: so many invalid records are kept as dead letters.
    """

    records_max: int
    record_bytes_max: int
    depth_max: int = DEPTH_MAX
    invalid_kept: int = 10


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
    """A verified body, under the sender's own name for it.

    Attributes:
        key: its idempotency key, `scoped`.
        fingerprint: the same when it is delivered again.
    """

    key: str
    fingerprint: bytes


class BodyCodec(Protocol):
    """Reads one body. A subclass inherits the defaults.

    Attributes:
        streamable: the body is lines in the pipeline's format; they may be accepted in pieces.
        verifies: `verify` has something to check, or gives an idempotency key.
    """

    streamable: bool = False
    verifies: bool = False

    def verify(self, wire: bytes) -> Delivery | None:  # noqa: ARG002 - see the docstring
        """Checks the body as it came; in a thread if it is large.

        Raises:
            Problem: 400 or 401.
        """
        return None

    @abstractmethod
    def decode(self, body: bytes, limits: BodyLimits) -> Parsed:
        """Returns the records of a body, at least one of them good; pure, in a thread if large.

        Raises:
            Problem: 400 if nothing can be accepted, 413 if it is too much.
        """

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Parsed | None:
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
        methods: that carry a body; `OPTIONS` is answered by the server.
        auth: the ways to authenticate, `TOKEN_SCHEMES`, some of them, or `SIGNATURE`.
    """

    path: str
    targets: Mapping[str, Target]
    methods: tuple[str, ...] = ("POST",)
    auth: tuple[str, ...] = TOKEN_SCHEMES

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


class EndpointContext(NamedTuple):
    """The daemon as an endpoint's constructor sees it.

    Attributes:
        settings: `[http]`.
        formats: of the records of each pipeline, by name.
        default: the pipeline of requests that name none.
        problems: gets a line for everything that is wrong; then the endpoint is not used.
    """

    settings: HttpSettings
    formats: Mapping[str, Format]
    default: str
    problems: list[str]


class Endpoint(Protocol):
    """One ingestion protocol. A subclass inherits the defaults.

    Attributes:
        routes: its paths; none if it is not in use.
        request_headers: that pages of other origins may send, beside the usual ones.
        response_headers: that they may read, beside the usual ones.
    """

    routes: Sequence[RouteSpec]
    request_headers: Sequence[str] = ()
    response_headers: Sequence[str] = ()

    @abstractmethod
    def open(self, head: Head) -> BodyCodec:
        """Chooses the codec, before the body: the only switch on type and format.

        Raises:
            Problem: 400 or 415.
        """

    def answer(self, result: IngestResult) -> Response:
        """Makes the answer to a request that was accepted."""
        return result.response()

    def error(self, problem: Problem) -> Response:
        """Makes the answer to a request that was not."""
        return problem_response(problem)

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
        caller: of the requests, where the body's signature authenticates them.
    """

    endpoint: Endpoint
    spec: RouteSpec
    value: str
    intake: Intake
    limits: BodyLimits
    caller: Principal | None = None


class UnknownPipeline(NamedTuple):
    """Any path of a template whose variable is no value that is known."""

    endpoint: Endpoint
    spec: RouteSpec


def problem_response(problem: Problem) -> Response:
    """Returns a problem document."""
    return Response(problem.kind.status, PROBLEM, problem.body(), problem.headers)
