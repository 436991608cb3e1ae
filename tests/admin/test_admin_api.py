"""The API of the admin address, over HTTP, with a pipeline behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
import structlog

from ingestd.admin import api, connection, watch
from ingestd.admin.server import AdminServer
from ingestd.admin.status import Status, status_of
from ingestd.base.append import Append
from ingestd.base.batch import (
    AGE_BOUNDS,
    BATCHES_MAX,
    ERROR_CHARS,
    RecentBatches,
    TriedBatch,
    share,
)
from ingestd.base.clock import SystemClock
from ingestd.base.metrics import Metrics
from ingestd.base.record import Records
from ingestd.config.network import split_address
from ingestd.http.credentials import hash_of
from ingestd.journal.handling import purge
from ingestd.pipeline import Pipeline
from ingestd.settings import AdminSettings, Settings
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ADMIN = "admin-token-of-the-tests-9876543210"
READER = "reader-token-of-the-tests-0123456789"
DEADLINE = 60.0
SETTINGS = AdminSettings(
    listen="127.0.0.1:0",
    tokens={"ops": {"hash": hash_of(ADMIN), "role": "admin"}, "eye": {"hash": hash_of(READER)}},
)


class Seen:
    """A daemon with one pipeline, its admin server, and a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = Settings(
            handler={
                "target": "tests.admin.poison:Store",
                "options": {"mended": str(folder / "mended")},
            },
            executor={"kind": "thread", "workers": 2},
            retry={"attempts_max": 1, "backoff": "1ms", "backoff_max": "1ms"},
            batch={"age_max": "1ms"},
        )
        self.pipelines = {
            "default": Pipeline(
                "default",
                settings.pipeline_settings()["default"],
                folder=folder,
                data_dir=folder,
                metrics=Metrics("test").pipeline("default"),
                clock=SystemClock(),
            )
        }
        self.pipelines["default"].letters.pause = 0.01
        self.server = AdminServer(SETTINGS, self, Metrics("test"))

    def alive(self) -> tuple[bool, str]:
        return True, "alive"

    def ready(self) -> tuple[bool, str]:
        return True, "ready"

    def status(self) -> Status:
        pipelines = {name: status_of(one) for name, one in self.pipelines.items()}
        return Status("running", "1", 1.0, pipelines)

    def effective_settings(self) -> list[tuple[str, object, str]]:
        return [("batch.records_max", 1000, "default"), ("http.tokens.a.token", "***", "file x")]

    @property
    def pipeline(self) -> Pipeline:
        return self.pipelines["default"]

    async def feed(self, *records: Any) -> None:
        payloads = [json.dumps(one).encode() for one in records]
        await self.pipeline.accept(Append(Records.sized(payloads)))
        await self.until(lambda: not self.pipeline.ledger.pending)

    async def until(self, true: Any) -> None:
        async with asyncio.timeout(DEADLINE):
            while not true():
                await asyncio.sleep(0.005)

    async def ask(
        self, path: str, body: Any = None, token: str = "", **headers: str
    ) -> tuple[int, Any]:
        [address] = self.server.addresses
        host, port = split_address(address)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        method = "GET" if body is None else "POST"
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method, f"http://{host}:{port}{path}", json=body, headers=headers
            ) as response,
        ):
            raw = await response.read()
            is_json = "json" in response.content_type and "ndjson" not in response.content_type
            return response.status, json.loads(raw) if is_json else raw

    async def change(self, path: str, body: Any) -> Any:
        status, answer = await self.ask(path, body, ADMIN)
        assert status == 200, answer
        return answer


@pytest.fixture
async def seen(tmp_path: Path) -> AsyncIterator[Seen]:
    made = Seen(tmp_path)
    await made.pipeline.open()
    await made.server.start()
    yield made
    await made.server.close()
    await made.pipeline.close(asyncio.get_running_loop().time() + 5)


async def test_a_poison_record_is_found_read_and_retried(seen: Seen, tmp_path: Path) -> None:
    await seen.feed({"n": 1}, {"poison": "<script>"}, {"n": 2})
    status, found = await seen.ask("/v1/dead")
    assert status == 200
    assert (found["count"], found["marked"]) == (1, 0)
    [letter] = found["letters"]
    assert letter["reason"] == "failed"
    assert "payload" not in letter
    number = letter["id"]
    _, whole = await seen.ask(f"/v1/dead/{number}")
    assert json.loads(whole["payload"]) == {"poison": "<script>"}
    assert "ValueError: cannot take <script>" in whole["traceback"]
    assert whole["payload_cut"] is False
    assert (await seen.ask(f"/v1/dead/{number + 1}"))[0] == 404
    assert (await seen.ask("/v1/dead/x"))[0] == 404
    (tmp_path / "mended").touch()
    answer = await seen.change("/v1/dead/retry", {"ids": [number]})
    assert answer == {"marked": 1, "before": 0, "incomplete": 0, "invalid": 0}
    await seen.until(lambda: seen.pipeline.ledger.processed == 3)
    assert (await seen.ask("/v1/dead"))[1]["letters"] == []


