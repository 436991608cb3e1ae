"""One request's way, from its head to its answer.

`answer` → `find` → `_let_in` → `Ingestion.run` → `_write`, in that order. `docs/HTTP.md`
has the rules for requests and answers, `docs/SECURITY.md` those for clients.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from typing import TYPE_CHECKING

import async_timeout
from structlog.contextvars import bind_contextvars, unbind_contextvars

from ingestd.base.logging import get_logger
from ingestd.http import problem
from ingestd.http.auth import Principal
from ingestd.http.problem import EXPLAINED, Problem, explain
from ingestd.http.request import ClientGone, Request
from ingestd.http.response import LateDocument, Response, StaticResponse, unless_known
from ingestd.http.routing import NO_PATH, PREFLIGHT, find, look_up, tell_options
from ingestd.sources.http import headers
from ingestd.sources.http.endpoints.base import Route, UnknownPath, problem_response
from ingestd.sources.http.ingestion import Ingestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ingestd.http.auth import Authenticator
    from ingestd.http.routing import Cors, Resource
    from ingestd.http.settings import HttpSettings

    OnRequest = Callable[[str, str, int, float, str], None]
    Found = Route | UnknownPath | LateDocument
    Resources = Mapping[str, Resource[Found]]

log = get_logger()

ADMIN_ELSEWHERE = "; status and metrics are at the admin address (admin.listen)"
NO_ROUTE = "other"
"""The route, in the metrics, of requests that are for none."""

_ANYONE = Principal()
_CLIENT_GONE = 499
_REFUSED = 400
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class IngestHandler:
    """Answers requests, one at a time each; on the event loop.

    Args:
        settings: the bounds.
        resources: by path.
        authenticator: authenticates.
        on_request: see `HttpSource`.

    Attributes:
        draining: nothing more is taken.
        authenticator: may be replaced.
        cors: the headers for browsers, if any; may be replaced.
        why_absent: gives the reason why a path is not there, or an empty text; may be replaced.
        ingestion: takes the bodies.
        tracer: traces requests with records, if any.
    """

    def __init__(
        self,
        settings: HttpSettings,
        resources: Resources,
        authenticator: Authenticator,
        on_request: OnRequest | None = None,
    ) -> None:
        self.draining = False
        self.authenticator = authenticator
        self.cors: Cors | None = None
        self.why_absent: Callable[[str, str], str] = lambda _method, _target: ""
        self.ingestion = Ingestion(settings, self._authorize, self._identify)
        self.tracer: headers.RequestTracer | None = None
        self._settings = settings
        self._resources = resources
        self._on_request = on_request
        self._loop = asyncio.get_running_loop()
        self._ids = _make_ids()
        self._active = 0
        self._idle = asyncio.Event()

    def begin_to_drain(self) -> None:
        """Answers 503 from now on; streams and waits come to an end."""
        self.draining = True
        self.ingestion.begin_to_drain()

    async def drain(self, deadline: float) -> None:
        """Returns when the requests in progress have their answers.

        Args:
            deadline: when it stops waiting for them, in the loop's time.
        """
        if self._active:
            self._idle.clear()
            try:
                async with async_timeout.timeout_at(deadline):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("requests_abandoned", requests=self._active)

    def close(self) -> None:
        """Ends its threads; no request follows."""
        self.draining = True
        self.ingestion.close()

    # -- for all requests, whichever way they go -----------------------------------------------

    @property
    def closes(self) -> bool:
        """Returns True if each answer is the last one of its connection."""
        return self.draining or not self._settings.keepalive_timeout

    @property
    def write_timeout(self) -> float:
        """Seconds that a client may leave its answers unread."""
        return self._settings.body_timeout

    def begin(self) -> None:
        """A request is in progress."""
        self._active += 1

    def end(self, requests: int) -> None:
        """Requests have their outcome."""
        self._active -= requests
        if not self._active:
            self._idle.set()

    def next_id(self) -> str:
        """Makes the id of a request."""
        return next(self._ids)

    def headers_for(self, request: Request) -> dict[str, str]:
        """Returns headers of every answer to requests with this head."""
        return {} if self.cors is None else self.cors.headers(request.headers.get("Origin", ""))

    def count_accepted(self, route: Route, status: int, seconds: float) -> None:
        """Counts a request whose records were accepted."""
        if self._on_request is not None:
            self._on_request(route.spec.path, route.intake.name, status, seconds, "")

    def serves(self, route: Route) -> bool:
        """Returns True if no reload has come since a request was let in with this route."""
        resource = self._resources.get(route.spec.path_of(route.value))
        return resource is not None and resource.what is route

    def _authorize(self, request: Request, route: Route) -> Principal:
        """Returns the principal of a request that was let in before, if it still may send.

        Raises:
            Problem: 401, 403 or 404 if it may not.
        """
        if route.principal is None:
            return self.authenticator.identify(request, route.intake.name, route.spec.auth)
        resource = self._resources.get(route.spec.path_of(route.value))
        if resource is None or not isinstance(resource.what, Route) or not resource.what.principal:
            raise Problem(problem.NOT_FOUND, "the path is there no more")
        return resource.what.principal

    def _identify(self, request: Request, route: Route, token: str) -> Principal:
        """Returns the principal of a token in the body; see `Authenticator.identify_by`."""
        return self.authenticator.identify_by(request, token, route.intake.name)

    # -- the answer ----------------------------------------------------------------------------

    async def answer(self, request: Request) -> Response:
        """Turns the outcome of a request into its answer; never raises."""
        started = self._loop.time()
        request_id = self._name(request)
        bind_contextvars(request_id=request_id)  # until the connection's next request
        trace = {}
        if headers.HEADER in request.headers:
            trace = headers.read_trace(request.headers.getall(headers.HEADER))
            bind_contextvars(**trace)
        found: Resource[Found] | None = None
        outcome: Response | StaticResponse | Problem
        gone = False
        self.begin()
        try:
            found = find(self._resources, request.method, request.raw_path, ADMIN_ELSEWHERE)
            let_in = self._let_in(request, found)
            if isinstance(let_in, Response | StaticResponse):
                outcome = let_in
            else:
                outcome = await self.ingestion.run(request, *let_in)
        except Problem as refusal:
            log.debug("request_refused", problem=refusal.kind.slug)
            # Its frames hold the body, and one of them holds it: that would last until the next
            # collection.
            outcome = refusal.with_traceback(None)
            outcome.__context__ = None
            if found is None and outcome.kind is problem.NOT_FOUND:
                hint = self.why_absent(request.method, request.raw_path)
                outcome = Problem(problem.NOT_FOUND, hint) if hint else outcome
        except EXPLAINED as error:
            outcome = explain(error)
            log.debug("request_refused", problem=outcome.kind.slug)
        except ClientGone:
            log.debug("request_abandoned")
            gone, outcome = True, Problem(problem.BAD_REQUEST, "the body is not complete")
        except Exception:
            log.exception("request_failed")
            outcome = Problem(problem.INTERNAL, f"see the log for {request_id}")
        finally:
            self.end(1)
        if found is None:
            found = look_up(self._resources, request.method, request.raw_path)
        route = None if found is None or isinstance(found.what, LateDocument) else found.what
        answer = self._write(request, request_id, outcome, route)
        if not isinstance(outcome, StaticResponse):
            slug = outcome.kind.slug if isinstance(outcome, Problem) and not gone else ""
            status = _CLIENT_GONE if gone else answer.status
            self._count(route, status, self._loop.time() - started, slug)
        if trace:
            unbind_contextvars(*trace)
        return answer

    def _count(
        self, route: Route | UnknownPath | None, status: int, seconds: float, slug: str
    ) -> None:
        pipeline = ""
        if isinstance(route, Route):
            pipeline = route.intake.name
            if slug:
                route.counts.refuse(slug)
        if self.tracer is not None:
            self.tracer.end(status, slug)
            unbind_contextvars(*headers.TRACE_FIELDS)
        if self._on_request is not None:
            path = NO_ROUTE if route is None or route.spec is None else route.spec.path
            self._on_request(path, pipeline, status, seconds, slug)

    def _write(
        self,
        request: Request,
        request_id: str,
        outcome: Response | StaticResponse | Problem,
        route: Route | UnknownPath | None,
    ) -> Response:
        more = {"X-Request-Id": request_id, **self.headers_for(request)}
        close = self.closes
        if isinstance(outcome, Problem):
            close = close or outcome.kind.closes
            outcome = _show(outcome, route, request)
        if not isinstance(outcome, Response) or outcome.status >= _REFUSED:
            # A body that is not wanted is not waited for.
            close = close or not request.content.is_eof()
        more.update(outcome.headers)
        return Response(
            outcome.status,
            outcome.content_type,
            outcome.body,
            more,
            close,
            self.write_timeout,
        )

    def _name(self, request: Request) -> str:
        """Returns the client's id for the request if it is a decent one, else one of our own."""
        given = request.headers.get("X-Request-Id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return next(self._ids)

    def _let_in(
        self, request: Request, resource: Resource[Found]
    ) -> Response | StaticResponse | tuple[Route, Principal]:
        """Authenticates and authorizes a request, or answers it at once."""
        route, method = resource.what, request.method
        probed = isinstance(route, Route) and method in route.spec.probes
        if method == "OPTIONS" and not (probed and PREFLIGHT not in request.headers):
            return StaticResponse(204, headers=tell_options(resource, request.headers, self.cors))
        if isinstance(route, LateDocument):
            self.authenticator.check_host(request)
            return unless_known(route.document, request.headers.get("If-None-Match", ""))
        if self.draining:
            raise problem.draining()
        if isinstance(route, UnknownPath):
            if route.spec is None:
                self.authenticator.check_host(request)
                raise Problem(problem.NOT_FOUND, NO_PATH + ADMIN_ELSEWHERE)
            raise self.authenticator.explain_unknown(request, route.spec.auth)
        if not route.spec.auth:
            self.authenticator.check_host(request)
            principal = _ANYONE
        else:
            principal = route.principal or self.authenticator.admit(
                request, route.intake.name, route.spec.auth
            )
        if probed:
            head = route.head_of(method, request.raw_path, request.headers)
            return route.endpoint.probe(head)
        if self.tracer is not None:
            _begin_span(self.tracer, request, route)
        return route, principal


def _begin_span(tracer: headers.RequestTracer, request: Request, route: Route) -> None:
    """Begins the span of a request; log and envelopes have it in place of the client's."""
    given = {}
    if headers.read_trace(request.headers.getall(headers.HEADER, ())):
        names = (headers.HEADER, headers.STATE_HEADER)
        given = {n: ", ".join(request.headers.getall(n)) for n in names if n in request.headers}
    span = tracer.begin(request.method, route.spec.path, route.intake.name, given)
    if span:
        request.headers[headers.HEADER] = span
        bind_contextvars(**headers.read_trace([span]))


def _show(found: Problem, route: Route | UnknownPath | None, request: Request) -> Response:
    """Returns a problem as its endpoint shows it."""
    if route is None:
        return problem_response(found)
    try:
        head = route.head_of(request.method, request.raw_path, request.headers)
        return route.endpoint.error(found, head)
    except Exception:
        log.exception("request_failed")
        return problem_response(found)


def _make_ids() -> Iterator[str]:
    """Makes ids that no other process makes: a random part once, then a number."""
    prefix = secrets.token_hex(6)
    return (f"{prefix}-{number:x}" for number in itertools.count(1))
