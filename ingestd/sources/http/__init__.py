"""The source `http` accepts records over HTTP. Begin with `source.py`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ingestd.base.errors import ConfigError
from ingestd.config.sections import LateTables, Reloadable, Section, table_fault, unusable
from ingestd.http.settings import HttpSettings, has_one_principal, problems_of, signatures_valid
from ingestd.registry import ENDPOINTS, WITHOUT_TABLE
from ingestd.sources.base import KeyNeeds, SourceKind
from ingestd.sources.http.endpoints.base import EndpointSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.base import Source, SourceContext
    from ingestd.sources.http.endpoints.base import Endpoint


def _switched() -> Sequence[str]:
    """The names of the endpoints that have a table, whose `pipeline` switches them on."""
    return [name for name in ENDPOINTS.names() if name not in WITHOUT_TABLE]


@lru_cache(1000)
def _table(name: str) -> type[EndpointSettings]:
    """The model of `[http.endpoints.NAME]`; imports the endpoint."""
    try:
        settings = ENDPOINTS.load(name).settings
        fault = table_fault(name, settings, Section)
        if not fault and not issubclass(settings, EndpointSettings):
            fault = "its settings are no EndpointSettings"
    except (ConfigError, ValueError, TypeError, AttributeError) as error:
        fault = str(error)
    # One that cannot be used is no reason for a daemon that does not use it not to start.
    return unusable(EndpointSettings, fault) if fault else settings


class HttpTables(HttpSettings):
    """`[http]`, with a table for each endpoint that can be switched on."""

    endpoints: Annotated[dict[str, Any], Reloadable(), LateTables(_switched, _table)] = Field(
        default_factory=dict
    )


class HttpSourceKind(SourceKind):
    """`kind = "http"`."""

    settings = HttpTables
    listens = True
    feeds_all = True
    stored_whole = ("request_bytes_max", "decompressed_bytes_max")

    def problems(
        self, settings: HttpSettings, *, formats: Mapping[str, str], default: str, runs: bool
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        if runs:
            yield from problems_of(settings, formats, default)
        for name, table in settings.endpoints.items():
            for key, text in _in_a_table(name, table, formats) if table.pipeline else ():
                yield f"endpoints.{name}.{key}", text

    def keys(self, settings: HttpSettings) -> KeyNeeds:
        """See `SourceKind`."""
        return KeyNeeds(
            settings.idempotency_ttl,
            settings.idempotency_keys_max,
            signatures_valid(settings),
            shared=not has_one_principal(settings),
            ids_max=settings.idempotency_ids_max,
        )

    def check(
        self, settings: HttpSettings, formats: Mapping[str, Format], default: str
    ) -> Sequence[str]:
        """See `SourceKind`."""
        from ingestd.sources.http.access import read_access  # noqa: PLC0415  the server's, large

        off = [
            f"http.endpoints.{name}: the endpoint is off, because its table has no pipeline"
            f" (set http.endpoints.{name}.pipeline)"
            for name, table in settings.endpoints.items()
            if "pipeline" not in table.model_fields_set
        ]
        return [*read_access(settings, formats, default).doubts, *off]

    def build(self, settings: HttpSettings, context: SourceContext) -> Source:
        """See `SourceKind`."""
        from ingestd.sources.http.source import HttpSource  # noqa: PLC0415  the server is large

        return HttpSource(
            settings,
            context.pipelines,
            default=context.pipeline,
            name=context.name,
            on_request=context.on_request,
            sockets=context.sockets,
            screens=context.screens,
        )


def _in_a_table(
    name: str, table: EndpointSettings, formats: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Finds what is wrong in the table of an endpoint that is switched on."""
    if table.FAULT:
        yield "pipeline", table.FAULT
        return
    endpoint: type[Endpoint] = ENDPOINTS.load(name)
    to = table.pipeline
    if to not in formats:
        yield "pipeline", f"there is no pipeline {to!r}"
    elif endpoint.formats and formats[to] not in endpoint.formats:
        takes = " or ".join(endpoint.formats)
        yield "pipeline", f"{to!r} has the format {formats[to]}; records of {name} are {takes}"
    yield from endpoint.check(table, formats)
