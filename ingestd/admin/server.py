"""The admin server: health, metrics, status, the console and its API, on an address of its own.

Every connection carries one request and has seconds to live, and there are few of them
(`connection.py`). So nothing that happens here, and nothing that happens where records come in, can
lock operators out. That is also why it shares nothing with the server of records but the form of an
answer and of credentials. `access.py` says which requests may do what.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.admin.access import AdminAccess, Need
from ingestd.admin.connection import AdminPage, Answer, Connections, as_response
from ingestd.admin.status import without_error_texts
from ingestd.base.errors import AddressError, IngestdError
from ingestd.base.logging import get_logger
from ingestd.config.network import is_loopback, parse_listen
from ingestd.host.sockets import is_local, listen_fault, show_socket
from ingestd.http import problem
from ingestd.http.problem import Problem, ProblemType
from ingestd.http.response import JSON, Response
from ingestd.http.routing import Resource, find, path_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from ingestd.admin.api import AdminApi
    from ingestd.admin.connection import AdminRequest
    from ingestd.admin.hooks import Hooks
    from ingestd.admin.status import AdminView
    from ingestd.admin.traces import Traces
    from ingestd.admin.watch import History
    from ingestd.base.metrics import Metrics
    from ingestd.settings import AdminSettings, HookSettings, TracesSettings

SETTING = "admin.listen"
RECORDS_ELSEWHERE = "; records go to the address of the http source (http.listen)"
SETTLE_SECONDS = 2.0
"""Time from the start to the first sample of the history: a start has enough to do."""
HUNG = ProblemType("hung", 503, "Hung")
NOT_READY = ProblemType("not-ready", 503, "Not Ready")
_TEXT = b"text/plain; charset=utf-8"
_READ = ("GET", "HEAD")

log = get_logger()


class AdminServer:
    """Answers `/livez`, `/readyz`, `/metrics` and `/v1/status`, and what `api` answers.

    Args:
        settings: where to listen; with an empty `listen` there is no server and `start` does
            nothing.
        view: who knows.
        metrics: what `/metrics` shows.
        sockets: listening ones to serve on, instead of on one of its own.
        hooks: by name; they are there without an address, too, and so are traces.
        traces: `[traces]`; none without.

    Attributes:
        addresses: where each socket listens, `HOST:PORT` or `unix:PATH`, while it does.
        traces: of requests and batches, after `start`; `None` if there are none.
    """

    def __init__(
        self,
        settings: AdminSettings,
        view: AdminView,
        metrics: Metrics,
        *,
        sockets: Sequence[socket.socket] = (),
        hooks: Mapping[str, HookSettings] = MappingProxyType({}),
        traces: TracesSettings | None = None,
    ) -> None:
        self._settings = settings
        self._view = view
        self._metrics = metrics
        self._pages: dict[str, Resource[AdminPage]] = {
            "/livez": Resource(_READ, AdminPage(Need.PROBE, self._livez)),
            "/readyz": Resource(_READ, AdminPage(Need.PROBE, self._readyz)),
            "/metrics": Resource(_READ, AdminPage(Need.PROBE, self._metrics_page)),
            "/v1/status": Resource(_READ, AdminPage(Need.STATUS, self._status)),
        }
        self._sockets = list(sockets)
        self._hook_settings = hooks
        self._hooks: Hooks | None = None
        self._trace_settings = traces
        self.traces: Traces | None = None
        self._local = all(map(is_local, self._sockets))
        if not self._sockets and settings.listen:
            self._local = is_loopback(settings.listen)
        self._listeners: list[asyncio.Server] = []
        self._protocol: Connections | None = None
        self._samples: History | None = None
        self._sampling: asyncio.Task[None] | None = None
        self._api: AdminApi | None = None
        self._changes: set[asyncio.Task[Answer]] = set()
        self.addresses: list[str] = []

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it cannot.
            ConfigError: what is set is not an address, a file of tokens is not as it should be, or
                there can be no traces.
        """
        if self._trace_settings is not None and self._trace_settings.enabled:
            from ingestd.admin.traces import Traces  # noqa: PLC0415  most daemons have none

            self.traces = Traces(self._trace_settings.ratio)
        if self._hook_settings:
            from ingestd.admin.hooks import Hooks  # noqa: PLC0415  few daemons have some

            self._hooks = Hooks(self._hook_settings, self._view)
        if not (self._settings.listen or self._sockets):
            return
        self._access = AdminAccess(self._settings, local=self._local)
        self._sampling = asyncio.ensure_future(self._sample())
        self._protocol = Connections(self._page)
        loop = asyncio.get_running_loop()
        if self._sockets:
            self._listeners = [await _serve_on(sock, self._protocol) for sock in self._sockets]
            self.addresses = [show_socket(sock) for sock in self._sockets]
            return
        host, port = parse_listen(self._settings.listen, SETTING)
        try:
            self._listeners = [await loop.create_server(self._protocol, host or None, port)]
        except (OSError, UnicodeError) as error:
            raise AddressError(
                address=self._settings.listen,
                setting=SETTING,
                problem=listen_fault(error, ', or "" for none'),
            ) from error
        self.addresses = [show_socket(s) for one in self._listeners for s in one.sockets]

    async def close(self, *, urged: bool = False) -> None:
        """Stops listening, lets answers that are on their way out for a second, hangs up.

        Args:
            urged: spans that wait are not sent any more.
        """
        if self.traces is not None:
            await (self.traces.close(0.0) if urged else self.traces.close())
        if self._hooks is not None:
            self._hooks.close()
        if self._sampling is not None:
            self._sampling.cancel()
        if not self._listeners or self._protocol is None:
            return
        for listener in self._listeners:
            listener.close()
        await self._protocol.hang_up()
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners = []
        self.addresses = []
        if self._api is not None:
            self._api.close()
        for change in [*self._changes]:
            change.cancel()

    def prepare(self, settings: AdminSettings) -> Callable[[], None]:
        """Reads what a reload changes; returns what takes it over, and fails no more.

        Raises:
            ConfigError: a file of tokens is not as it should be; nothing has changed.
        """
        connections = self._protocol
        if connections is None:
            return lambda: None
        access = AdminAccess(settings, local=self._local, denials=self._access.denials)

        def change() -> None:
            self._access = access
            connections.look_again()

        return change

    def _page(self, request: AdminRequest) -> Response | Awaitable[Answer]:
        try:
            page = self._find(request)
            self._access.check_page(request, page.need)
            who = self._access.authorize(request, page.need)
            answer = page.answer(request._replace(principal=who))
        except Exception as error:  # noqa: BLE001  one page that fails must not look like a dead daemon
            return _failed(request, error)
        if isinstance(answer, Response):
            return answer
        later = _later(request, answer)
        return self._carried_out(later) if page.need is Need.CHANGE else later

    def _carried_out(self, change: Coroutine[None, None, Answer]) -> Awaitable[Answer]:
        """Carries a change out to its end, and to its line in the log, also if its client goes."""
        task = asyncio.get_running_loop().create_task(change, name="admin-change")
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return asyncio.shield(task)

    def _find(self, request: AdminRequest) -> AdminPage:
        """Finds a page; those of the API are imported when one is asked for.

        Raises:
            Problem: 404 or 405.
        """
        if self._api is None and path_of(request.target, request.method) not in self._pages:
            from ingestd.admin import api, console  # noqa: PLC0415  probes need none of it

            self._api = api.AdminApi(self._view, lambda: self._access, self._history())
            self._pages |= self._api.pages() | console.pages()
        return find(self._pages, request.method, request.target, RECORDS_ELSEWHERE).what

    def _history(self) -> History:
        if self._samples is None:
            from ingestd.admin.watch import History  # noqa: PLC0415  a start needs none of it

            self._samples = History(self._view)
        return self._samples

    async def _sample(self) -> None:
        await asyncio.sleep(SETTLE_SECONDS)
        await self._history().run()

    def _livez(self, _: AdminRequest) -> Response:
        """Answers `/livez`: an answer proves that the loop turns; the watchdog decides the rest."""
        alive, reason = self._view.alive()
        if alive:
            return Response(200, _TEXT, b"alive\n")
        raise Problem(HUNG, reason)

    def _readyz(self, _: AdminRequest) -> Response:
        ready, reason = self._view.ready()
        if ready:
            return Response(200, _TEXT, b"ready\n")
        raise Problem(NOT_READY, reason)

    def _metrics_page(self, request: AdminRequest) -> Response:
        body, content_type = self._metrics.render(request.headers.get("accept", ""))
        return Response(200, content_type.encode(), body)

    def _status(self, request: AdminRequest) -> Response:
        status = self._view.status()
        if not self._access.shows_errors(request):
            status = without_error_texts(status)
        return Response(200, JSON, msgspec.json.encode(status) + b"\n")


async def _later(request: AdminRequest, answer: Awaitable[Answer]) -> Answer:
    try:
        return await answer
    except Exception as error:  # noqa: BLE001  see `AdminServer._page`
        return _failed(request, error)


def _failed(request: AdminRequest, error: Exception) -> Response:
    if isinstance(error, Problem):
        return as_response(error)
    page = path_of(request.target, request.method)
    if isinstance(error, IngestdError):
        log.error("admin_page_failed", page=page, error=str(error))
        return as_response(Problem(problem.INTERNAL, str(error)))
    log.error("admin_page_failed", page=page, exc_info=error)
    return as_response(Problem(problem.INTERNAL, "the log says why"))


async def _serve_on(sock: socket.socket, protocol: Connections) -> asyncio.Server:
    """Serves on a passed socket. Its file, if it has one, is not ours to remove."""
    loop = asyncio.get_running_loop()
    if sock.family != socket.AF_UNIX:
        return await loop.create_server(protocol, sock=sock)
    more: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
    return await loop.create_unix_server(protocol, sock=sock, **more)