async def test_letters_come_newest_first_and_by_filter(seen: Seen) -> None:
    await seen.feed(*({"refused": f"{'even' if n % 2 == 0 else 'odd'} {n}"} for n in range(6)))
    _, page = await seen.ask("/v1/dead?limit=4")
    assert [one["id"] for one in page["letters"]] == [6, 5, 4, 3]
    assert page["count"] == 6
    _, rest = await seen.ask("/v1/dead?limit=4&before=3&pipeline=default")
    assert [one["id"] for one in rest["letters"]] == [2, 1]
    _, even = await seen.ask("/v1/dead?error=even&reason=rejected&since=2020-01-01T00:00:00Z")
    assert len(even["letters"]) == even["count"] == 3
    _, errors = await seen.ask("/v1/dead/summary")
    assert sum(one["letters"] for one in errors["errors"]) == 6
    _, lines = await seen.ask("/v1/dead/export?id=2&id=3")
    letters = [json.loads(line) for line in lines.splitlines()]
    assert [one["id"] for one in letters] == [2, 3]
    assert all("payload" in one for one in letters)
    for wrong in ("reason=x", "limit=x", "since=yesterday", "what=1", "id=-1"):
        assert (await seen.ask(f"/v1/dead?{wrong}"))[0] == 400
    assert (await seen.ask("/v1/dead?pipeline=none"))[0] == 404
    assert (await seen.change("/v1/dead/purge", {"error": "even"})) == {"purged": 3, "marked": 0}
    assert (await seen.change("/v1/dead/purge", {"all": True})) == {"purged": 3, "marked": 0}


async def test_changes_are_asked_for_in_full(seen: Seen) -> None:
    await seen.feed({"refused": 1})
    for body in ({}, {"reason": ["failed"]}, [], {"since": "soon"}, {"ids": "1"}):
        assert (await seen.ask("/v1/dead/purge", body, ADMIN))[0] == 400
    assert (await seen.ask("/v1/dead/purge", {"all": True}))[0] == 401
    assert (await seen.ask("/v1/dead/purge", {"all": True}, READER))[0] == 403
    foreign = {"Origin": "http://evil.example"}
    assert (await seen.ask("/v1/dead/purge", {"all": True}, ADMIN, **foreign))[0] == 403
    assert (await seen.ask("/v1/dead/purge", {"all": True}, ADMIN, Host="evil.example"))[0] == 421
    assert (await seen.ask("/v1/dead/purge"))[0] == 405
    for body in ({"limit": 0}, {"limit": -1}, {"limit": -1, "reasons": ["rejected"]}):
        assert (await seen.ask("/v1/dead/purge", body, ADMIN))[0] == 400
    # A parameter that is passed over would widen the choice.
    for path in ("/v1/dead/purge?pipeline=other", "/v1/dead/retry?limit=1"):
        assert (await seen.ask(path, {"all": True}, ADMIN))[0] == 400
    for action in ("pause", "resume"):
        path = f"/v1/pipelines/default/{action}?for=1h"
        assert (await seen.ask(path, {}, ADMIN))[0] == 400
    assert not seen.status().pipelines["default"].paused
    assert (await seen.ask("/v1/dead"))[1]["count"] == 1


async def test_pages_go_on_within_one_pipeline(seen: Seen) -> None:
    await seen.feed(*({"refused": n} for n in range(3)))
    assert (await seen.ask("/v1/dead?before=0"))[1]["letters"] == []
    seen.pipelines["other"] = seen.pipeline
    # Numbers count within a pipeline: those of the second one from 2 on would be in no page.
    status, answer = await seen.ask("/v1/dead?limit=2&before=2")
    assert (status, answer["detail"]) == (400, "before needs the pipeline whose numbers it means")
    assert (await seen.ask("/v1/dead?limit=2&before=2&pipeline=other"))[0] == 200
    assert (await seen.ask("/v1/dead"))[0] == 200
    del seen.pipelines["other"]


