"""Records whose senders gave them ids, through a real source and journal: each is accepted once."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from ingestd.base.append import SenderIds, sender_id
from ingestd.journal.idempotency import KeyRule
from ingestd.sources.http import decode
from tests.sources.source_tools import ask
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from ingestd.sources.http.endpoints.base import Decoded


def reads_ids(patch: pytest.MonkeyPatch) -> None:
    """The records endpoint takes a record's `id` for its sender's."""
    plain = decode.DocumentCodec.decode

    def decode_ids(self: Any, body: bytes, limits: Any) -> tuple[Decoded]:
        (part,) = plain(self, body, limits)
        ids = [str(json.loads(item).get("id", "")) for item in part.parsed.records.items()]
        each = tuple(sender_id(one.encode()) if one else b"" for one in ids)
        return (part._replace(ids=SenderIds(each, frozenset(each) - {b""})),)

    patch.setattr(decode.DocumentCodec, "decode", decode_ids)


async def send(door: Door, *ids: str, **headers: str) -> Any:
    body = json.dumps([{"id": one} if one else {"n": 1} for one in ids]).encode()
    return await ask(door.source, body, Content_Type="application/json", **headers)


async def test_each_is_accepted_once_however_it_comes_again(tmp_path: Path, monkeypatch) -> None:
    reads_ids(monkeypatch)
    rule = KeyRule(ids_max=4)
    async with Door(tmp_path, keys=rule) as door:
        assert (await send(door, "a", "b")).json["accepted"] == 2
        assert (await send(door, "b", "c", "a")).json["accepted"] == 3  # to the client all are
        assert door.accepted == 3
        await send(door, "", "a")
        assert door.accepted == 4  # what has no id is never known
        assert (await send(door, "a", "b")).json == {"accepted": 2, "invalid": 0, "errors": []}
        assert door.accepted == 4
    async with Door(tmp_path, keys=rule) as door:  # another life
        await send(door, "c", "b", "d")
        assert door.accepted == 5
        await send(door, "e")
        await send(door, "c", "d")
        assert door.accepted == 6
        await send(door, "a")
        assert door.accepted == 6  # behind it came no four others
        await send(door, "f")
        await send(door, "a")  # the oldest have gone
        assert door.accepted == 8


async def test_a_second_request_with_some_of_them_comes_too_early(
    tmp_path: Path, monkeypatch
) -> None:
    reads_ids(monkeypatch)
    async with Door(tmp_path) as door:
        with door.held_commits():
            first = asyncio.ensure_future(send(door, "a", "b"))
            while not door.pipelines["default"].recent_ids._held:
                await asyncio.sleep(0.001)
            again = await send(door, "b", "c")
            assert (again.status, again.headers["retry-after"]) == (503, "1")
            assert "in progress" in again.json["detail"]
        assert (await first).status == 202
        assert (await send(door, "b", "c")).json["accepted"] == 2
        assert door.accepted == 3


async def test_long_records_stay_what_they_are(tmp_path: Path, monkeypatch) -> None:
    """The layout of records with LFs in them is kept."""
    reads_ids(monkeypatch)
    async with Door(tmp_path) as door:
        await send(door, "a")
        body = b'[{"id": "a"}, {"id":\n "b"}]'
        await ask(door.source, body, Content_Type="application/json")
        assert door.accepted == 2
