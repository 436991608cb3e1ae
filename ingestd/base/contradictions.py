"""Settings that are right in their parts and cannot work together."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from ingestd.base.access import access_contradictions
from ingestd.base.address import split_address
from ingestd.base.units import show_seconds, show_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.base.settings import PipelineSettings, Settings


# What a source that reads a stream appends at once, beside a record.
_BLOCKS = {"stdin": 1024**2, "fetch": 4 * 1024**2}


STORED_BYTES_MAX = 900 * 1024**2
"""Of what is one row of a journal. SQLite's bound is 10^9 bytes (SQLITE_MAX_LENGTH), and what
stands beside the records is in it: a block of input before a long record, or lengths."""


class ContradictionError(ValueError):
    """Settings that cannot work together.

    Attributes:
        problems: (dotted key, what is wrong with it), at least one.
    """

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {problem}" for key, problem in problems))


def contradictions(settings: Settings) -> list[tuple[str, str]]:
    """(dotted key, problem) for each; the key is the one that is most likely to be changed."""
    pipelines = settings.pipeline_settings()
    problems = [*_at_the_door(settings), *access_contradictions(settings), *_of_fetch(settings)]
    if settings.source.pipeline not in pipelines:
        problems.append(("source.pipeline", f"there is no pipeline {settings.source.pipeline!r}"))
    for name, pipeline in pipelines.items():
        prefix = "" if name == "default" else f"pipelines.{name}."
        problems.extend((prefix + key, text) for key, text in _in_a_pipeline(pipeline))
        if text := _without_room(settings, pipeline):
            problems.append((f"{prefix}journal.bytes_max", text))
    return problems


def _without_room(settings: Settings, pipeline: PipelineSettings) -> str:
    """What one append may bring beyond the journal's bound: it would be tried for ever.

    A client gets 413 for that; a stream that is read has nobody to tell.
    """
    block = pipeline.record_bytes_max + _BLOCKS.get(settings.source.kind, 0)
    if settings.source.kind == "http" or pipeline.journal.bytes_max >= 2 * block:
        return ""
    bound = show_size(pipeline.journal.bytes_max)
    return f"{bound} has no room for two blocks of input ({show_size(block)})"


def _at_the_door(settings: Settings) -> list[tuple[str, str]]:
    http, admin, problems = settings.http, settings.admin, []
    if settings.source.kind != "http":
        return []
    if http.listen == admin.listen and split_address(http.listen)[1] != 0:
        problems.append(("admin.listen", f"http.listen is {http.listen} too"))
    if http.reuse_port:
        problems.extend(("http.reuse_port", text) for text in _without_sharing(http.listen))
    if http.inflight_bytes_max < http.body_bytes_max:
        room, body = show_size(http.inflight_bytes_max), show_size(http.body_bytes_max)
        text = f"{room} has no room for one body of http.body_bytes_max ({body})"
        problems.append(("http.inflight_bytes_max", text))
    if any(one.journal.kind == "sqlite" for one in settings.pipeline_settings().values()):
        problems += [
            (f"http.{key}", text)
            for key in ("wire_bytes_max", "body_bytes_max")
            if (text := _beyond_a_row(getattr(http, key)))
        ]
    return problems


def _beyond_a_row(size: int) -> str:
    """Why nothing of that size can be stored; empty if it can."""
    if size <= STORED_BYTES_MAX:
        return ""
    bound = show_size(STORED_BYTES_MAX)
    return f"{show_size(size)} is more than SQLite stores at once: at most {bound}"


def _without_sharing(listen: str) -> Iterator[str]:
    """Why a port can't be shared."""
    if not hasattr(socket, "SO_REUSEPORT"):
        yield "this platform has no SO_REUSEPORT"
    if split_address(listen)[1] == 0:
        yield f"http.listen is {listen}: port 0 is another one for each daemon, say which to share"


def _of_fetch(settings: Settings) -> list[tuple[str, str]]:
    fetch, problems = settings.fetch, []
    if settings.source.kind == "fetch" and not (fetch.urls or fetch.file):
        problems.append(
            ("fetch.urls", "no URL: say some here, or name a file of them in fetch.file")
        )
    if fetch.follow and fetch.every:
        problems.append(("fetch.every", "a stream that is followed (fetch.follow) has no end"))
    if fetch.backoff_max < fetch.backoff:
        longest, first = show_seconds(fetch.backoff_max), show_seconds(fetch.backoff)
        problems.append(("fetch.backoff_max", f"{longest} is shorter than fetch.backoff ({first})"))
    return problems


def _in_a_pipeline(pipeline: PipelineSettings) -> list[tuple[str, str]]:
    retry, problems = pipeline.retry, []
    if retry.backoff_max < retry.backoff:
        longest, first = show_seconds(retry.backoff_max), show_seconds(retry.backoff)
        problems.append(("retry.backoff_max", f"{longest} is shorter than retry.backoff ({first})"))
    if pipeline.queue.bytes_max < pipeline.batch.bytes_max:
        room, batch = show_size(pipeline.queue.bytes_max), show_size(pipeline.batch.bytes_max)
        text = f"{room} has no room for one batch of batch.bytes_max ({batch})"
        problems.append(("queue.bytes_max", text))
    if pipeline.journal.kind == "sqlite":
        # A record is stored whole, and so are the dead letters of a batch.
        sizes = {"record_bytes_max": pipeline.record_bytes_max}
        sizes["batch.bytes_max"] = pipeline.batch.bytes_max
        problems += [(key, text) for key, size in sizes.items() if (text := _beyond_a_row(size))]
    return problems
