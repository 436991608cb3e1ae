"""The source `http`: a server for records. `handler.py` has the way of a request."""

from __future__ import annotations

import asyncio
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ingestd.base.append import AppendCounts
from ingestd.base.errors import AddressError, ConfigError
from ingestd.base.logging import get_logger
from ingestd.config.network import is_loopback, split_address
from ingestd.host.sockets import is_local, listen_fault, show_socket
from ingestd.http.auth import ONLY_DELIVERIES, Authenticator, Principal
from ingestd.http.listener import Listener, bind
from ingestd.http.response import LateDocument, StaticResponse
from ingestd.http.routing import (
    ALL_METHODS,
    ASK,
    BELOW,
    READ,
    SERVER,
    Cors,
    Resource,
    look_up,
)
from ingestd.http.server import Server
from ingestd.http.settings import demands_proof, demands_signatures_alone
from ingestd.sources.base import Source
from ingestd.sources.http.access import check_exposure, read_access, routes_off
from ingestd.sources.http.endpoints.base import ANY, SIGNATURE, BodyLimits, Route, UnknownPath
from ingestd.sources.http.handler import IngestHandler
from ingestd.sources.http.headers import RequestEnvelopes
from ingestd.sources.http.quick import QuickRequests

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from ingestd.http.settings import HttpSettings
    from ingestd.sources.base import Intake
    from ingestd.sources.http.access import Access
    from ingestd.sources.http.endpoints.base import Endpoint, RouteSpec
    from ingestd.sources.http.handler import Found, OnRequest
    from ingestd.sources.screening import ScreenedIntake

log = get_logger()

_BACKLOG = 1024
_SHUTDOWN_SECONDS = 1.0
_HEAR_SECONDS = 1.0
_HOW_TO_SHARE = {
    False: "; daemons share a port if each has http.reuse_port = true",
    True: "; its other daemon needs http.reuse_port = true as well, and the same user",
}


