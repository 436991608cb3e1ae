"""Downloads from nginx: what another server makes of our ranges, conditions and compression."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
import structlog

from ingestd.base.errors import InputIncomplete
from tests.fetch.nginx import Nginx, needs_nginx, serving_files
from tests.fetch.tools import Intake, fetch, fetching, lines, packed
from tests.sources.source_tools import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [needs_nginx, pytest.mark.slow]

BODY = lines(0, 6000)
ITEMS = BODY.splitlines()
PATIENT = {"attempts_max": 1000}


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    with serving_files(tmp_path / "nginx", rate="40k") as started:
        (started.www / "x.ndjson").write_bytes(BODY)
        (started.www / "x.ndjson.gz").write_bytes(packed(BODY, "gzip", parts=20))
        yield started


async def test_nginx_is_killed_in_the_middle_and_the_rest_comes_as_a_range(nginx: Nginx) -> None:
    intake = Intake()
    async with fetching(intake, nginx.url + "/slow/x.ndjson", **PATIENT) as source:
        await until(lambda: len(intake.items) > 500)
        nginx.kill()
        await asyncio.sleep(0.05)
        begun = len(intake.items)
        assert begun < 6000
        nginx.rate = "0"
        nginx.start()
        async with asyncio.timeout(60):
            await source.wait_finished()
    assert intake.items == ITEMS
    await until(lambda: nginx.asked)
    status, _, asked_range, if_range, _ = nginx.asked[-1]
    assert status == "206"
    assert if_range not in {"-", ""}
    start = int(asked_range.removeprefix("bytes=").removesuffix("-"))
    assert BODY[start - 1 : start] == b"\n"
    assert BODY[:start].count(b"\n") >= begun


async def test_the_same_with_a_compressed_file_passes_over_what_was_accepted(nginx: Nginx) -> None:
    nginx.kill()
    nginx.rate = "20k"
    nginx.start()
    intake = Intake()
    async with fetching(intake, nginx.url + "/slow/x.ndjson.gz", **PATIENT) as source:
        await until(lambda: len(intake.items) > 500)
        nginx.kill()
        nginx.rate = "0"
        nginx.start()
        async with asyncio.timeout(60):
            await source.wait_finished()
    assert intake.items == ITEMS
    await until(lambda: nginx.asked)
    assert nginx.asked[-1][:3] == ["200", "/slow/x.ndjson.gz", "-"]


async def test_the_file_is_replaced_in_the_middle(nginx: Nginx) -> None:
    intake = Intake()
    new = lines(10_000, 16_000)
    with structlog.testing.capture_logs() as logs:
        async with fetching(intake, nginx.url + "/slow/x.ndjson", **PATIENT) as source:
            await until(lambda: len(intake.items) > 500)
            nginx.kill()
            (nginx.www / "x.ndjson").write_bytes(new)
            os.utime(nginx.www / "x.ndjson", (1, 1))
            nginx.rate = "0"
            nginx.start()
            async with asyncio.timeout(60):
                await source.wait_finished()
    old = len(intake.items) - 6000
    assert 500 < old < 6000
    assert intake.items == ITEMS[:old] + new.splitlines()
    assert [line for line in logs if line["event"] == "resource_changed"]
    await until(lambda: nginx.asked)
    assert nginx.asked[-1][0] == "200"
    assert nginx.asked[-1][2].startswith("bytes=")


@pytest.mark.parametrize("path", ["/x.ndjson", "/packed/x.ndjson", "/x.ndjson.gz"])
async def test_done_is_asked_for_again_only_with_a_condition(nginx: Nginx, path: str) -> None:
    intake = Intake()
    await fetch(intake, nginx.url + path)
    await fetch(intake, nginx.url + path)
    assert intake.items == ITEMS
    file = nginx.www / path.rpartition("/")[2]
    body = lines(7000, 7010)
    file.write_bytes(packed(body, "gzip") if path.endswith(".gz") else body)
    os.utime(file, (1, 1))
    await fetch(intake, nginx.url + path)
    assert intake.items == ITEMS + body.splitlines()
    await until(lambda: len(nginx.asked) == 3)
    assert [one[0] for one in nginx.asked] == ["200", "304", "200"]
    assert nginx.asked[0][4] == ("gzip" if "packed" in path else "-")


async def test_redirects(nginx: Nginx) -> None:
    (nginx.www / "x.ndjson").rename(nginx.www / "new.ndjson")
    intake = Intake()
    async with fetching(intake, nginx.url + "/old.ndjson", nginx.url + "/loop") as source:
        with pytest.raises(InputIncomplete):
            await source.wait_finished()
        assert [one.reason for one in source._downloads] == ["", "more than 10 redirects"]
    assert intake.items == ITEMS


async def test_the_order_and_the_number_are_right_with_many_files(nginx: Nginx) -> None:
    for n in range(20):
        (nginx.www / f"{n}.ndjson").write_bytes(lines(n * 100, n * 100 + 100))
    intake = Intake()
    await fetch(intake, *(f"{nginx.url}/{n}.ndjson" for n in range(20)))
    assert sorted(intake.items) == sorted(lines(0, 2000).splitlines())
    assert len(intake.offsets) == 20
