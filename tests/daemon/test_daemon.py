"""The life of a real daemon process: start, take, drain, leave."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ingestd.journal.dead_letters import LetterFilter
from ingestd.journal.sqlite import dead_letters
from ingestd.prove.servers import free_port
from tests.daemon.harness import ROOT, Daemon, daemon, written
from tests.real_input import real_input

NOTE = "tests.pipeline.recording:Note"
GATE = "tests.pipeline.recording:Gate"


def calls(folder: Path) -> list[dict[str, Any]]:
    path = folder / "calls.ndjson"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def seen(folder: Path) -> Counter[Any]:
    return Counter(
        json.dumps(record, sort_keys=True) for call in calls(folder) for record in call["records"]
    )


def into(folder: Path, handler: str = NOTE, **more: str) -> list[str]:
    return [handler, "--handler.options.folder", str(folder)] + [
        part for key, value in more.items() for part in (f"--{key.replace('__', '.')}", value)
    ]


def test_a_post_arrives_in_the_jsonl_sink(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as one:
        assert one.post(b'{"a":1}\n{"a":2}\n') == (
            202,
            {"accepted": 2, "invalid": 0, "errors": []},
        )
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
        report = one.event("drained")
    assert written(tmp_path) == [b'{"a":1}', b'{"a":2}']
    assert {k: report[k] for k in ("accepted", "processed", "dead", "pending", "balanced")} == {
        "accepted": 2,
        "processed": 2,
        "dead": 0,
        "pending": 0,
        "balanced": True,
    }
    assert not one.other


@pytest.mark.slow
def test_the_data_directory_is_private(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as one:
        one.post(b"{}")
        one.until_settled()
        folder = tmp_path / "ingestd-data"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "lock").stat().st_mode & 0o777 == 0o600
        for path in (folder / "out").iterdir():
            assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_every_record_once_over_a_sigterm_in_the_middle(tmp_path: Path, kind: str) -> None:
    """32 clients post; SIGTERM comes in the middle; what got a 202 arrives exactly once."""
    arguments = into(tmp_path, executor__kind=kind, executor__workers="2", batch__records_max="50")
    accepted: list[int] = []
    posted = threading.Event()

    def client(one: Daemon, number: int) -> None:
        for n in range(400):
            ids = [number * 1_000_000 + n * 10 + k for k in range(10)]
            try:
                status, _ = one.post(b"".join(b"%d\n" % i for i in ids))
            except OSError:
                return
            if status != 202:
                assert status == 503
                return
            accepted.extend(ids)
            if len(accepted) > 3000:
                posted.set()

    with daemon(*arguments, cwd=tmp_path) as one:
        with ThreadPoolExecutor(32) as clients:
            work = [clients.submit(client, one, number) for number in range(32)]
            assert posted.wait(60)
            one.terminate()
            for done in work:
                done.result(90)
        assert one.wait() == 0
        first = one.event("drained")
    assert first["accepted"] == len(accepted)
    assert first["balanced"]

    with daemon(*arguments, cwd=tmp_path) as two:
        status, _ = two.post(b"-1\n")
        assert status == 202
        two.until_settled()
        two.terminate()
        assert two.wait() == 0
        second = two.event("drained")
    assert seen(tmp_path) == Counter(map(str, [*accepted, -1]))
    assert (second["accepted"], second["processed"]) == (len(accepted) + 1,) * 2


def test_a_sigkill_loses_nothing_and_keeps_batch_ids(tmp_path: Path) -> None:
    arguments = into(tmp_path, GATE, batch__records_max="5", executor__workers="1")
    with daemon(*arguments, cwd=tmp_path) as one:
        for n in range(10):
            assert one.post(b"%d" % n)[0] == 202
        deadline = time.monotonic() + 60
        while not calls(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        one.terminate(signal.SIGKILL)
        one.wait()
    (before,) = calls(tmp_path)
    (tmp_path / "open").touch()
    with daemon(*arguments, cwd=tmp_path) as two:
        two.until_settled()
        two.terminate()
        assert two.wait() == 0
        assert two.event("drained")["balanced"]
    after = calls(tmp_path)[1:]
    assert sorted(r for call in after for r in call["records"]) == list(range(10))
    assert {c["id"]: c["records"] for c in after}[before["id"]] == before["records"]


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_keeps_everything(tmp_path: Path) -> None:
    with daemon(*into(tmp_path, GATE, drain__timeout="10m"), cwd=tmp_path) as one:
        assert one.post(b"1\n2\n3\n")[0] == 202
        one.terminate()
        one.event("drain_started")
        one.terminate()
        assert one.wait() == 0  # the gate would hold it for 5 min
        report = one.event("drained_partly")
        assert (report["pending"], report["balanced"]) == (3, True)
    (tmp_path / "open").touch()
    with daemon(*into(tmp_path, GATE), cwd=tmp_path) as two:
        two.until_settled()
    assert set(seen(tmp_path)) == {"1", "2", "3"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_drain_that_runs_out_of_time_leaves_the_rest_in_the_journal(
    tmp_path: Path, kind: str
) -> None:
    arguments = into(tmp_path, GATE, drain__timeout="300ms", executor__kind=kind)
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.post(b"1\n2\n3\n")[0] == 202
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained_partly")["pending"] == 3


def test_a_memory_journal_says_that_it_loses(tmp_path: Path) -> None:
    arguments = into(tmp_path, GATE, drain__timeout="100ms", journal__kind="memory")
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.post(b"1\n2\n3\n")[0] == 202
        one.terminate()
        assert one.wait() == 75


@pytest.mark.slow
def test_during_the_delay_it_serves_but_is_not_ready(tmp_path: Path) -> None:
    arguments = into(tmp_path, drain__delay="60s")
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.request("GET", "/readyz", admin=True)[0] == 200
        one.terminate()
        one.event("drain_started")
        status, _, body = one.request("GET", "/readyz", admin=True)
        assert (status, "draining" in str(body)) == (503, True)
        assert one.request("GET", "/livez", admin=True)[0] == 200
        assert one.post(b"1")[0] == 202
        one.terminate()
        assert one.wait() == 0, (one.events, one.other)


@pytest.mark.slow
def test_several_pipelines_have_their_own_everything(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text(
        """
        [pipelines.clicks.batch]
        records_max = 2
        [pipelines.logs]
        format = "text"
        """
    )
    with daemon(cwd=tmp_path) as one:
        assert one.event("daemon_started")["config"] == str(tmp_path / "ingestd.toml")
        assert one.post(b"1\n2\n3\n", "/v1/records/clicks")[0] == 202
        assert one.post(b"a line\n", "/v1/records/logs", Content_Type="text/plain")[0] == 202
        assert one.post(b"{}")[0] == 202
        assert one.post(b"{}", "/v1/records/nobody")[0] == 404
        for name in ("default", "clicks", "logs"):
            one.until_settled(name)
        pipelines = one.status()["pipelines"]
        one.terminate()
        assert one.wait() == 0
    assert {n: p["accepted"] for n, p in pipelines.items()} == {
        "default": 1,
        "clicks": 3,
        "logs": 1,
    }
    out = tmp_path / "ingestd-data" / "out"
    assert [p.read_text() for p in out.glob("*.jsonl")] == ["{}\n"]
    assert [p.read_text() for p in out.glob("clicks/*.jsonl")] == ["1\n2\n3\n"]
    assert [p.read_text() for p in out.glob("logs/*.jsonl")] == ['"a line"\n']
    assert len(list((tmp_path / "ingestd-data").rglob("journal.db"))) == 3


def test_malformed_lines_are_dead_letters_and_listed(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as one:
        status, body = one.post(b'{"a":1}\n{"a":\n{"a":3}\nnull null\n')
        assert status == 202
        assert (body["accepted"], body["invalid"]) == (2, 2)
        assert [(e["index"], e["reason"]) for e in body["errors"]] == [
            (1, "malformed"),
            (3, "malformed"),
        ]
        assert one.post(b'{"a":\n')[0] == 400
        now = one.until_settled()
        assert (now["accepted"], now["invalid"]) == (2, 2)
        one.terminate()
        assert one.wait() == 0
    with sqlite3.connect(tmp_path / "ingestd-data" / "journal.db") as db:
        kept = [one.letter for one in dead_letters.letters(db, LetterFilter(), whole=True)]
    db.close()
    assert [(letter.reason, letter.payload) for letter in kept] == [
        ("malformed", b'{"a":'),
        ("malformed", b"null null"),
    ]


def test_metrics_and_status_agree(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as one:
        one.post(b"1\n2\n3\n")
        one.until_settled()
        status, _, page = one.request("GET", "/metrics", admin=True)
        assert status == 200
        lines = page.decode().splitlines()
        assert 'ingestd_records_accepted_total{pipeline="default"} 3.0' in lines
        assert 'ingestd_records_processed_total{pipeline="default"} 3.0' in lines
        assert 'ingestd_records_pending{pipeline="default"} 0.0' in lines
        counted = [line for line in lines if line.startswith("ingestd_http_requests_total")]
        assert 'ingestd_http_requests_total{code="2xx",route="/v1/records"} 1.0' in counted
        assert any(
            line.startswith("ingestd_journal_commit_duration_seconds_count") for line in lines
        )


def test_logs_are_json_lines_without_payloads(tmp_path: Path) -> None:
    fails = into(
        tmp_path, "tests.pipeline.recording:Fails", log__level="debug", retry__backoff="1ms"
    )
    with daemon(*fails, cwd=tmp_path) as one:
        one.post(b'"a-secret-payload"')
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
        failed = one.event("batch_failed")
    assert failed["error"] == "RuntimeError: attempt 1 fails"
    assert "recording.py" in failed["exception"]
    assert failed["batch_id"].endswith("-1")
    assert "a-secret-payload" not in json.dumps(one.events)
    assert one.other == []


@pytest.mark.slow
def test_a_stalled_log_reader_does_not_stall_ingestion(tmp_path: Path) -> None:
    """Nobody reads stderr, and every batch logs: requests are answered all the same."""
    read, write = os.pipe()
    admin, door = free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "ingestd", "run", *into(tmp_path, "tests.pipeline.recording:Fails"),
         "--listen", f"127.0.0.1:{door}", "--admin.listen", f"127.0.0.1:{admin}",
         "--batch.records_max", "1", "--retry.backoff", "1ms", "--retry.backoff_max", "1ms",
         "--executor.workers", "2"],
        cwd=tmp_path, stderr=write, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(write)
    try:
        _until_connects(door)
        one = _Address(door, admin)
        for n in range(30):
            assert one.post(b"".join(b"%d\n" % i for i in range(n * 20, n * 20 + 20)))[0] == 202
        assert one.until_settled()["processed"] == 600
        process.terminate()
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()
        os.close(read)


class _Address(Daemon):
    """A daemon that somebody else started."""

    def __init__(self, port: int, admin: int) -> None:
        self._ports = (port, admin)

    port = property(lambda self: self._ports[0])
    admin_port = property(lambda self: self._ports[1])


def _until_connects(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError("nothing listens")


@pytest.mark.slow
def test_a_killed_daemon_leaves_no_worker_behind(tmp_path: Path) -> None:
    arguments = into(tmp_path, GATE, executor__kind="process", executor__workers="2",
                     batch__records_max="1")  # fmt: skip
    with daemon(*arguments, cwd=tmp_path) as one:
        one.post(b"1\n2\n")
        deadline = time.monotonic() + 60
        while len(calls(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = {call["pid"] for call in calls(tmp_path)}
        assert len(workers) == 2
        port = one.port
        one.terminate(signal.SIGKILL)
        one.wait()
        deadline = time.monotonic() + 60
        while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not [pid for pid in workers if _alive(pid)]
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_ctrl_c_reaches_the_group_and_the_workers_finish(tmp_path: Path) -> None:
    arguments = into(tmp_path, executor__kind="process", executor__workers="2")
    with daemon(*arguments, cwd=tmp_path, prefix=("setsid", "-w")) as one:
        assert one.post(b"1\n2\n3\n")[0] == 202
        group = os.getpgid(one.event("daemon_started")["pid"])
        os.killpg(group, signal.SIGINT)
        assert one.wait() == 0
        assert one.event("drained")["processed"] == 3
    assert set(seen(tmp_path)) == {"1", "2", "3"}


REAL = [
    pytest.param("nginxplus.ndjson", "json", "application/x-ndjson", id="nginx"),
    pytest.param("apache.log", "text", "text/plain", id="apache"),
]


def _expected(name: str, form: str) -> Counter[str]:
    lines = real_input(name).read_bytes().splitlines()
    values = [json.loads(line) if form == "json" else line.decode() for line in lines]
    return Counter(json.dumps(value, sort_keys=True) for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize(("name", "form", "content_type"), REAL)
def test_real_input_over_http_into_a_handler(tmp_path, name, form, content_type, kind) -> None:
    """One record a request and many, plain and gzip, from 32 clients at once."""
    lines = real_input(name).read_bytes().splitlines(keepends=True)
    singles, rest = lines[:200], lines[200:]
    bodies = [(line, {}) for line in singles]
    for start in range(0, len(rest), 50):
        body = b"".join(rest[start : start + 50])
        packed = gzip.compress(body, 1)
        odd = start // 50 % 2
        bodies.append((packed, {"Content_Encoding": "gzip"}) if odd else (body, {}))
    with daemon(*into(tmp_path, executor__kind=kind), "--format", form, cwd=tmp_path) as one:
        with ThreadPoolExecutor(32) as clients:
            answers = clients.map(
                lambda item: one.post(item[0], Content_Type=content_type, **item[1]), bodies
            )
            assert {status for status, _ in answers} == {202}
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    assert seen(tmp_path) == _expected(name, form)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "content_type"), REAL)
def test_real_input_over_http_into_jsonl(tmp_path, name, form, content_type) -> None:
    raw = real_input(name).read_bytes()
    with daemon("--format", form, cwd=tmp_path) as one:
        assert one.post(raw, Content_Type=content_type)[0] == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    lines = written(tmp_path)
    if form == "json":
        assert sorted(lines) == sorted(raw.splitlines())  # byte for byte
    assert Counter(json.dumps(json.loads(line), sort_keys=True) for line in lines) == _expected(
        name, form
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize("way", ["redirected", "piped", "fifo"])
@pytest.mark.parametrize(("name", "form", "content_type"), REAL)
def test_real_input_over_stdin(tmp_path, name, form, content_type, way, kind) -> None:
    path = real_input(name)
    arguments = [*into(tmp_path, executor__kind=kind), "--source", "stdin", "--format", form]
    feeder = None
    if way == "redirected":
        stdin: Any = path.open("rb")
    elif way == "piped":
        feeder = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
        stdin = feeder.stdout
    else:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        feeder = subprocess.Popen(["sh", "-c", f"cat {path} > {fifo}"])
        stdin = fifo.open("rb")
    try:
        with Daemon(*arguments, cwd=tmp_path, stdin=stdin) as one:
            assert one.wait() == 0
            assert one.event("drained")["processed"] == sum(_expected(name, form).values())
    finally:
        stdin.close()
        if feeder is not None:
            feeder.wait(60)
    assert seen(tmp_path) == _expected(name, form)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_made_input_over_http_and_stdin(tmp_path: Path, kind: str) -> None:
    """What the tests of real input show, on records that are made here."""
    made = [json.dumps({"n": n, "text": "ü\u2028" * (n % 7)}) for n in range(3000)]
    expected = Counter(json.dumps(json.loads(line), sort_keys=True) for line in made)
    body = "\n".join(made[:1500]).encode()
    with daemon(*into(tmp_path, executor__kind=kind), cwd=tmp_path) as one:
        assert one.post(gzip.compress(body), Content_Encoding="gzip")[0] == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    rest = tmp_path / "rest.ndjson"
    rest.write_text("\r\n".join(made[1500:]), newline="")
    with rest.open("rb") as stdin:
        arguments = [*into(tmp_path, executor__kind=kind), "--source", "stdin"]
        with Daemon(*arguments, cwd=tmp_path, stdin=stdin) as two:
            assert two.wait() == 0
    assert seen(tmp_path) == expected