class HttpSource(Source):
    """The server for records.

    Args:
        settings: its address and its bounds.
        intakes: the pipelines by name.
        default: the pipeline of requests that name none.
        name: of the source.
        on_request: called for each answer about records, and for each problem, with the template of
            the route (`other` if there is none), the pipeline (empty if it is not known), the
            status (499 if the client left), the seconds since the head was read, and the slug of
            the problem (empty if there was none).
        sockets: listening ones to serve on, instead of on one of its own at `http.listen`.
        screens: those of the intakes that do not take every record.

    Attributes:
        addresses: where it listens, after `start`; `HOST:PORT` with the real port, `unix:PATH`.

    Raises:
        ConfigError: a file with tokens, secrets or certificates is not what it should be.
    """

    def __init__(
        self,
        settings: HttpSettings,
        intakes: Mapping[str, Intake],
        *,
        default: str,
        name: str = "http",
        on_request: OnRequest | None = None,
        sockets: Sequence[socket.socket] = (),
        screens: Mapping[str, ScreenedIntake] = MappingProxyType({}),
    ) -> None:
        self._settings = settings
        self._intakes = {**intakes, **{name: one.plain for name, one in screens.items()}}
        self._screens = screens
        self._default = default
        self._name = name
        self._formats = {name: intake.format for name, intake in intakes.items()}
        self._on_request = on_request
        self._sockets = list(sockets)
        if settings.reuse_port and self._sockets:
            # It is one queue for all processes that have the socket: nothing there is shared out.
            passed = ", ".join(map(show_socket, self._sockets))
            raise ConfigError(
                problem=f"http.reuse_port: the socket {passed} was passed; one that is shared has"
                " to be opened by each daemon itself, at http.listen"
            )
        check_exposure(settings, self._sockets)
        access = self._access = self._read(settings)
        _tell(access)
        self._local = (
            all(map(is_local, self._sockets)) if self._sockets else is_loopback(settings.listen)
        )
        self._authenticator = Authenticator(settings, access, local=self._local)
        if demands_signatures_alone(settings):
            log.warning("records_refused", reason=ONLY_DELIVERIES)
        self._limits = self._bound()
        # The handler looks here; `_publish` puts everything in.
        self._resources: dict[str, Resource[Found]] = {}
        self._counts: dict[str, AppendCounts] = {}
        self._off: dict[str, Resource[str]] | None = None
        self.addresses: list[str] = []

    def _read(self, settings: HttpSettings) -> Access:
        return read_access(settings, self._formats, self._default)

    def _bound(self) -> dict[str, BodyLimits]:
        """Returns the bounds of a request by pipeline, each with all of them."""
        settings = self._settings
        limits: dict[str, BodyLimits] = {}
        for name, intake in self._intakes.items():
            limits[name] = BodyLimits(
                settings.records_max,
                intake.record_bytes_max,
                intake.json_depth_max,
                settings.invalid_kept,
                settings.decompressed_bytes_max,
                limits,
            )
        return limits

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it can't, and why.
        """
        settings = self._settings
        self._handler = IngestHandler(
            settings, self._resources, self._authenticator, self._on_request
        )
        self._server = Server(
            self._handler.answer,
            connections_max=settings.connections_max,
            per_client_max=settings.connections_per_client_max,
            header_timeout=settings.header_timeout,
            keepalive_timeout=settings.keepalive_timeout,
            write_timeout=settings.body_timeout,
        )
        self._handler.why_absent = self._why_absent
        self._handler.tracer = self.tracer
        self._server.authorities = self._access.authorities
        self._quick = QuickRequests(self._handler, self._server)
        try:
            sockets = self._sockets or await bind(
                *split_address(settings.listen), _BACKLOG, shared=settings.reuse_port
            )
        except (OSError, ValueError) as error:
            self._handler.close()
            problem = listen_fault(error, _HOW_TO_SHARE[settings.reuse_port])
            raise AddressError(
                address=settings.listen, setting="http.listen", problem=problem
            ) from error
        self.addresses = [show_socket(sock) for sock in sockets]
        self._publish(settings, self._access)
        backlog = 0 if self._sockets else _BACKLOG
        self._listener = Listener(self._server, sockets, self._access.context, backlog=backlog)

    def _publish(self, settings: HttpSettings, access: Access) -> None:
        """Puts everything that can be asked for in place of what there was, by its path."""
        endpoints = access.endpoints
        found: dict[str, Resource[Found]] = {}
        for name, endpoint in endpoints.items():
            keep = (*settings.keep_headers, *endpoint.keep_headers)
            envelopes = RequestEnvelopes(self._name, name, keep)
            kind = AppendCounts if self.tracer is None else self.tracer.counts
            counts = self._counts.setdefault(name, kind())
            for spec in endpoint.routes:
                found |= self._resources_of(endpoint, spec, envelopes, counts)
            if endpoint.prefix:
                unknown = UnknownPath(endpoint)
                found[endpoint.prefix + BELOW] = Resource(ALL_METHODS, unknown)
        found |= self._documents(settings, access)
        self._resources.clear()
        self._resources.update(found)
        self._off = None
        if settings.cors_origins:
            sent = [name for one in endpoints.values() for name in one.request_headers]
            shown = [name for one in endpoints.values() for name in one.response_headers]
            self._handler.cors = Cors(settings.cors_origins, sent, shown)

    def _documents(self, settings: HttpSettings, access: Access) -> dict[str, Resource[Found]]:
        """Documents about the server, and the answer for it as a whole."""
        facts: dict[str, Any] = {
            "endpoints": access.endpoints,
            "formats": self._formats,
            "public_names": settings.allow_anonymous or not demands_proof(settings),
            "address": self.addresses[0],
            "secure": access.context is not None,
            "schemas": {name: one.schema for name, one in self._screens.items() if one.schema},
        }

        def made(path: str) -> StaticResponse:
            from ingestd.sources.http import openapi  # noqa: PLC0415  most daemons are never asked

            return openapi.make(path, **facts)

        found: dict[str, Resource[Found]] = {
            path: Resource(READ, LateDocument(partial(made, path)))
            for path in ("/", "/openapi.json")
        }
        found[SERVER] = Resource(ASK, LateDocument(partial(StaticResponse, 204)))
        return found

    def _why_absent(self, method: str, target: str) -> str:
        """Names the endpoint that is off and would have a path; see `IngestHandler`."""
        if self._off is None:  # only now: it imports them all
            on = self._access.endpoints
            self._off = routes_off(self._settings, on, self._formats, self._default)
        if (found := look_up(self._off, method, target)) is None:
            return ""
        table = "http" if self._name == "http" else f"sources.{self._name}"
        return f"the endpoint {found.what} is off: set {table}.endpoints.{found.what}.pipeline"

    def _resources_of(
        self,
        endpoint: Endpoint,
        spec: RouteSpec,
        envelopes: RequestEnvelopes,
        counts: AppendCounts,
    ) -> dict[str, Resource[Found]]:
        """Returns a resource for each value of a template's variable, and one for all others."""
        methods = tuple(dict.fromkeys((*spec.methods, *spec.probes, "OPTIONS")))
        found: dict[str, Resource[Found]] = {}
        for value, target in spec.targets.items():
            intake = self._intakes[target.pipeline]
            name = target.principal
            principal = Principal(name, id=name, client=value) if name else None
            limits = self._limits[target.pipeline]
            route = Route(
                endpoint, spec, value, intake, limits, envelopes, counts, principal,
                self._intakes, self._screens,
            )  # fmt: skip
            found[spec.path_of(value)] = Resource(methods, route, alone=True)
        if spec.variable and ANY not in spec.targets and spec.auth != SIGNATURE:
            below = spec.path.partition("{")[0]
            found.setdefault(below, Resource(methods, UnknownPath(endpoint, spec)))
        return found

    async def prepare(self, settings: HttpSettings) -> Callable[[], None]:
        """Reads tokens, secrets and certificates anew, and changes nothing yet.

        Args:
            settings: of them the tables of clients' credentials count; the rest is as at the start.

        Returns:
            What makes it so: connections stay, and none is refused; what goes on and is not
            allowed any more comes to an end.

        Raises:
            ConfigError: something is wrong with them.
        """
        check_exposure(settings, self._sockets)
        loop = asyncio.get_running_loop()
        access: Access = await loop.run_in_executor(None, self._read, settings)

        def change() -> None:
            _tell(access)
            fewer = not self._access.authorities <= access.authorities
            self._authenticator = self._handler.authenticator = Authenticator(
                settings, access, local=self._local, before=self._authenticator
            )
            self._access = access
            self._publish(settings, access)
            self._listener.context = access.context
            self._server.authorities = access.authorities
            self._server.heads.forget()
            self._handler.ingestion.look_again()
            if fewer:
                self._server.end_certified()

        return change

    async def reload(self, settings: HttpSettings | None = None) -> None:
        """Prepares and changes; with the settings of the start if there are no others."""
        (await self.prepare(settings or self._settings))()

    def endpoints(self) -> Mapping[str, AppendCounts]:
        """See `Source`."""
        return self._counts

    def numbers(self) -> Mapping[str, float]:
        """See `Source`."""
        counts, context = self._counts.values(), self._access.context
        numbers: dict[str, float] = {
            "records": sum(one.records for one in counts),
            "invalid": sum(one.invalid for one in counts),
        }
        if context is not None and context.valid_until:
            numbers["certificate_until"] = context.valid_until
        return numbers

    def facts(self) -> dict[str, object]:
        """See `Source`."""
        return {"listening": self.addresses}

    async def stop_taking(self, deadline: float) -> None:
        """New connections are refused, new requests get 503; those in progress are finished.

        A connection that was accepted before is no new one: its first request is served. So where
        daemons share a port, clients that connect for each request notice no daemon that leaves.

        Args:
            deadline: when it stops waiting for them, in the loop's time.
        """
        self._listener.close()
        left = deadline - asyncio.get_running_loop().time()
        await self._server.hear_out(min(_HEAR_SECONDS, left))
        self._handler.begin_to_drain()
        await self._handler.drain(deadline)

    async def close(self) -> None:
        """Closes every connection. A request that is still in progress gets no answer."""
        self._handler.close()
        self._listener.close()
        await self._listener.wait_closed()  # or a handshake would end as one more connection
        self._quick.close()
        await self._server.close(_SHUTDOWN_SECONDS)


def _tell(access: Access) -> None:
    for doubt in access.doubts:
        log.warning("certificate_doubtful", problem=doubt)
