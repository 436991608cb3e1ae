"""The runbook: every alert has its section, and every command of the page is run."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ingestd.settings import Settings
from tests.daemon.harness import ROOT, Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DOCS = ROOT / "docs"
PAGE = (DOCS / "OPERATIONS.md").read_text()
SECTIONS: dict[str, str] = dict(
    re.findall(r"^##?#? (.+?)\n(.*?)(?=^##?#? |\Z)", PAGE, re.MULTILINE | re.DOTALL)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    title: [code for kind, code in FENCE.findall(text) if kind == "sh"]
    for title, text in SECTIONS.items()
}
ALERTS = {
    rule["alert"]: rule["annotations"]
    for group in yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}
INTRODUCTION = "Operations: a runbook"
NOT_RUN: dict[str, str] = {}
"""Sections whose commands need root, systemd or a cluster, each with the reason: none is left."""

STORE = """
import json, os
from pathlib import Path
from ingestd import Batch, Blocked

def store(batch: Batch[dict]) -> None:
    if Path("down").exists():
        raise ConnectionError("connection refused")
    if Path("no-table").exists():
        raise Blocked("there is no table clicks")
    for record in batch:
        if record.get("crash"):
            os._exit(3)
        if record.get("flaky") and Path("flaky").exists():
            raise ConnectionError("connection refused")
        record["user"]
    release = Path("release").read_text()
    with open("got", "a") as got:
        got.writelines(f"{json.dumps([release, batch.id, one])}\\n" for one in batch)
"""
CONFIG = """
[handler]
target = "store:store"
[batch]
age_max = "5ms"
[retry]
attempts_max = 1
backoff = "10ms"
backoff_max = "200ms"
[journal]
keep = "24h"
[drain]
timeout = "500ms"
"""


# -- what the page says ----------------------------------------------------------------------------


def slug(title: str) -> str:
    """The anchor that the usual renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    without_code = FENCE.sub("", text)
    return {slug(title) for title in re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)}


def test_every_alert_leads_to_its_section() -> None:
    written = re.findall(r"^### (Ingestd\w+)$", PAGE, re.MULTILINE)
    assert written == list(ALERTS), "a section for each alert, in the order of alerts.yaml"
    for name, said in ALERTS.items():
        path, _, anchor = said["runbook_url"].partition("#")
        assert (path, anchor) == ("docs/OPERATIONS.md", slug(name))
        assert len(SECTIONS[name].split()) >= 10
    assert anchors(PAGE) >= {slug(name) for name in ALERTS}


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PAGE)
    assert len(links) > 50
    for path, anchor in links:
        target = DOCS / path if path else DOCS / "OPERATIONS.md"
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), (path, anchor)


def test_what_is_measured_stands_on_the_page_about_speed() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", SECTIONS["Sizing"], re.MULTILINE)
    measured = (DOCS / "PERFORMANCE.md").read_text()
    numbers = [one for _, cell in rows[2:] for one in re.findall(r"\d[\d,.]*\d|\d", cell)]
    assert len(numbers) > 15
    known = set(re.findall(r"\d[\d,.]*\d|\d", measured))
    assert [one for one in numbers if one not in known] == []


def test_settings_load_and_every_command_is_run() -> None:
    kinds = FENCE.findall(PAGE)
    assert {kind for kind, _ in kinds} == {"sh", "toml"}
    for kind, code in kinds:
        if kind == "toml":
            assert Settings(**tomllib.loads(code))
    with_commands = {title for title, blocks in BLOCKS.items() if blocks}
    assert with_commands == RUN.keys() | NOT_RUN.keys()
    assert PAGE.count("```sh\n") == sum(map(len, BLOCKS.values()))


# -- what its commands do --------------------------------------------------------------------------

RUN: dict[str, str] = {}
"""Titles of the sections, and the test that runs all blocks of each."""


def runs(
    *titles: str,
) -> Callable[[Callable[[Operator], None]], Callable[[Operator], None]]:
    """Marks a test as the one that runs these sections; it fails if it leaves a block out."""

    def mark(test: Callable[[Operator], None]) -> Callable[[Operator], None]:
        RUN.update(dict.fromkeys(titles, test.__name__))

        @pytest.mark.slow
        @functools.wraps(test)
        def whole(operator: Operator) -> None:
            test(operator)
            blocks = {(title, n) for title in titles for n in range(len(BLOCKS[title]))}
            assert operator.done == blocks

        return whole

    return mark


