"""The source `http`: a server for records, as its owner sees it; see `door.py` for requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from ingestd.base.access import demands_proof
from ingestd.base.address import show_address, split_address
from ingestd.base.errors import AddressError
from ingestd.sources.http.access import read_access
from ingestd.sources.http.body import Bounds
from ingestd.sources.http.door import Door, Route
from ingestd.sources.http.gate import Caller, Gate
from ingestd.sources.http.listener import TlsListener, bind
from ingestd.sources.http.published import published
from ingestd.sources.http.routes import ANY_PIPELINE, RECORDS, WEBHOOKS, WRITE, Resource
from ingestd.sources.http.server import Server
from ingestd.sources.http.webhooks import Webhook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingestd.base.settings import HttpSettings
    from ingestd.sources.http.access import Access
    from ingestd.sources.http.document import Document
    from ingestd.sources.http.door import OnRequest
    from ingestd.sources.intake import Intake

log = structlog.get_logger(__name__)

_BACKLOG = 1024
_SHUTDOWN_SECONDS = 1.0


class HttpSource:
    """The server for records.

    Args:
        settings: its address and its bounds.
        intakes: the pipelines by name.
        default: the one that `POST /v1/records` means.
        on_request: called for each answer about records, and for each problem, with the pipeline
            (empty if it is not known), the status (499 if the client left), the seconds since the
            head was read, and the slug of the problem (empty if there was none).

    Attributes:
        addresses: where it listens, after `start`; `HOST:PORT` with the real port.

    Raises:
        ConfigError: a file with tokens, secrets or certificates is not what it should be.
    """

    def __init__(
        self,
        settings: HttpSettings,
        intakes: Mapping[str, Intake],
        *,
        default: str,
        on_request: OnRequest | None = None,
    ) -> None:
        self._settings = settings
        self._formats = {name: intake.format for name, intake in intakes.items()}
        self._default = default
        self._on_request = on_request
        access = read_access(settings)
        _tell(access)
        self._gate = Gate(settings, access)
        self._webhooks = {
            name: Webhook(name, webhook, access.webhooks[name])
            for name, webhook in settings.webhooks.items()
        }
        self._resources = self._build_resources(intakes)
        self.addresses: list[str] = []

    def _build_resources(
        self, intakes: Mapping[str, Intake]
    ) -> dict[str, Resource[Route | Document | None]]:
        """Everything that can be posted to, by its path; `start` adds what there is to read."""
        settings = self._settings
        routes = {
            name: Route(
                intake,
                Bounds(settings.records_max, intake.record_bytes_max, intake.json_depth_max),
            )
            for name, intake in intakes.items()
        }
        found: dict[str, Resource[Route | Document | None]] = {
            RECORDS: Resource(WRITE, routes[self._default]),
            ANY_PIPELINE: Resource(WRITE, None),
        }
        for name, route in routes.items():
            found[f"{RECORDS}/{name}"] = Resource(WRITE, route)
        for name, webhook in self._webhooks.items():
            route = routes[settings.webhooks[name].pipeline or self._default]
            route = route._replace(webhook=webhook, caller=Caller(f"webhook {name}"))
            found[f"{WEBHOOKS}/{name}"] = Resource(WRITE, route)
        return found

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it can't, and why.
        """
        settings = self._settings
        self._door = Door(settings, self._resources, self._gate, self._on_request)
        self._server = Server(
            self._door.answer,
            connections_max=settings.connections_max,
            per_client_max=settings.connections_per_client_max,
            head_timeout=settings.head_timeout,
            keepalive_timeout=settings.keepalive_timeout,
        )
        try:
            host, port = split_address(settings.listen)
            self._listener = await self._listen(host, port)
        except (OSError, ValueError) as error:
            self._door.close()
            what = getattr(error, "strerror", None) or str(error)
            raise AddressError(
                address=settings.listen, setting="http.listen", problem=what
            ) from error
        self.addresses = [show_address(*sock.getsockname()[:2]) for sock in self._listener.sockets]
        self._resources |= published(
            self._formats,
            default=self._default,
            public_names=not demands_proof(settings),
            address=self.addresses[0],
        )

    async def _listen(self, host: str, port: int) -> asyncio.Server | TlsListener:
        context = self._gate.access.context
        if context is not None:
            return TlsListener(self._server, await bind(host, port, _BACKLOG), context)
        return await asyncio.get_running_loop().create_server(
            self._server, host or None, port, backlog=_BACKLOG, reuse_address=True
        )

    async def reload(self) -> None:
        """Reads tokens, secrets and certificates anew; connections stay, and none is refused.

        Raises:
            ConfigError: something is wrong with them, and everything stays as it is.
        """
        loop = asyncio.get_running_loop()
        access: Access = await loop.run_in_executor(None, read_access, self._settings)
        _tell(access)
        self._gate.access = access
        for name, webhook in self._webhooks.items():
            webhook.keys = access.webhooks[name]
        if isinstance(self._listener, TlsListener) and access.context is not None:
            self._listener.context = access.context

    async def wait_finished(self) -> None:
        """Never returns: a server has no end of input."""
        await asyncio.get_running_loop().create_future()

    async def stop_taking(self, deadline: float) -> None:
        """New requests get 503, new connections are refused; those in progress are finished.

        Args:
            deadline: when it stops waiting for them, in the loop's time.
        """
        self._listener.close()
        await self._door.drain(deadline)

    async def close(self) -> None:
        """Closes every connection. A request that is still in progress gets no answer."""
        self._door.close()
        self._listener.close()
        if isinstance(self._listener, TlsListener):
            await self._listener.wait_closed()  # or a handshake would end as one more connection
        await self._server.close(_SHUTDOWN_SECONDS)
        await self._listener.wait_closed()


def _tell(access: Access) -> None:
    for doubt in access.doubts:
        log.warning("certificate_doubtful", problem=doubt)
