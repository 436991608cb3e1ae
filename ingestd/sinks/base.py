"""The contract of a sink: an ordinary handler class that writes outward.

    class MySink:
        EXTRA = Extra("mysink", ("its_client",))  # a missing dependency is an error with a pip line
        BATCH = BatchHints(records_max=100_000)   # used where the user says nothing

        def __init__(self, options: MyOptions, context: Context) -> None: ...
        def __call__(self, batch: Batch[bytes]) -> None: ...
        def check(self) -> Iterable[SinkFinding]: ...  # reachable, rights, table; bounded in time,
                                                       # asked once a start; decides nothing there
        def close(self) -> None: ...

`MyOptions` is a `SinkOptions`. The sink is registered with one line in `ingestd/registry.py`, or
in the entry-point group `ingestd.sinks`. One with `async def __call__` runs on an event loop of the
daemon's. `__init__` opens nothing, so that the daemon starts while the other side is down.

**Errors** are told apart by what the other side said:

* transient (no connection, overload, deadlock, restart): `raise Unavailable("why")`. The outage
  rule (`execution/outage.py`) paces the tries, and none of them counts while the sink is down.
  `raise Unavailable("why", seconds)` where the other side says when.
* permanent for a record: `batch.reject(i, "why")`, once for each of them, and the rest is stored.
* permanent for the sink (a missing table or right): `raise Blocked("why, and what to do")`. The
  pipeline waits and says so once; nothing is given up.
* anything else that is raised counts as a try, and a batch that fails for long is split.

**Exactly once** rests on the batch's id: "already there" is done. After a split the ancestors are
asked as well, see `ids_of`. Records are rejected before that question, in every call, for a call
whose answer was lost is the one that counts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, NamedTuple

from msgspec import Meta

from ingestd.handlers.options import FilePath, Options, Seconds
from ingestd.handlers.outcome import SinkFinding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from ingestd.handlers.batch import Batch


class BatchHints(NamedTuple):
    """Bounds of a batch that suit a sink; used where the user says nothing.

    Attributes:
        records_max: as in `batch.records_max`.
        bytes_max: as in `batch.bytes_max`.
        age_max: as in `batch.age_max`, seconds.
    """

    records_max: int | None = None
    bytes_max: int | None = None
    age_max: float | None = None


class SinkOptions(Options, frozen=True, kw_only=True):
    """Options with sizes and times as they are written everywhere in the settings."""

    @classmethod
    def read(cls, kind: type, value: object) -> float:
        """See `Options.read`."""
        # Only here: it brings pydantic, which a worker with the defaults does without.
        from ingestd.config.units import parse_seconds, parse_size  # noqa: PLC0415

        return parse_seconds(value) if kind is Seconds else parse_size(value)

    @classmethod
    def show(cls, value: float) -> object:
        """See `Options.show`."""
        from ingestd.config.units import show_seconds, show_size  # noqa: PLC0415

        return show_size(value) if isinstance(value, int) else show_seconds(value)


class TlsOptions(SinkOptions, frozen=True, kw_only=True):
    """Options of a sink whose connections may have TLS."""

    LISTED_LAST = frozenset({"tls_ca", "tls_certificate", "tls_key", "tls_verify"})

    tls_ca: Annotated[
        FilePath | None, Meta(description="file of authorities (PEM) instead of the system's")
    ] = None
    tls_certificate: Annotated[
        FilePath | None, Meta(description="file of a client certificate (PEM), with its chain")
    ] = None
    tls_key: Annotated[
        FilePath | None, Meta(description="file of its key (PEM), if it is not in the same file")
    ] = None

    def __post_init__(self) -> None:
        if self.tls_key and not self.tls_certificate:
            raise ValueError("tls_key: it needs tls_certificate")

    @property
    def tls_files(self) -> tuple[str | None, str | None, str | None]:
        """Authorities, certificate and key."""
        return self.tls_ca, self.tls_certificate, self.tls_key


def check_folder(folder: Path) -> Iterator[SinkFinding]:
    """Finds out if a folder can be written to, or made; writes and makes nothing."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield SinkFinding("error", f"{place} is a file and not a folder")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield SinkFinding(
            "error", f"{place} can't be written to by the user with the id {os.geteuid()}"
        )


def ids_of(batch: Batch[Any]) -> tuple[str, ...]:
    """The names under which a batch may be stored already: its ancestors', then its own.

    A batch that failed until it was split may have been stored before its answer was lost. A sink
    that stores a batch whole or not at all finds that under the name of an ancestor.
    """
    return (*batch.lineage, batch.id)