class Operator:
    """A folder with a handler and its settings, a daemon, and a shell for the page's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[tuple[str, int]] = set()
        self.data = folder / "data"
        self.backup = folder / "backup"
        self.running: Daemon | None = None
        (folder / "bin").mkdir()
        for name, arguments in (("ingestd", " -m ingestd"), ("python", "")):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
            program.chmod(0o755)
        (folder / "store.py").write_text(STORE)
        (folder / "ingestd.toml").write_text(CONFIG)
        self.release("good")

    def release(self, name: str) -> None:
        """Puts a version of the handler in its place."""
        (self.folder / "release").write_text(name)

    @property
    def daemon(self) -> Daemon:
        assert self.running is not None
        return self.running

    def start(self) -> None:
        environ = {"INGESTD_DATA_DIR": str(self.data), "INGESTD_EXECUTOR__WORKERS": "1"}
        self.running = Daemon(cwd=self.folder, environ=environ)
        self.running.event("daemon_started")

    def stop(self) -> dict[str, Any]:
        """Drains it; what the report says."""
        self.daemon.terminate()
        assert self.daemon.wait() == 0
        (report,) = (
            one for one in self.daemon.events if one["event"] in {"drained", "drained_partly"}
        )
        self.close()
        return report

    def close(self) -> None:
        if self.running is not None:
            self.running.__exit__()
        self.running = None

    def run(self, title: str, number: int = 0, **replaced: str) -> str:
        """Runs one block of a section; what it wrote to both streams."""
        text = BLOCKS[title][number]
        self.done.add((title, number))
        environ = {
            "PATH": f"{self.folder}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT), "INGESTD_DATA_DIR": str(self.data),
            "BACKUP": str(self.backup), "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        if self.running is not None:
            places = {"8080": self.daemon.port, "8081": self.daemon.admin_port}
            environ["INGESTD_ADMIN__LISTEN"] = f"127.0.0.1:{places['8081']}"
            text = re.sub(r"(?<=//127\.0\.0\.1:)808[01]", lambda m: str(places[m[0]]), text)
        for old, new in replaced.items():
            text = text.replace(old, new)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, env=environ,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, (text, done.stdout)
        return done.stdout

    def run_all(self, title: str, **replaced: str) -> str:
        return "".join(self.run(title, n, **replaced) for n in range(len(BLOCKS[title])))

    def post(self, *records: object) -> None:
        body = b"".join(b"%s\n" % json.dumps(one).encode() for one in records)
        assert self.daemon.post(body)[0] == 202

    def until(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The pipeline's status, once it is as it should be."""
        deadline = time.monotonic() + 60
        while True:
            now: dict[str, Any] = self.daemon.status()["pipelines"]["default"]
            if condition(now):
                return now
            assert time.monotonic() < deadline, now
            time.sleep(0.02)

    def settled(self) -> dict[str, Any]:
        return self.until(lambda now: not now["pending"])

    def got(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Release, batch id and record of each that the handler stored."""
        path = self.folder / "got"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    def batches(self) -> dict[str, list[int]]:
        """What the handler stored of each batch, by its id."""
        found = dict[str, list[int]]()
        for _, name, record in self.got():
            found.setdefault(name, []).append(record["user"])
        return found

    def stored(self) -> list[Any]:
        return [record["user"] for *_, record in self.got()]


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    one = Operator(tmp_path)
    yield one
    one.close()


def users(*numbers: int, **more: object) -> list[dict[str, object]]:
    return [{"user": number, **more} for number in numbers]


_ALERT_COMMANDS = [title for title in ALERTS if BLOCKS.get(title)]


@runs(INTRODUCTION, "First look", *_ALERT_COMMANDS, "Workers that crash", "Slow syncs",
      "A disk that is nearly full")  # fmt: skip
def test_looks_and_alerts(operator: Operator) -> None:
    rules = ("deploy/monitoring/alerts.yaml",
             "deploy/kubernetes/overlays/monitoring/prometheusrule.yaml")  # fmt: skip
    for name in rules:
        (operator.folder / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, operator.folder / name)
    operator.run(INTRODUCTION)
    for name in rules:
        text = (operator.folder / name).read_text()
        address = "https://git.example.com/ops/ingestd/blob/main/docs/OPERATIONS.md#ingestddown"
        assert f"runbook_url: {address}\n" in text
    operator.start()
    operator.post(*users(1, 2), {"x": 1}, {"user": 3, "crash": True}, *users(4))
    assert operator.daemon.post(b'{"user":5}\nno JSON\n')[0] == 202
    assert operator.settled()["dead"] == 2
    seen = operator.run("First look")
    assert "KeyError" in seen
    assert "malformed" in seen
    assert "syncs of 4 KiB" in seen
    said = {title: operator.run_all(title) for title in _ALERT_COMMANDS}
    assert "balanced           yes" in said["IngestdJournalNearlyFull"]
    assert 'bound="journal.free_min"' in said["IngestdRecordsRefused"]
    assert "KeyError" in said["IngestdDeadLettersGrow"]
    assert said["IngestdLedgerMismatch"] == "default: ok\n"
    assert 'error="KeyError"' in said["IngestdSinkFails"]
    operator.daemon.event("reloaded")  # by the certificate's section
    crashed = operator.run("Workers that crash")
    assert re.search(r"default +\S+ +crashed", crashed)
    assert 'ingestd_worker_restarts_total{pipeline="default",reason="crashed"}' in crashed
    assert "ingestd_worker_resident_memory_bytes" in crashed
    assert operator.daemon.event("worker_died")["error"]
    assert "_count" in operator.run("Slow syncs")
    letters = operator.folder / "letters.jsonl"
    disk = operator.run_all("A disk that is nearly full", **{"/mnt/other": str(operator.folder)})
    assert "journal.db" in disk
    reasons = {json.loads(line)["reason"] for line in letters.read_text().splitlines()}
    assert reasons == {"failed", "crashed", "malformed"}
    assert operator.until(lambda now: not now["dead_letters"]["kept"])["dead_letters"]["purged"]


@runs("A sink that is down", "A paused pipeline")
def test_a_sink_that_is_down_then_blocked_then_back(operator: Operator) -> None:
    title = "A sink that is down"
    operator.start()
    operator.post(*users(0))
    operator.settled()
    for number, (file, state, error) in enumerate(
        [("down", "down", "connection refused"), ("no-table", "blocked", "no table clicks")], 1
    ):
        (operator.folder / file).touch()
        operator.post(*users(2 * number - 1))
        operator.post(*users(2 * number))
        operator.until(lambda now, state=state: now["handler"]["state"] == state)
        seen = operator.run(title)
        assert f'"state": "{state}"' in seen
        assert error in seen
        assert re.search(rf"^default +{state} .* 2 ", seen, re.MULTILINE)
        (operator.folder / file).unlink()
        now = operator.settled()
        assert (now["handler"]["state"], now["dead"]) == ("up", 0)
        assert sorted(operator.stored()) == list(range(2 * number + 1))

    operator.run("A paused pipeline", 0)
    operator.until(lambda now: now["paused"])
    operator.post(*users(5))
    assert re.search(r"^default +paused ", operator.run("A paused pipeline", 1), re.MULTILINE)
    assert 5 not in operator.stored()
    operator.run("A paused pipeline", 2)
    operator.settled()
    assert 5 in operator.stored()


@runs("A poison record", "Dead letters after an outage")
def test_a_poison_record_is_found_read_and_fed_again(operator: Operator) -> None:
    title = "A poison record"
    operator.start()
    operator.post(*users(1), {"who": 7}, *users(2))
    now = operator.settled()
    assert (now["processed"], now["dead"]) == (2, 1)
    seen = operator.run(title, 0)
    assert "KeyError: 'user'" in seen
    assert '{"who": 7}' in seen
    mended = STORE.replace('record["user"]', 'record.setdefault("user", record.get("who"))')
    (operator.folder / "mended.py").write_text(mended)
    assert "1 done" in operator.run(title, 1)
    shutil.copy(operator.folder / "mended.py", operator.folder / "store.py")
    operator.stop()
    (operator.folder / "got").unlink()  # of the try
    operator.start()
    operator.run(title, 2)
    now = operator.until(lambda now: not now["dead_letters"]["kept"] and not now["pending"])
    assert (now["accepted"], now["processed"], now["dead"]) == (3, 3, 0)
    assert operator.stored() == [7]

    (operator.folder / "flaky").touch()
    operator.post(*users(10), *users(11, 12, flaky=True), *users(13))
    assert operator.settled()["dead"] == 2
    (operator.folder / "flaky").unlink()
    seen = operator.run("Dead letters after an outage")
    assert re.search(r"^ +2 +default +failed .*connection refused", seen, re.MULTILINE)
    now = operator.until(lambda now: not now["dead_letters"]["kept"] and not now["pending"])
    assert (now["processed"], now["dead"]) == (7, 0)
    assert sorted(operator.stored()) == [7, 10, 11, 12, 13]


@runs("Replay after a bad deploy")
def test_a_bad_deploy_is_replayed_to_the_mended_handler(operator: Operator) -> None:
    def moment() -> str:
        return datetime.now(UTC).isoformat()

    title = "Replay after a bad deploy"
    operator.start()
    operator.post(*users(1, 2))
    operator.settled()
    since = moment()
    operator.release("bad")
    operator.post(*users(3, 4))
    operator.post(*users(5))
    operator.settled()
    until = moment()
    times = {"2026-05-01T12:00:00Z": since, "2026-05-01T12:40:00Z": until}
    seen = operator.run(title, 0, **times)
    assert "would feed 3 kept records" in seen
    operator.until(lambda now: now["paused"])
    operator.post(*users(6))  # accepted, and kept from the bad version
    operator.stop()
    operator.release("mended")
    operator.start()
    assert operator.until(lambda now: now["paused"])["pending"] == 1
    seen = operator.run(title, 1, **times)
    now = operator.until(lambda now: now["kept"]["replayed"] == 3 and not now["pending"])
    assert (now["accepted"], now["processed"], now["dead"]) == (9, 9, 0)
    by = {
        release: sorted(record["user"] for one, _, record in operator.got() if one == release)
        for release in ("good", "bad", "mended")
    }
    assert by == {"good": [1, 2], "bad": [3, 4, 5], "mended": [3, 4, 5, 6]}
    ids = {release: {name for one, name, _ in operator.got() if one == release} for release in by}
    assert not ids["bad"] & ids["mended"]


@runs("Backup", "Restore")
def test_a_backup_of_a_running_daemon_is_restored(operator: Operator) -> None:
    folder = operator.folder
    operator.start()
    operator.post(*users(*range(10)))
    operator.settled()
    (folder / "down").touch()
    operator.post(*users(*range(10, 30)))
    assert operator.daemon.post(b'no JSON\n{"user":99}\n')[0] == 202  # and a letter
    copied = back_up_under_load(operator)
    assert copied["accepted"] == copied["processed"] + copied["dead"] + copied["pending"]
    assert (copied["processed"], copied["dead"], copied["invalid"]) == (10, 0, 1)
    assert copied["pending"] >= 21
    (folder / "down").unlink()
    assert operator.settled()["accepted"] > copied["accepted"]
    post_batches(operator, 2000)
    operator.stop()
    first = operator.batches()

    # The copy runs elsewhere, and its counts are right. It gives names a second time.
    operator.data = folder / "elsewhere"
    assert "default: ok" in operator.run("Restore", 0)
    (folder / "got").unlink()
    operator.start()
    now = operator.settled()
    assert (now["accepted"], now["processed"]) == (copied["accepted"], copied["accepted"])
    assert (now["dead"], now["invalid"]) == (0, 1)
    assert len(operator.stored()) == copied["pending"]
    post_batches(operator, 3000)
    operator.stop()
    second = operator.batches()
    assert [name for name in first.keys() & second.keys() if first[name] != second[name]]

    # What waits in the copy is sent to an empty data directory, and gets new names.
    operator.data = folder / "empty"
    (folder / "got").unlink()
    operator.start()
    operator.run("Restore", 1)
    now = operator.settled()
    assert now["processed"] == len(operator.stored()) == copied["pending"]
    assert not operator.batches().keys() & (first.keys() | second.keys())
    assert len((folder / "letters.jsonl").read_text().splitlines()) == 1


def post_batches(operator: Operator, first: int) -> None:
    """Has some batches stored; those that were split while the handler was down have no name."""
    for number in range(first, first + 20):
        operator.post(*users(number))
        operator.settled()


def back_up_under_load(operator: Operator) -> dict[str, Any]:
    """Runs the commands while records are accepted; what the copy says of itself."""
    ended = threading.Event()
    posted: list[int] = []

    def post() -> None:
        while not ended.is_set():
            operator.post(*users(100 + len(posted)))
            posted.append(1)

    thread = threading.Thread(target=post)
    thread.start()
    try:
        assert "default: ok" in operator.run("Backup")
    finally:
        ended.set()
        thread.join()
    assert posted
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "journal", "stat", "--json", "--data-dir",
         str(operator.backup)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@runs("Upgrade, and what cannot be undone", "Move to another machine")
def test_a_journal_is_moved_with_records_pending(operator: Operator) -> None:
    folder = operator.folder
    operator.start()
    operator.post(*users(1), {"x": 1})
    assert operator.settled()["dead"] == 1
    (folder / "down").touch()
    operator.post(*users(2))
    assert "its journal has version" in operator.run("Upgrade, and what cannot be undone", 0)
    report = operator.stop()
    assert (report["accepted"], report["pending"]) == (3, 1)
    operator.run("Upgrade, and what cannot be undone", 1)
    assert (folder / "before-upgrade" / "journal.db").is_file()
    operator.backup.mkdir()
    operator.run("Move to another machine", 0)
    shutil.rmtree(operator.data)
    operator.data = folder / "another"
    assert "default: ok" in operator.run("Move to another machine", 1)
    (folder / "down").unlink()
    operator.start()
    now = operator.settled()
    assert (now["accepted"], now["processed"], now["dead"]) == (3, 2, 1)
    assert operator.stored() == [1, 2]