async def test_an_export_goes_on_while_many_requests_wait(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PIECE_BYTES", 1)
    monkeypatch.setattr(api, "CALLS_MAX", 1)
    monkeypatch.setattr(api, "summed_up", lambda _: time.sleep(0.01) or [])
    await seen.feed(*({"refused": n} for n in range(50)))
    export = asyncio.ensure_future(seen.ask("/v1/dead/export"))
    while not export.done():
        await asyncio.gather(*(seen.ask("/v1/dead/summary") for _ in range(4)))
    assert len((await export)[1].splitlines()) == 50


async def test_a_change_whose_client_has_gone_is_logged(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def slow_purge(*arguments: Any) -> int:
        began.set()
        may_end.wait(DEADLINE)
        return purge(*arguments)

    monkeypatch.setattr(api, "purge", slow_purge)
    await seen.feed({"refused": 1})
    [address] = seen.server.addresses
    _, writer = await asyncio.open_connection(*split_address(address))
    writer.write(
        b"POST /v1/dead/purge HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: 12\r\n\r\n"
        % ADMIN.encode()
        + b'{"all":true}'
    )
    assert await asyncio.to_thread(began.wait, DEADLINE)
    reset = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    writer.transport.abort()
    await seen.until(lambda: not seen.server._protocol._inside)
    with structlog.testing.capture_logs() as logged:
        may_end.set()
        await seen.until(lambda: logged)
    assert logged == [
        {"event": "dead_letters_purged", "letters": 1, "by": "ops", "log_level": "info"}
    ]


async def test_payloads_are_hidden_from_what_came_through_a_proxy(seen: Seen) -> None:
    await seen.feed({"refused": "secret"})
    proxied = {"X-Forwarded-For": "192.0.2.7"}
    assert (await seen.ask("/v1/dead/1", **proxied))[0] == 401
    status, letter = await seen.ask("/v1/dead/1", token=READER, **proxied)
    assert (status, letter["payload_hidden"]) == (200, True)
    assert "payload" not in letter
    assert (await seen.ask("/v1/dead/export", token=ADMIN, **proxied))[0] == 403


async def test_a_large_payload_is_shown_in_part_and_exported_whole(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PAYLOAD_BYTES", 100)
    monkeypatch.setattr(connection, "PIECE_BYTES", 50)
    await seen.feed({"refused": "ä" * 500}, {"refused": "b"})
    _, letter = await seen.ask("/v1/dead/1")
    assert letter["payload_cut"] is True
    assert 90 < len(letter["payload"]) <= 100
    _, lines = await seen.ask("/v1/dead/export")
    assert [json.loads(json.loads(line)["payload"])["refused"] for line in lines.splitlines()] == [
        "ä" * 500,
        "b",
    ]


async def test_workers_batches_history_and_settings(seen: Seen) -> None:
    await seen.feed({"n": 1})
    await seen.feed({"refused": 1})
    _, found = await seen.ask("/v1/workers")
    default = found["pipelines"]["default"]
    assert default["executor"] == "thread"
    assert [one["batch"] for one in default["workers"]] == ["", ""]
    _, batches = await seen.ask("/v1/batches?limit=1")
    [newest] = batches["pipelines"]["default"]
    assert (newest["outcome"], newest["records"], newest["error"]) == (
        "failed", 1, "ValueError: cannot take 1",
    )  # fmt: skip
    _, settings = await seen.ask("/v1/settings")
    assert settings["settings"][1] == {
        "key": "http.tokens.a.token", "value": "***", "origin": "file x",
    }  # fmt: skip
    seen.server._history().sample()
    _, history = await seen.ask("/v1/history?pipeline=default")
    [sample] = history["pipelines"]["default"]
    named = dict(zip(history["fields"], sample, strict=True))
    assert (named["accepted"], named["processed"], named["dead"]) == (2, 1, 1)
    assert named["age_50"] > 0


async def test_a_pipeline_is_paused_and_resumed(seen: Seen) -> None:
    assert (await seen.ask("/v1/pipelines/default/pause", {}))[0] == 401
    assert (await seen.change("/v1/pipelines/default/pause", {}))["paused"] is True
    assert seen.status().pipelines["default"].paused
    assert (await seen.change("/v1/pipelines/default/resume", {}))["paused"] is False
    assert not seen.status().pipelines["default"].paused
    assert (await seen.ask("/v1/pipelines/none/pause", {}, ADMIN))[0] == 404


async def test_a_change_that_the_disk_refuses_says_why(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "paused").mkdir()
    with structlog.testing.capture_logs() as logged:
        status, answer = await seen.ask("/v1/pipelines/default/resume", {}, ADMIN)
    assert status == 500
    assert f"{tmp_path}: paused can't be changed: " in answer["detail"]
    [line] = [one for one in logged if one["event"] == "admin_page_failed"]
    assert line == {
        "event": "admin_page_failed", "log_level": "error", "error": answer["detail"],
        "page": "/v1/pipelines/default/resume",
    }  # fmt: skip


async def test_the_description_has_every_page(seen: Seen) -> None:
    status, document = await seen.ask("/openapi.json")
    assert status == 200
    served = {path.replace("*", "{}") for path in seen.server._pages}
    described = {
        path.replace("{id}", "{}").replace("{pipeline}", "{}") for path in document["paths"]
    }
    assert described == {path for path in served if not path.startswith(("/console", "//"))} - {"/"}
    names = set(re.findall(r"#/components/schemas/([^\"]+)", json.dumps(document)))
    assert names <= set(document["components"]["schemas"])


@pytest.mark.slow
def test_the_description_is_true(tmp_path: Path) -> None:
    token = ("--admin.tokens.ops.token", ADMIN, "--admin.tokens.ops.role", "admin")
    with daemon(*token, "--executor.kind", "thread", cwd=tmp_path) as one:
        _, _, document = one.request("GET", "/openapi.json", admin=True)
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        run = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", "openapi.json",
                "--url", f"http://127.0.0.1:{one.admin_port}", "--checks", "all",
                "--seed", "20260101", "--max-examples", "2", "--phases", "fuzzing",
                "--continue-on-failure", "--generation-database", "none", "--no-color",
                # Streams have no end; some need no token; a filter may be one that is refused.
                "--exclude-path-regex", "^/v1/(watch|tap)$",
                "--header", f"Authorization: Bearer {ADMIN}",
                "--exclude-checks", "positive_data_acceptance,ignored_auth",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-5000:]
        assert f"{len(document['paths']) - 2} passed" in run.stdout
        assert not [line for line in one.events if line["event"] == "admin_page_failed"]


# Watching


async def events(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """The events of a stream in chunks."""
    kind = ""
    while line := await asyncio.wait_for(reader.readline(), DEADLINE):
        if line.startswith(b"event: "):
            kind = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            yield kind, json.loads(line[6:])


async def watcher(seen: Seen) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    [address] = seen.server.addresses
    reader, writer = await asyncio.open_connection(*split_address(address), limit=1 << 24)
    writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return reader, writer


async def test_what_happens_is_watched(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.01)
    await seen.feed({"n": 1})
    reader, writer = await watcher(seen)
    got = events(reader)
    first = [await anext(got) for _ in range(3)]
    assert [kind for kind, _ in first] == ["history", "status", "batches"]
    assert first[1][1]["pipelines"]["default"]["accepted"] == 1
    assert [one["number"] for one in first[2][1]["pipelines"]["default"]] == [1]
    await seen.feed({"n": 2})
    seen.server._history().sample()
    wanted = {"status", "batches", "sample"}
    async for kind, data in got:
        if kind == "batches":
            assert [one["number"] for one in data["pipelines"]["default"]] == [2]
        if kind == "status" and data["pipelines"]["default"]["processed"] != 2:
            continue
        wanted.discard(kind)
        if not wanted:
            break
    writer.close()
    await seen.until(lambda: seen.server._api._watchers._ticking is None)


async def test_watchers_are_few_and_one_that_never_reads_is_dropped(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(watch, "WATCHERS_MAX", 3)
    monkeypatch.setattr(connection, "STALL_SECONDS", 1.0)
    status = seen.status
    pad = "x" * 100_000
    seen.status = lambda: msgspec.structs.replace(status(), version=pad)
    readers = [await watcher(seen) for _ in range(3)]
    for reader, _ in readers:
        await asyncio.wait_for(reader.readline(), DEADLINE)

    async def drain(reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 20):
                pass

    reading = [asyncio.ensure_future(drain(reader)) for reader, _ in readers[1:]]
    assert (await seen.ask("/v1/watch"))[0] == 503
    assert (await seen.ask("/livez"))[0] == 200
    readers[0][1].transport.pause_reading()  # type: ignore[attr-defined]
    await seen.until(lambda: seen.server._api._watchers._readers == 2)
    assert not any(one.done() for one in reading)
    for _, writer in readers:
        writer.transport.abort()
    await asyncio.gather(*reading)


async def test_a_reader_that_takes_nothing_holds_the_tries_of_one_pipeline(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    send = connection.Outlet.send

    async def spy(outlet: connection.Outlet, data: bytes) -> None:
        sent.append(data)
        await send(outlet, data)

    monkeypatch.setattr(connection.Outlet, "send", spy)
    await seen.feed({"refused": "x" * 4000})
    [tried] = seen.pipeline.settlements.recent.batches
    assert len(tried.error) == ERROR_CHARS
    for number in range(2, BATCHES_MAX + 1):
        seen.pipeline.settlements.recent.add(tried._replace(id=f"b-{number}"))
    for number in range(20):
        seen.pipelines[f"other{number}"] = seen.pipeline
    reader, writer = await watcher(seen)
    got = events(reader)
    shown: set[str] = set()
    async for kind, data in got:
        shown |= data["pipelines"].keys() if kind == "batches" else set()
        if len(shown) == 21:
            break
    writer.close()
    assert max(map(len, sent)) < 2 * BATCHES_MAX * ERROR_CHARS
    for number in range(20):
        del seen.pipelines[f"other{number}"]


async def test_close_ends_those_that_watch(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 10 * DEADLINE)
    reader, writer = await watcher(seen)
    await asyncio.wait_for(reader.readline(), DEADLINE)
    await asyncio.wait_for(seen.server.close(), DEADLINE)
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), DEADLINE)
    writer.close()


@pytest.mark.slow
def test_fifty_watchers_cost_no_memory_and_no_record(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("def store(batch: list[dict]) -> None: ...\n")

    def resident() -> int:
        lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    with daemon("app:store", "--executor.kind", "thread", cwd=tmp_path) as one:
        one.post(b'{"n": 1}\n' * 1000, Content_Type="application/x-ndjson")
        before = resident()
        readers = []
        for _ in range(watch.WATCHERS_MAX):
            reader = socket.create_connection(("127.0.0.1", one.admin_port), timeout=DEADLINE)
            reader.sendall(b"GET /v1/watch HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert reader.recv(1 << 16).startswith(b"HTTP/1.1 200")
            readers.append(reader)
        assert one.request("GET", "/v1/watch", admin=True)[0] == 503
        for _ in range(30):  # none of them reads on
            assert one.post(b'{"n": 1}\n' * 1000, Content_Type="application/x-ndjson")[0] == 202
            assert one.request("GET", "/livez", admin=True)[0] == 200
        assert one.until_settled()["processed"] == 31_000
        assert resident() - before < 32 << 10
        for reader in readers:
            reader.close()
        deadline = time.monotonic() + DEADLINE
        while one.request("HEAD", "/v1/watch", admin=True)[0] == 503:
            assert time.monotonic() < deadline


def test_the_ring_is_bounded_and_tells_what_is_new() -> None:
    recent = RecentBatches()
    for n in range(BATCHES_MAX + 10):
        recent.add(TriedBatch(f"b-{n}", 1, 1, 1, 0.1, "done", 0.5, 1.0))
    assert len(recent.batches) == BATCHES_MAX
    assert [one.id for one in recent.since(recent.tried - 2)] == [
        f"b-{BATCHES_MAX + 8}", f"b-{BATCHES_MAX + 9}",
    ]  # fmt: skip
    assert len(recent.since(0)) == BATCHES_MAX
    assert recent.since(recent.tried) == []
    half = share(recent.ages, 0.5)
    assert half is not None
    assert 0.5 <= half <= 0.5 * 1.42
    assert share([0] * (len(AGE_BOUNDS) + 1), 0.5) is None


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watch, "SAMPLES_MAX", 3)

    class Still:
        """A daemon in which nothing happens."""

        def __init__(self) -> None:
            settlements = type("S", (), {"recent": RecentBatches()})
            self.pipelines: Any = {"default": type("P", (), {"settlements": settlements})}

        def status(self) -> Any:
            one = {
                "accepted": 1, "processed": 1, "dead_ever": 0, "pending": 0,
                "oldest_pending_seconds": 0.0,
            }  # fmt: skip
            return type("T", (), {"pipelines": {"default": type("U", (), one)}})

    history = watch.History(Still())  # type: ignore[arg-type]
    for _ in range(10):
        history.sample()
    assert len(history.of()["pipelines"]["default"]) == 3
    assert history.newest()["pipelines"]["default"][-1] == -1
