"""Components by kind and name: sources, endpoints, sinks, journals, executors; imported when used.

A component is `module:name`. Those of ingestd stand here, so that they work without an installation
and no package can take their names; others come from entry points. Nothing is imported but the
component that is asked for.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ingestd.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


_WITH_SETTINGS = "Kind"


class Components:
    """The components of one kind.

    Args:
        kind: the word for one of them, for people.
        group: the entry-point group that other packages register theirs in.
        own: those of ingestd: name to `module:name`.
    """

    def __init__(self, kind: str, group: str, own: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self.own = own

    def names(self) -> list[str]:
        """All names, those of ingestd first."""
        return [*self.own, *sorted(self._others().keys() - self.own.keys())]

    def place(self, name: str) -> str | None:
        """The `module:name` of a component; `None` if there is none of that name.

        Raises:
            ConfigError: more than one package registered the name.
        """
        if name in self.own:
            return self.own[name]
        places = self._others().get(name, {})
        if len(places) > 1:
            packages = " and ".join(sorted(places.values()))
            raise ConfigError(problem=f"registered by more than one package: {packages}")
        return next(iter(places), None)

    def load(self, name: str) -> Any:
        """Imports a component.

        Raises:
            ConfigError: there is none of that name, or it cannot be imported.
        """
        place = self.place(name)
        if place is None:
            raise ConfigError(problem=f"there is no {self.kind} {name!r}")
        module, _, attribute = place.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:
            if name in self.own:
                raise
            problem = f"the {self.kind} {name!r} cannot be loaded from {place}: {error}"
            raise ConfigError(problem=" ".join(problem.split())[:500]) from error

    def load_kinds(self, fault: Callable[[str, Any], str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Imports the components that may have settings of their own, for the tables of these.

        Of ingestd's own these are the light classes whose names end with `Kind`. One that cannot be
        used is no reason for a daemon that does not use it not to start.

        Args:
            fault: gives for name and component why it cannot be used; empty if it can.

        Returns:
            The components by name, and of those that cannot be used, why.
        """
        kinds: dict[str, Any] = {}
        unusable: dict[str, str] = {}
        for name in self.names():
            if name in self.own and not self.own[name].endswith(_WITH_SETTINGS):
                continue
            try:
                kind = self.load(name)
                problem = fault(name, kind)
            except (ConfigError, ValueError, TypeError, AttributeError) as error:
                problem = str(error)
            if problem:
                unusable[name] = problem
            else:
                kinds[name] = kind
        return kinds, unusable

    def _others(self) -> dict[str, dict[str, str]]:
        return _registered(self.group, tuple(sys.path))


@lru_cache(16)
def _registered(group: str, path: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The entry points of a group: name to place to the package that registers it."""
    found: dict[str, dict[str, str]] = {}
    for point in _entry_points(path).select(group=group):
        found.setdefault(point.name, {})[point.value] = point.dist.name if point.dist else "?"
    return found


@lru_cache(4)
def _entry_points(path: tuple[str, ...]) -> Any:  # noqa: ARG001
    """The entry points of all packages, read once for all groups: each package has a file."""
    from importlib.metadata import entry_points  # noqa: PLC0415  slow, and workers need it seldom

    return entry_points()


SOURCES = Components(
    "source",
    "ingestd.sources",
    {
        "http": "ingestd.sources.http:HttpSourceKind",
        "stdin": "ingestd.sources.stdin:StdinSourceKind",
        "fetch": "ingestd.sources.fetch:FetchSourceKind",
        "syslog": "ingestd.sources.syslog:SyslogSourceKind",
        "forward": "ingestd.sources.forward:ForwardSourceKind",
        "kafka": "ingestd.sources.kafka:KafkaSourceKind",
        "nats": "ingestd.sources.nats:NatsSourceKind",
    },
)
ENDPOINTS = Components(
    "endpoint",
    "ingestd.endpoints",
    {
        "records": "ingestd.sources.http.endpoints.records:RecordsEndpoint",
        "otlp": "ingestd.sources.http.endpoints.otlp:OtlpEndpoint",
        "webhooks": "ingestd.sources.http.endpoints.webhooks:WebhooksEndpoint",
        "datadog": "ingestd.sources.http.endpoints.datadog:DatadogEndpoint",
        "loki": "ingestd.sources.http.endpoints.loki:LokiEndpoint",
        "elasticsearch": "ingestd.sources.http.endpoints.elasticsearch:ElasticsearchEndpoint",
        "splunk_hec": "ingestd.sources.http.endpoints.splunk_hec:SplunkHecEndpoint",
        "segment": "ingestd.sources.http.endpoints.segment:SegmentEndpoint",
        "posthog": "ingestd.sources.http.endpoints.posthog:PosthogEndpoint",
        "cloudevents": "ingestd.sources.http.endpoints.cloudevents:CloudeventsEndpoint",
    },
)
WITHOUT_TABLE = frozenset({"records", "webhooks"})
"""Endpoints that have no `[http.endpoints.NAME]`, which switches the others on."""
SINKS = Components(
    "sink",
    "ingestd.sinks",
    {
        "jsonl": "ingestd.sinks.jsonl:JsonlSink",
        "postgres": "ingestd.sinks.postgres.sink:PostgresSink",
        "sqlite": "ingestd.sinks.sqlite:SqliteSink",
        "elasticsearch": "ingestd.sinks.elasticsearch:ElasticsearchSink",
        "kafka": "ingestd.sinks.kafka.sink:KafkaSink",
        "nats": "ingestd.sinks.nats:NatsSink",
        "clickhouse": "ingestd.sinks.clickhouse:ClickHouseSink",
        "http": "ingestd.sinks.http:HttpSink",
        "objects": "ingestd.sinks.objects:ObjectsSink",
    },
)
HANDLERS = Components("handler", "ingestd.handlers", {})
JOURNALS = Components(
    "journal",
    "ingestd.journals",
    {
        "sqlite": "ingestd.journal.sqlite.journal:build",
        "memory": "ingestd.journal.memory:build",
        "jetstream": "ingestd.journal.jetstream:JetStreamKind",
    },
)
EXECUTORS = Components(
    "executor",
    "ingestd.executors",
    {
        "auto": "ingestd.execution.build:start_fitting",
        "process": "ingestd.execution.build:start_processes",
        "thread": "ingestd.execution.build:start_threads",
        "async": "ingestd.execution.build:start_coroutines",
    },
)
