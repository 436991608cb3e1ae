"""Values that a test gives to a harness, and gets back: handlers, settings by name, records."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.errors import IngestdError
from ingestd.base.record import Records
from ingestd.config.layers import Flag
from ingestd.config.loader import anchored, load
from ingestd.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ingestd.base.record import Format
    from ingestd.pipeline_settings import PipelineSettings


class HarnessError(IngestdError):
    """A harness was used in a way that it cannot be, or what it runs does not come to an end."""

    message = "{problem}"


GIVEN = SimpleNamespace()
"""Handlers that no module has under a name, such as functions in a test, while they are used."""


class GivenHandlers:
    """The handlers of one harness, under names that a pipeline finds them by."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def name(self, handler: object) -> str:
        """The `module:name` of a callable; a text is one already, or the name of a sink.

        Raises:
            HarnessError: it is neither.
        """
        if isinstance(handler, str):
            return handler
        if not callable(handler):
            kind = type(handler).__name__
            raise HarnessError(
                problem="a handler is a function, a class, module:name or the name of a sink,"
                f" not {kind}: {handler!r:.80}"
            )
        module = getattr(handler, "__module__", None) or ""
        name = getattr(handler, "__qualname__", type(handler).__qualname__)
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is handler:
            return f"{module}:{name}"
        own = f"{name.rpartition('.')[2].strip('<>')}_{id(handler):x}"
        setattr(GIVEN, own, handler)
        self._names.append(own)
        return f"{__name__}:GIVEN.{own}"

    def forget(self) -> None:
        """Gives the names up."""
        for name in self._names:
            vars(GIVEN).pop(name, None)


def settings_from(
    named: Mapping[str, object], config: str | Path | None, pipeline: str
) -> PipelineSettings:
    """The settings of a pipeline as a daemon would have them, from names and a file."""
    flags = [Flag(key, _as_text(value), f"argument {key}") for key, value in named.items()]
    nowhere = Path("/nonexistent")
    loaded = load(
        Settings,
        flags,
        environ={},
        cwd=nowhere if config is None else Path.cwd(),
        config=None if config is None else str(config),
        secrets=nowhere,
        system_config=nowhere,
    )
    pipelines = anchored(loaded.settings, Path.cwd()).pipeline_settings()
    if pipeline not in pipelines:
        known = ", ".join(pipelines)
        raise HarnessError(problem=f"there is no pipeline {pipeline!r}, only {known}")
    return pipelines[pipeline]


def check_count(what: str, number: object) -> None:
    """Refuses a number of batches or calls that none has: nothing would come of the plan.

    Raises:
        HarnessError: it is no whole number of at least 1.
    """
    if not isinstance(number, int) or number < 1:
        raise HarnessError(problem=f"{what} is a whole number from 1 on, not {number!r:.80}")


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value.total_seconds()}s" if isinstance(value, timedelta) else str(value)


def records_of(records: Iterable[object], settings: PipelineSettings) -> Records:
    """The records as a source would accept them.

    Raises:
        HarnessError: they are none; names the first one.
    """
    if isinstance(records, str | bytes | Mapping):
        raise HarnessError(problem="send takes a list of records; for one write send([record])")
    payloads = []
    for index, record in enumerate(records):
        try:
            payload = _encoded(record, settings.format)
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"record {index} is no {settings.format}: {error}"
            raise HarnessError(problem=problem) from error
        if fault := settings.record_fault(payload):
            raise HarnessError(problem=f"record {index} would not be accepted: {fault}")
        payloads.append(payload)
    has_breaks = any(b"\n" in one for one in payloads)
    return Records.sized(payloads) if has_breaks else Records.lines(payloads)


def _encoded(record: object, form: Format) -> bytes:
    if isinstance(record, bytes):
        return record
    if form == "text" and isinstance(record, str):
        return record.encode()
    if form != "json":
        raise TypeError(f"it is {type(record).__name__} {record!r:.80}")
    return msgspec.json.encode(record)


def as_sent(payload: bytes, form: str) -> Any:
    """A record as a test sends it: a JSON value, text or bytes."""
    if form == "json":
        return msgspec.json.decode(payload)
    return payload.decode() if form == "text" else payload
