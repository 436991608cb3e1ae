"""A batch tells where its records came from, when it was accepted, and what it was split from."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base import envelope
from ingestd.base.append import Append
from ingestd.base.envelope import Envelope
from tests.pipeline import recording
from tests.pipeline.test_pipeline import HANDLER, drained, numbers, until

if TYPE_CHECKING:
    from pathlib import Path

SHOP = envelope.pack(Envelope("http", client="shop"))
TILL = envelope.pack(Envelope("http", client="till"))
KINDS = [
    pytest.param({"kind": "thread"}, "Note", id="thread"),
    pytest.param({"kind": "process"}, "Note", id="process"),
    pytest.param({"kind": "async"}, "AsyncNote", id="async"),
    pytest.param({"factory": "tests.execution.pools:processes"}, "Note", id="external"),
]
QUICK = {"attempts_max": 2, "backoff": "1ms", "backoff_max": "2ms"}


@pytest.mark.parametrize(("executor", "handler"), KINDS)
async def test_every_executor_hands_them_on(
    start, tmp_path: Path, executor: dict[str, Any], handler: str
) -> None:
    pipeline = await start(
        HANDLER + handler,
        executor={**executor, "workers": 1},
        batch={"records_max": 6, "age_max": "1h"},
        options={"folder": str(tmp_path)},
    )
    before = datetime.now(UTC)
    await pipeline.accept(Append(numbers(0, 2), envelope=SHOP))
    first = datetime.now(UTC)
    await asyncio.sleep(0.01)
    await pipeline.accept(Append(numbers(2, 3), envelope=TILL))
    await pipeline.accept(Append(numbers(5, 1)))
    await drained(pipeline)
    (call,) = recording.calls(tmp_path)
    assert call["clients"] == ["shop"] * 2 + ["till"] * 3 + [""]
    assert call["lineage"] == []
    # Its first record's time, not that of the batch.
    assert before <= datetime.fromisoformat(call["accepted_at"]) <= first


async def test_the_parts_of_a_split_batch_have_its_time_and_name_it(start, tmp_path: Path) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry=QUICK,
        batch={"records_max": 8, "age_max": "1h"},
        options={"folder": str(tmp_path), "bad": [5]},
    )
    for n in range(8):
        await pipeline.accept(Append(numbers(n, 1), envelope=TILL if n % 2 else SHOP))
    await drained(pipeline)
    calls = recording.calls(tmp_path)
    whole = calls[0]
    assert {call["accepted_at"] for call in calls} == {whole["accepted_at"]}
    records = {call["id"]: call["records"] for call in calls}
    for call in calls:
        # Halves of halves, from the whole down to this one.
        kin = [*call["lineage"], call["id"]]
        assert kin[0] == whole["id"]
        for older, younger in pairwise(kin):
            assert set(records[younger]) < set(records[older])
        assert call["clients"] == ["till" if n % 2 else "shop" for n in call["records"]]
    assert max(len(call["lineage"]) for call in calls) == 3
    alone = next(call for call in calls if call["records"] == [5])
    assert [len(records[one]) for one in alone["lineage"]] == [8, 4, 2]


async def test_they_outlive_a_restart(start, tmp_path: Path) -> None:
    """The parts of a batch that is split wait over a restart of the whole pipeline."""
    pipeline = await start(
        HANDLER + "Poison",
        retry={"attempts_max": 1, "backoff": "1ms", "backoff_max": "2ms"},
        executor={"kind": "thread", "workers": 1},
        batch={"records_max": 4, "age_max": 0},
        options={"folder": str(tmp_path), "bad": [0, 1, 2, 3]},
    )
    await pipeline.accept(Append(numbers(0, 4), envelope=SHOP))
    await until(lambda: any(call["lineage"] for call in recording.calls(tmp_path)))
    await pipeline.close()
    before = recording.calls(tmp_path)
    (tmp_path / "calls.ndjson").unlink()
    again = await start(
        HANDLER + "Note", executor={"kind": "thread"}, options={"folder": str(tmp_path)}
    )
    await drained(again)
    after = recording.calls(tmp_path)
    assert sorted(n for call in after for n in call["records"]) == [0, 1, 2, 3]
    lineages = {call["id"]: call["lineage"] for call in before}
    assert {call["accepted_at"] for call in after} == {before[0]["accepted_at"]}
    for call in after:
        assert call["lineage"][0] == before[0]["id"]
        assert call["lineage"] == lineages.get(call["id"], call["lineage"])
        assert set(call["clients"]) == {"shop"}


async def test_a_record_that_was_asked_for_again_is_not_split_from_that_batch(
    start, tmp_path: Path
) -> None:
    """The call returned and said that it is not stored: an id in the sink must not mean it is."""
    pipeline = await start(
        HANDLER + "Outcomes",
        batch={"records_max": 4, "age_max": "1h"},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 4), envelope=SHOP))
    await drained(pipeline)
    first, second = recording.calls(tmp_path)
    assert (first["records"], second["records"]) == ([0, 1, 2, 3], [1, 3])
    assert second["id"] != first["id"]
    assert second["lineage"] == []
    assert second["accepted_at"] == first["accepted_at"]
    assert second["clients"] == ["shop"] * 2


def test_a_time_has_a_zone() -> None:
    from ingestd.handlers.batch import Batch

    assert Batch.of([1]).accepted_at.utcoffset() == timedelta(0)
