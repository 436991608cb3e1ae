"""The source `http` accepts records over HTTP. Begin with `source.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import create_model

from ingestd.config.sections import (
    Reloadable,
    Section,
    table_fault,
    unusable,
    with_tables,
)
from ingestd.http.settings import HttpSettings, has_one_principal, problems_of, signatures_valid
from ingestd.registry import ENDPOINTS
from ingestd.sources.base import KeyNeeds, SourceKind
from ingestd.sources.http.endpoints.base import EndpointSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.base import Source, SourceContext
    from ingestd.sources.http.endpoints.base import Endpoint


def _fault(name: str, endpoint: Any) -> str:
    if endpoint.settings is None and name in ENDPOINTS.own:
        return ""
    fault = table_fault(name, endpoint.settings, Section)
    if fault or endpoint.settings is None or issubclass(endpoint.settings, EndpointSettings):
        return fault
    return "its settings are no EndpointSettings"


_LOADED, _UNUSABLE = ENDPOINTS.load_kinds(_fault)
_ENDPOINTS: dict[str, type[Endpoint]] = _LOADED


def _with_endpoints() -> type[HttpSettings]:
    """`[http]` with a table for each endpoint that can be switched on."""
    tables = {name: one.settings for name, one in _ENDPOINTS.items() if one.settings is not None}
    tables |= {name: unusable(EndpointSettings, fault) for name, fault in _UNUSABLE.items()}
    endpoints = with_tables(Section, dict(tables))
    make: Any = create_model
    field = (Annotated[endpoints, Reloadable()], endpoints())
    made: type[HttpSettings] = make("HttpSettings", __base__=HttpSettings, endpoints=field)
    return made


class HttpSourceKind(SourceKind):
    """`kind = "http"`."""

    settings = _with_endpoints()
    listens = True
    feeds_all = True
    stored_whole = ("request_bytes_max", "decompressed_bytes_max")

    def problems(
        self, settings: HttpSettings, *, formats: Mapping[str, str], default: str, runs: bool
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        if runs:
            yield from problems_of(settings, formats, default)
        for name, table in settings.endpoints:
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

        return read_access(settings, formats, default).doubts

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
        )


def _in_a_table(
    name: str, table: EndpointSettings, formats: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Finds what is wrong in the table of an endpoint that is switched on."""
    if name in _UNUSABLE:
        yield "pipeline", _UNUSABLE[name]
        return
    endpoint, to = _ENDPOINTS[name], table.pipeline
    if to not in formats:
        yield "pipeline", f"there is no pipeline {to!r}"
    elif endpoint.formats and formats[to] not in endpoint.formats:
        takes = " or ".join(endpoint.formats)
        yield "pipeline", f"{to!r} has the format {formats[to]}; records of {name} are {takes}"
    yield from endpoint.check(table, formats)
