"""Bounds that suit a sink apply where the settings say nothing, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from ingestd.pipeline_settings import hints_for
from ingestd.settings import Settings
from ingestd.sinks.base import BatchHints
from ingestd.sinks.sqlite import SqliteSink

MIB = 1024**2


@pytest.fixture(autouse=True)
def hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqliteSink, "BATCH", BatchHints(100_000, 64 * MIB, 60.0), raising=False)


def batch(**written: Any) -> tuple[int, int, float, int]:
    settings = Settings(**written)
    return (*settings.batch.bounds().values(), settings.queue.bytes_max)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ({"handler": {"target": "jsonl"}}, (1000, 4 * MIB, 1.0, 16 * MIB)),
        ({"handler": {"target": "app:store"}}, (1000, 4 * MIB, 1.0, 16 * MIB)),
        ({"handler": {"target": "sqlite"}}, (100_000, 64 * MIB, 60.0, 128 * MIB)),
        ({"handler": {"targets": ["jsonl", "sqlite"]}}, (100_000, 64 * MIB, 60.0, 128 * MIB)),
        (
            {"handler": {"target": "sqlite"}, "batch": {"age_max": "2s", "records_max": 5}},
            (5, 64 * MIB, 2.0, 128 * MIB),
        ),
        (
            {"handler": {"target": "sqlite"}, "batch": {"bytes_max": "1MiB"}},
            (100_000, MIB, 60.0, 16 * MIB),
        ),
        (
            {"handler": {"target": "sqlite"}, "queue": {"bytes_max": "16MiB"}},
            (100_000, 8 * MIB, 60.0, 16 * MIB),
        ),
    ],
)
def test_where_the_settings_say_nothing(written: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    assert batch(**written) == wanted


def test_each_pipeline_has_those_of_its_own_sink() -> None:
    settings = Settings(
        handler={"target": "sqlite"},
        pipelines={"clicks": {"handler": {"target": "jsonl"}}, "shop": {}},
    )
    assert settings.batch.records_max == 100_000
    assert settings.pipelines["clicks"].batch.records_max == 1000
    assert settings.pipelines["shop"].batch.records_max == 100_000


def test_several_sinks_get_the_largest() -> None:
    assert hints_for(["postgres", "sqlite"])["records_max"] == 100_000
    assert hints_for(["postgres"]) == {"records_max": 20_000, "bytes_max": 8 * MIB}
