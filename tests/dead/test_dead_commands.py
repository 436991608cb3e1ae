"""`ingestd dead` and `ingestd journal` as people use them: real processes beside a real daemon."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.cli.lines import write_lines
from tests.daemon.harness import ROOT, Daemon, daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import pathlib
import ingestd

def store(batch: ingestd.Batch[object]) -> None:
    if pathlib.Path("down").exists():
        raise ConnectionError("down")
    if pathlib.Path("bad").exists():
        for i in range(len(batch)):
            batch.reject(i, "bad now")
        return
    with open("got", "a") as got:
        got.writelines(f"{record}\\n" for record in batch)
"""
PENDING = (
    "app:store",
    "--batch.age_max",
    "1ms",
    "--drain.timeout",
    "0s",
    "--retry.backoff_max",
    "1s",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def cli(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", *args],
        cwd=cwd, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def got(folder: Path) -> list[str]:
    path = folder / "got"
    return path.read_text().splitlines() if path.exists() else []


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(what)


def status(running: Daemon) -> dict[str, Any]:
    now = running.status()["pipelines"]["default"]
    assert now["accepted"] == now["processed"] + now["dead"] + now["pending"]
    return now


def numbers(count: int) -> bytes:
    return b"".join(b"%d\n" % n for n in range(count))


def give_up(folder: Path, running: Daemon, count: int) -> None:
    """Has the daemon reject `count` records."""
    (folder / "bad").touch()
    before = status(running)["dead"]
    assert running.post(numbers(count))[0] == 202
    until(lambda: status(running)["dead"] == before + count, "they did not die")
    (folder / "bad").unlink()


@pytest.mark.slow
def test_retry_beside_the_daemon_feeds_each_record_once(folder: Path) -> None:
    with daemon("app:store", cwd=folder) as running:
        give_up(folder, running, 2500)
        assert running.post(b"{\n7\n")[0] == 202
        done = cli("dead", "retry", cwd=folder)
        assert done.stdout.startswith("2500 ")
        # The malformed one was never accepted, and is no better now.
        assert "1 letter was never accepted and is still no record" in done.stderr
        now = until(lambda: (s := status(running))["processed"] == 2501 and s, "they stay away")
        assert (now["accepted"], now["invalid"], now["pending"]) == (2501, 1, 0)
        (letter,) = lines(cli("dead", "list", "--json", cwd=folder))
        assert (letter["reason"], letter["retry"]) == ("malformed", False)
        _, _, page = running.request("GET", "/metrics", admin=True)
        assert b'ingestd_records_dead_total{pipeline="default"} 2500.0' in page
        assert b'ingestd_records_invalid_total{pipeline="default"} 1.0' in page
        running.terminate()
        assert running.wait() == 0
        assert running.event("drained")["balanced"]
    assert sorted(got(folder)) == sorted([str(n) for n in range(2500)] + ["7"])
    (stat,) = lines(cli("journal", "stat", "--json", cwd=folder))
    assert "{" not in cli("journal", "stat", cwd=folder).stdout
    assert stat["balanced"]
    assert stat["dead_letters"]["requeued"] == 2500
    assert stat["dead_letters"]["readmitted"] == 0


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.slow
def test_marks_survive_a_restart_before_they_are_seen(folder: Path, how: str) -> None:
    with daemon("app:store", cwd=folder) as running:
        give_up(folder, running, 3)
        if how == "stopped":
            running.terminate()
            assert running.wait() == 0
        else:
            running.process.send_signal(signal.SIGSTOP)
        cli("dead", "retry", cwd=folder)
        assert [one["retry"] for one in lines(cli("dead", "list", "--json", cwd=folder))] == [
            True
        ] * 3
        assert cli("dead", "purge", "--all", "--yes", cwd=folder).stdout.startswith("0 ")
        running.process.kill()
        running.wait()
    assert got(folder) == []
    with daemon("app:store", cwd=folder) as again:
        until(lambda: status(again)["processed"] == 3, "they did not come back")
        assert status(again)["dead"] == 0
    assert sorted(got(folder)) == ["0", "1", "2"]


@pytest.mark.slow
def test_end_of_input_waits_for_what_was_marked(folder: Path) -> None:
    with daemon("app:store", cwd=folder) as running:
        give_up(folder, running, 1500)
        running.terminate()
        assert running.wait() == 0
    cli("dead", "retry", "--limit", "1200", cwd=folder)
    with Daemon("app:store", "--source", "stdin", cwd=folder) as again:
        assert again.wait() == 0
        assert again.event("dead_letters_requeued")["requeued"] == 1200
    assert len(set(got(folder))) == len(got(folder)) == 1200


@pytest.mark.slow
def test_purging_while_the_daemon_writes(folder: Path) -> None:
    stop = threading.Event()
    posted = 0

    def post(running: Daemon) -> None:
        nonlocal posted
        while not stop.is_set():
            code, _ = running.post(b"{\n" * 200 + b"1\n")
            assert code == 202
            posted += 1

    with daemon("app:store", cwd=folder) as running:
        thread = threading.Thread(target=post, args=(running,))
        thread.start()
        try:
            purged = 0
            for _ in range(3):
                until(lambda: status(running)["dead_letters"]["kept"] > 400, "no letters")
                done = cli("dead", "purge", "--reason", "malformed", "--yes", cwd=folder)
                purged += int(done.stdout.split()[0])
        finally:
            stop.set()
            thread.join()
        assert purged > 1000
        kept = len(lines(cli("dead", "list", "--json", cwd=folder)))
        until(lambda: status(running)["dead_letters"]["kept"] == kept, "the daemon miscounts")
        # Of the 200 of each request `http.invalid_kept` are kept.
        assert status(running)["invalid"] == posted * 10 == purged + kept
        running.terminate()
        assert running.wait() == 0
    assert cli("journal", "verify", cwd=folder).stdout == "default: ok\n"
    (stat,) = lines(cli("journal", "stat", "--json", cwd=folder))
    assert stat["dead_letters"]["purged"] == purged


def test_at_the_bound_dispatch_stops_until_somebody_makes_room(folder: Path) -> None:
    """Records are accepted on, nothing more is given up, and a drain does not wait for it."""
    flags = ("--dead.bytes_max", "3kB", "--batch.records_max", "100", "--batch.age_max", "10ms")
    (folder / "bad").touch()
    with daemon("app:store", *flags, cwd=folder) as running:
        for _ in range(60):
            assert running.post(numbers(100))[0] == 202
        now = until(lambda: (s := status(running))["dispatch_stopped"] and s, "it did not stop")
        assert "dead.bytes_max" in now["dispatch_stopped"]
        assert "dead.bytes_max" in now["bounds_near"]
        stopped = running.event("dispatch_stopped")
        assert stopped["reason"] == "dead.bytes_max"
        now = until(lambda: (s := status(running))["batches"]["running"] == 0 and s, "busy")
        assert now["pending"] > 2000
        assert running.post(b"{\n" * 3 + b"1\n2\n3\n4\n")[0] == 202
        (folder / "bad").unlink()
        _, _, page = running.request("GET", "/metrics", admin=True)
        assert b'ingestd_dispatch_stopped{pipeline="default"} 1.0' in page
        # What is fed again makes room as well as what is purged.
        cli("dead", "retry", "--reason", "rejected", cwd=folder)
        until(lambda: status(running)["processed"] == 6004, "it did not go on")
        now = status(running)
        assert (now["dispatch_stopped"], now["dead"], now["pending"]) == ("", 0, 0)
        running.event("dispatch_resumed")
        (folder / "bad").touch()
        for _ in range(60):
            assert running.post(numbers(100))[0] == 202
        until(lambda: status(running)["dispatch_stopped"], "it did not stop again")
        running.terminate()
        assert running.wait() == 0
        assert running.event("drained_partly")["pending"] > 0
    assert len(set(got(folder))) == 100


def test_old_letters_expire_and_are_counted(folder: Path) -> None:
    with daemon("app:store", "--dead.age_max", "1ms", cwd=folder) as running:
        (folder / "bad").touch()
        assert running.post(numbers(2090))[0] == 202
        assert running.post(b"{\n" * 10 + numbers(10))[0] == 202
        until(lambda: status(running)["dead"] == 2100, "they did not die")
        until(lambda: status(running)["dead_letters"]["kept"] == 0, "they stay")
        _, _, page = running.request("GET", "/metrics", admin=True)
        assert b'ingestd_letters_expired_total{pipeline="default"} 2110.0' in page
        running.event("dead_letters_expired")


@pytest.mark.slow
def test_show_and_export(folder: Path) -> None:
    with daemon("app:store", "--format", "bytes", cwd=folder) as running:
        (folder / "bad").touch()
        for body in (b"text", b"\xff\x00"):
            kind = {"Content-Type": "application/octet-stream"}
            assert running.request("POST", "/v1/records", body, kind)[0] == 202
        until(lambda: status(running)["dead"] == 2, "they did not die")
        table = cli("dead", "list", "--since", "1h", cwd=folder).stdout.splitlines()
        assert len(table) == 3
        assert "bad now" in table[1]
        assert cli("dead", "list", "--until", "1h", cwd=folder).stdout == ""
        page = cli("dead", "show", "1", cwd=folder).stdout
        assert "rejected" in page
        assert page.endswith("\ntext\n")
        out = folder / "letters.jsonl"
        cli("dead", "export", "-o", str(out), cwd=folder)
        one, other = map(json.loads, out.read_text().splitlines())
        assert one["payload"] == "text"
        assert base64.b64decode(other["payload_base64"]) == b"\xff\x00"
        assert lines(cli("dead", "export", "--id", "2", cwd=folder)) == [other]
        assert "there is no dead letter 9" in cli("dead", "show", "9", cwd=folder, code=2).stderr
        said = cli("dead", "export", "-o", ".", cwd=folder, code=78).stderr
        assert said == "ingestd: .: Is a directory\n"
        full = f"{shlex.join([sys.executable, '-m', 'ingestd'])} dead export > /dev/full"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(["sh", "-c", full], cwd=folder, env=env, stderr=subprocess.PIPE)
        assert ended.stderr == b"ingestd: standard output: No space left on device\n"
        assert ended.returncode == 1


@pytest.mark.slow
def test_what_is_no_whole_record_can_not_be_fed_again(folder: Path) -> None:
    with daemon("app:store", "--record_bytes_max", "10", cwd=folder) as running:
        assert running.post(b'"much too long"\n1\n')[0] == 202
        done = cli("dead", "retry", cwd=folder)
        assert done.stdout.startswith("0 dead letters")
        assert "1 letter holds no record" in done.stderr
        assert cli("dead", "purge", "--all", cwd=folder, code=2).stdout == ""
        assert "--all" in cli("dead", "purge", cwd=folder, code=2).stderr
        assert len(lines(cli("dead", "list", "--json", cwd=folder))) == 1


def test_without_a_journal_nothing_is_created(folder: Path) -> None:
    for command in (("dead", "list"), ("dead", "retry"), ("journal", "verify", "--repair")):
        done = cli(*command, "--data-dir", "nowhere", cwd=folder, code=78)
        assert "no journal" in done.stderr
    assert not (folder / "nowhere").exists()


@pytest.mark.slow
def test_pipelines_are_told_apart(folder: Path) -> None:
    settings = '[pipelines.clicks]\nhandler.target = "app:store"\n[handler]\ntarget = "app:store"\n'
    (folder / "ingestd.toml").write_text(settings)
    with daemon(cwd=folder) as running:
        assert running.post(b"{\n1\n")[0] == 202
        assert running.post(b"[\n1\n", "/v1/records/clicks")[0] == 202
        both = lines(cli("dead", "list", "--json", cwd=folder))
        assert [(one["pipeline"], one["id"]) for one in both] == [("default", 1), ("clicks", 1)]
        assert "--pipeline" in cli("dead", "show", "1", cwd=folder, code=2).stderr
        assert "--pipeline" in cli("dead", "purge", "--id", "1", "--yes", cwd=folder, code=2).stderr
        cli("dead", "purge", "--id", "1", "--pipeline", "clicks", "--yes", cwd=folder)
        (left,) = lines(cli("dead", "list", "--json", cwd=folder))
        assert left["pipeline"] == "default"
        assert "has no journal" in cli("dead", "list", "--pipeline", "x", cwd=folder, code=2).stderr
        assert len(cli("journal", "stat", "--json", cwd=folder).stdout.splitlines()) == 2


def damage(folder: Path, chunk: int) -> bytes:
    """Flips a bit of a chunk; what is then there."""
    db = sqlite3.connect(folder / "ingestd-data" / "journal.db")
    try:
        (payload,) = db.execute("SELECT payload FROM chunks WHERE id = ?", (chunk,)).fetchone()
        flipped = bytes([payload[0] ^ 1]) + payload[1:]
        db.execute("UPDATE chunks SET payload = ? WHERE id = ?", (flipped, chunk))
        db.commit()
    finally:
        db.close()
    return flipped


@pytest.mark.slow
def test_verify_finds_a_flipped_bit_and_repair_sets_it_aside(folder: Path) -> None:
    (folder / "down").touch()
    with daemon(*PENDING, cwd=folder) as running:
        for body in (b"0\n1\n2\n", b"3\n4\n5\n"):
            assert running.post(body)[0] == 202
        assert cli("journal", "verify", cwd=folder).stdout == "default: ok\n"
        busy = cli("journal", "verify", "--repair", cwd=folder, code=78)
        assert "another ingestd" in busy.stderr
        running.terminate()
        assert running.wait() == 0
    kept = damage(folder, 1)
    found = cli("journal", "verify", cwd=folder, code=1)
    assert found.stdout.count("\n") == 1
    assert "chunk 1 is damaged" in found.stdout
    repaired = cli("journal", "verify", "--repair", "-o", "aside", cwd=folder)
    assert "its 3 records are dead letters" in repaired.stdout
    (payload,) = (folder / "aside").glob("*-1.payload")
    assert payload.read_bytes() == kept
    (stat,) = lines(cli("journal", "stat", "--json", cwd=folder))
    assert (stat["accepted"], stat["dead"], stat["pending"]) == (6, 3, 3)
    assert stat["damaged"]["rows"] == 1
    assert cli("journal", "verify", cwd=folder).stdout == "default: ok\n"
    (folder / "down").unlink()
    with daemon("app:store", cwd=folder) as again:
        until(lambda: status(again)["pending"] == 0, "still pending")
        again.terminate()
        assert again.wait() == 0
        assert again.event("drained")["balanced"]
    assert sorted(got(folder)) == ["3", "4", "5"]
    assert {one["reason"] for one in lines(cli("dead", "list", "--json", cwd=folder))} == {
        "damaged"
    }


@pytest.mark.slow
def test_verify_says_what_does_not_add_up_and_repair_builds_it_anew(folder: Path) -> None:
    (folder / "down").touch()
    with daemon(*PENDING, cwd=folder) as running:
        assert running.post(numbers(3))[0] == 202
        running.terminate()
        assert running.wait() == 0
    db = sqlite3.connect(folder / "ingestd-data" / "journal.db")
    db.execute("DELETE FROM chunks")
    db.commit()
    db.close()
    found = cli("journal", "verify", cwd=folder, code=1).stdout
    assert "names chunk 1, which is not there" in found
    assert "built anew" in cli("journal", "verify", "--repair", cwd=folder).stdout
    assert cli("journal", "verify", cwd=folder).stdout == "default: ok\n"
    (stat,) = lines(cli("journal", "stat", "--json", cwd=folder))
    assert stat["accepted"] == stat["processed"] + stat["dead"] == 3
    assert list((folder / "ingestd-data").glob("journal.db.damaged-*"))


@pytest.mark.slow
def test_the_same_forms_everywhere_and_what_is_not_there_is_said(folder: Path) -> None:
    with daemon("app:store", cwd=folder) as running:
        give_up(folder, running, 5)
        one = lines(cli("dead", "show", "2", "--json", cwd=folder))
        assert lines(cli("dead", "export", "2", cwd=folder)) == one
        assert lines(cli("dead", "export", "--id", "2", cwd=folder)) == one
        assert [
            letter["id"] for letter in lines(cli("dead", "list", "2", "4", "--json", cwd=folder))
        ] == [2, 4]
        for action in ("list", "show", "retry", "export", "purge"):
            done = cli("dead", action, "3", "99", cwd=folder, code=2)
            assert "there is no dead letter 99" in done.stderr
            if action != "show":
                done = cli("dead", action, "--reason", "unheard", cwd=folder, code=2)
                assert "'unheard' is no reason" in done.stderr
        assert cli("dead", "purge", "3", "--yes", cwd=folder).stdout.startswith("1 dead letter ")
        assert cli("dead", "retry", "1", "5", cwd=folder).stdout.startswith("2 dead letters")
        until(lambda: status(running)["processed"] == 2, "they did not come back")
        left = lines(cli("dead", "list", "--json", cwd=folder))
        assert [(letter["id"], letter["record"]) for letter in left] == [
            (2, one[0]["record"]), (4, one[0]["record"][:-1] + "3"),
        ]  # fmt: skip
    assert sorted(got(folder)) == ["0", "4"]


@pytest.mark.parametrize("kind", ["link to a device", "link to a file", "pipe", "folder"])
def test_an_export_takes_the_place_of_a_file_alone(tmp_path: Path, kind: str) -> None:
    """As root it put a file in place of `/dev/null`."""
    target = tmp_path / "target"
    (tmp_path / "other").write_text("other")
    {
        "link to a device": lambda: target.symlink_to("/dev/null"),
        "link to a file": lambda: target.symlink_to(tmp_path / "other"),
        "pipe": lambda: os.mkfifo(target),
        "folder": target.mkdir,
    }[kind]()
    before = target.lstat()
    with pytest.raises((FileExistsError, IsADirectoryError)):
        write_lines([b"1\n"], str(target))
    assert target.lstat() == before
    assert (tmp_path / "other").read_text() == "other"


@pytest.mark.parametrize("error", [OSError("full"), MemoryError()])
def test_an_export_that_does_not_end_leaves_nothing_behind(
    tmp_path: Path, error: BaseException
) -> None:
    def letters() -> Iterator[bytes]:
        yield b"1\n"
        raise error

    (tmp_path / "letters").write_bytes(b"of before")
    with pytest.raises(type(error)):
        write_lines(letters(), str(tmp_path / "letters"))
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]
    assert (tmp_path / "letters").read_bytes() == b"of before"
