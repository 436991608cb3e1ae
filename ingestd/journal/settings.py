"""Settings of the journal and of its dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from ingestd.base.errors import ConfigError
from ingestd.config.sections import Choice, Section
from ingestd.config.units import Count, Seconds, Size, show_size
from ingestd.registry import JOURNALS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ingestd.journal.interface import Journal, JournalContext

Level = Literal["error", "warning", "info"]
_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_DAY = 86400.0


def _pointer(text: str) -> str:
    if text:
        from ingestd.codecs.pointer import Pointer  # noqa: PLC0415  most daemons have none

        Pointer(text)
    return text


JsonPointer = Annotated[str, AfterValidator(_pointer)]
"""A JSON Pointer, or nothing."""
STORED_BYTES_MAX = 900 * _MIB
"""Bound of one row of a journal. SQLite's bound is 10^9 bytes (SQLITE_MAX_LENGTH), and what
stands beside the records is in it: a block of input before a long record, or lengths."""


class JournalSettings(Section):
    """`[journal]`: the durable store of records that are accepted and not yet settled."""

    kind: Annotated[str, Choice(JOURNALS.names)] = Field(
        "sqlite",
        description="memory loses its records with the process, jetstream outlives the machine",
    )
    bytes_max: Size = Field(
        8 * _GIB,
        ge=1,
        le=1024 * _TIB,
        description="bound of the journal; then new records are refused (503)",
    )
    free_min: Size = Field(
        256 * _MIB,
        ge=0,
        le=1024 * _TIB,
        description="minimum of free disk space; below it new records are refused (503)",
    )
    keep: Seconds = Field(
        0.0,
        ge=0,
        le=36500 * _DAY,
        description="time for which processed records are kept for ingestd replay; 0s keeps none",
    )
    keep_bytes_max: Size = Field(
        _GIB,
        ge=1,
        le=1024 * _TIB,
        description="bound of these; the oldest go first, also for the journal's own bounds",
    )

    @property
    def own(self) -> Any:
        """The table `[journal.KIND]` of its kind; `None` if that has none."""
        return getattr(self, self.kind, None)


class JournalKind:
    """Base class of a kind of journal with settings of its own, in the table `[journal.NAME]`.

    It is imported with the settings, also for `--help`: what is large is imported in `build`. A
    kind without settings may be a function that takes what `build` takes, but its table.

    Attributes:
        settings: its table.
    """

    settings: ClassVar[type[Section]] = Section

    def problems(self, own: Any) -> Iterable[tuple[str, str]]:  # noqa: ARG002
        """Finds settings that cannot work together: (key in the table, problem) for each."""
        return ()

    def build(self, settings: JournalSettings, context: JournalContext, own: Any) -> Journal:
        """Builds the journal of a pipeline, not opened yet.

        Args:
            settings: `[journal]`.
            context: its surroundings.
            own: its table.

        Raises:
            ConfigError: something that the settings name is not what it should be.
        """
        raise NotImplementedError

    async def check(self, own: Any) -> Sequence[tuple[Level, str]]:  # noqa: ARG002
        """Asks its store, for `check --connect`; changes nothing.

        Returns:
            (level, text) of each finding: `error`, `warning` or `info`.
        """
        return ()

    async def logs(self, own: Any) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        """Lists the logs of all daemons in its store, for `ingestd journal list`.

        Raises:
            IngestdError: the store does not answer, or the kind has none that daemons share.
        """
        raise ConfigError(problem="the journals of this kind lie in the data directory: see stat")


class DeadSettings(Section):
    """`[dead]`: bounds of the dead letters."""

    bytes_max: Size = Field(
        _GIB,
        ge=1,
        le=1024 * _TIB,
        description="bound of dead letters; then batches are not dispatched any more",
    )
    invalid_bytes_max: Size = Field(
        64 * _MIB,
        ge=1,
        le=_TIB,
        description="bound of dead letters of invalid records; each sender has a quarter",
    )
    age_max: Seconds = Field(
        0.0,
        ge=0,
        le=36500 * _DAY,
        description="maximum age of dead letters; 0s keeps them until they are purged",
    )


class DedupeSettings(Section):
    """`[dedupe]`: records that are accepted once, by a value in them."""

    key: JsonPointer = Field(
        "", description="JSON Pointer of a value; a record with one that came before is left out"
    )
    window: Seconds = Field(
        3600.0, gt=0, le=365 * _DAY, description="time for which a value is remembered"
    )
    keys_max: Count = Field(
        200_000,
        ge=1,
        le=10**8,
        description="bound of the values that are remembered: the last ones",
    )


def beyond_a_row(size: int) -> str:
    """Explains why nothing of a size, in bytes, can be stored; empty if it can."""
    if size <= STORED_BYTES_MAX:
        return ""
    bound = show_size(STORED_BYTES_MAX)
    return f"{show_size(size)} is more than SQLite stores at once: at most {bound}"
