"""What SQLite can't store in one row is refused, and settings that would let it in do not start."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.journal.settings import STORED_BYTES_MAX
from ingestd.journal.sqlite import store
from ingestd.settings import Settings
from tests.sources.source_tools import ask
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 300_000


async def test_a_body_beyond_the_bound_is_413_and_the_journal_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = store.connect

    def small(path: Path, **more: Any) -> sqlite3.Connection:
        """SQLite as it is with 10^9 bytes, with fewer."""
        connection = connect(path, **more)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LIMIT)
        return connection

    monkeypatch.setattr(store, "connect", small)
    async with Door(tmp_path) as door:
        for size, status in ((LIMIT - 20_000, 202), (LIMIT + 9, 413), (2 * LIMIT, 413)):
            reply = await ask(door.source, b"12345678\n" * (size // 9))
            assert reply.status == status
            if status == 413:
                assert reply.slug == "payload-too-large"
                assert "a row of the journal" in reply.json["detail"]
        # Lengths are stored too: an array whose elements hold line ends.
        array = b"[" + b",".join([b"[\n]"] * (LIMIT // 6)) + b"]"
        assert len(array) < LIMIT
        assert (await ask(door.source, array, Content_Type="application/json")).status == 413
        assert (await door.post(b"12345678\n" * (LIMIT // 8), "k")).status == 413
        assert (await door.post(b"1", "k")).status == 202  # its key is free
        assert not door.pipelines["default"].journal.failed.done()


def test_sqlites_own_bound_is_the_one_that_the_settings_know() -> None:
    with sqlite3.connect(":memory:") as db:
        assert store.row_bytes_max(db) > STORED_BYTES_MAX + 8 * 1024**2
    db.close()


ROOM = {"queue": {"bytes_max": "4GiB"}}


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ({"http": {"request_bytes_max": "1GiB"}}, "http.request_bytes_max"),
        (
            {"http": {"decompressed_bytes_max": "1GB", "inflight_bytes_max": "4GiB"}},
            "http.decompressed_bytes_max",
        ),
        ({"record_bytes_max": "1GiB"}, "record_bytes_max"),
        ({"batch": {"bytes_max": "2GiB"}, **ROOM}, "batch.bytes_max"),
        ({"pipelines": {"x": {"batch": {"bytes_max": "2GiB"}, **ROOM}}}, "pipelines.x.batch"),
    ],
)
def test_settings_that_cannot_work_do_not_start(written: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}.*more than SQLite stores at once"):
        Settings(**written)
    Settings(**written, journal={"kind": "memory"})


def test_the_largest_settings_that_work() -> None:
    most = "900MiB"
    Settings(
        record_bytes_max=most,
        http={
            "request_bytes_max": most,
            "decompressed_bytes_max": most,
            "inflight_bytes_max": "4GiB",
        },
        batch={"bytes_max": most},
        **ROOM,
    )
