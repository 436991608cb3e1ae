"""Every recipe of the cookbook is run, with what can go wrong."""

from __future__ import annotations

import gc
import gzip
import importlib
import json
import re
import socketserver
import sqlite3
import subprocess
import sys
import threading
import tomllib
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.execution.settings import ExecutorSettings, HandlerSettings
from ingestd.testing import Harness
from ingestd.testing.plugin import ingestd_harness
from tests.daemon.harness import ROOT
from tests.sinks.postgres_server import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ingestd_harness"]

PAGE = (ROOT / "docs" / "COOKBOOK.md").read_text()
RECIPES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
TOML = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
ORDERS = [{"user": "ann", "total": 5}, {"user": "bob", "total": 7}, {"user": "cy", "total": 9}]
MODEL = """
class Vector(list):
    def tobytes(self):
        return bytes(self)

class SentenceTransformer:
    loads = 0

    def __init__(self, name):
        SentenceTransformer.loads += 1

    def encode(self, texts):
        return [Vector([len(text), 1]) for text in texts]
"""
"""A stand-in for the package: a model of gigabytes is no part of the recipe."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Writes the page's modules into the current folder; imports one of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *filter(None, sys.path)])
    for name, source in {**RECIPES, "sentence_transformers": MODEL}.items():
        Path(f"{name}.py").write_text(source)
    yield importlib.import_module
    for name in (*RECIPES, "sentence_transformers"):
        sys.modules.pop(name, None)


def test_every_recipe_is_here() -> None:
    assert PAGE.count("```python") == len(RECIPES)
    text = Path(__file__).read_text()
    assert [name for name in RECIPES if f'recipe("{name}")' not in text] == []
    lines = re.findall(r"^ingestd try .*", PAGE, re.MULTILINE)
    assert len(lines) == PAGE.count("```sh") == 1
    for table in TOML:
        HandlerSettings(**table["handler"])
        ExecutorSettings(**table["executor"])


@pytest.mark.slow
def test_the_line_at_the_top(recipe: Callable[[str], Any], tmp_path: Path) -> None:
    (line,) = re.findall(r"^ingestd (try .*)", PAGE, re.MULTILINE)
    Path("orders.ndjson").write_text("".join(f"{json.dumps(order)}\n" for order in ORDERS))
    command = [sys.executable, "-P", "-m", "ingestd", *line.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 done" in done.stdout


# -- databases -------------------------------------------------------------------------------------


def fails_and_crashes(harness: Harness) -> None:
    """Batches that fail after their commit, until one is split, and a crash before an outcome."""
    harness.send(ORDERS)
    harness.fail_batch(1, ConnectionError("after the commit"), times=3, after=True)
    harness.run()
    harness.crash_after(1)
    harness.send([{"user": "dee", "total": 1}])
    harness.run()
    assert harness.lives == 2
    assert (harness.pending, harness.dead) == (0, [])


def test_a_database_has_each_record_once(recipe: Callable[[str], Any]) -> None:
    module = recipe("orders_sqlite")
    tries = {"retry.attempts_max": 3}  # then it is split
    with Harness(module.Store, options={"path": "orders.db"}, **tries) as harness:
        fails_and_crashes(harness)
        assert any(call.lineage for call in harness.batches)  # it was split
        harness.send([{"user": "eve"}])
        harness.run()
        assert [one.reason for one in harness.dead] == ["undecodable"]
    with closing(sqlite3.connect("orders.db")) as db:
        rows = db.execute("SELECT user FROM orders ORDER BY user").fetchall()
    assert rows == [("ann",), ("bob",), ("cy",), ("dee",)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as a crash would
@pytest.mark.slow
def test_postgres_has_each_record_once(recipe: Callable[[str], Any]) -> None:
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    database = Database()
    try:
        module = recipe("orders_postgres")
        tries = {"retry.attempts_max": 3}
        with Harness(module.Store, options={"dsn": database.dsn()}, **tries) as harness:
            fails_and_crashes(harness)
        gc.collect()
        assert database.sql("SELECT string_agg(usr, ' ' ORDER BY usr) FROM orders") == (
            "ann bob cy dee"
        )
    finally:
        database.drop()
    with Harness(module.Store, options={"dsn": "host=127.0.0.1 port=1"}) as harness:
        harness.send(ORDERS)
        harness.run(3600)
        assert (harness.pending, harness.dead) == (3, [])


# -- an API ----------------------------------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    answers: list[tuple[int, dict[str, str]]]
    seen: list[tuple[str, list[dict[str, Any]]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Idempotency-Key"], body))
        status, headers = self.answers.pop(0) if self.answers else (200, {})
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(server: socketserver.BaseServer) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_an_api_says_when_to_come_again(recipe: Callable[[str], Any]) -> None:
    module = recipe("push")
    wait = module.wait_of(format_datetime(datetime.now(UTC) + timedelta(seconds=900), usegmt=True))
    assert 800 < wait <= 900
    assert module.wait_of(None) is None
    Api.answers, Api.seen = [(429, {"Retry-After": "120"}), (503, {}), (200, {}), (422, {})], []
    with served(ThreadingHTTPServer(("127.0.0.1", 0), Api)) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with Harness(module.Push, options={"url": url}) as harness:
            harness.send(ORDERS)
            harness.run()
            first, second, third = harness.batches
            assert second.at - first.at >= timedelta(seconds=120)
            assert [key for key, _ in Api.seen] == [first.id] * 3
            assert Api.seen[2][1] == ORDERS
            harness.send([{"user": "dee"}])
            harness.run()
            assert [(one.reason, one.error[:3]) for one in harness.dead] == [("rejected", "422")]
            Api.answers = [(401, {})]
            harness.send([{"user": "eve"}])
            harness.run()
            assert harness.processed[-1] == {"user": "eve"}
            assert third.error == ""


# -- a model ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_loaded_once(recipe: Callable[[str], Any]) -> None:
    model = recipe("sentence_transformers").SentenceTransformer
    texts = [{"id": str(n), "text": "x" * n} for n in range(10)]
    options = {"model": "any", "path": "vectors.db"}
    with Harness(recipe("embed").Embed, options=options, **{"batch.records_max": 3}) as harness:
        harness.send(texts)
        harness.fail_batch(1, ConnectionError("after the commit"), after=True)
        harness.run()
        assert len(harness.batches) == 5
        assert len(harness.processed) == 10
    assert model.loads == 1
    with closing(sqlite3.connect("vectors.db")) as db:
        assert db.execute("SELECT count(*), max(vector) FROM vectors").fetchone() == (
            10,
            b"\x09\x01",
        )


# -- files -----------------------------------------------------------------------------------------


def test_a_file_is_written_over_with_the_same_bytes(recipe: Callable[[str], Any]) -> None:
    module = recipe("archive")
    with Harness(module.Archive, options={"folder": "out"}) as harness:
        harness.send(ORDERS)
        harness.fail_batch(1, ConnectionError("after the rename"), after=True)
        harness.run()
        (path,) = [one for one in Path("out").rglob("*") if one.is_file()]
        assert path.name == f"{harness.batches[0].id}.ndjson.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    assert [json.loads(line) for line in lines] == ORDERS


# -- e-mail ----------------------------------------------------------------------------------------


class Mailbox(socketserver.StreamRequestHandler):
    """As much of a mail server as a client of Python's needs."""

    mails: list[str]
    breaks_after = 0

    def handle(self) -> None:
        self.say("220 here")
        for raw in self.rfile:
            line = raw.decode().strip().upper()
            if line.startswith("RCPT") and "NOBODY@" in line:
                self.say("550 no such mailbox")
            elif line == "DATA":
                self.say("354 go on")
                text = b"".join(iter(self.rfile.readline, b".\r\n")).decode()
                Mailbox.mails.append(text)
                self.say("250 taken")
                Mailbox.breaks_after -= 1
                if not Mailbox.breaks_after:
                    return  # in the middle of a batch
            elif line == "QUIT":
                self.say("221 bye")
                return
            else:
                self.say("250 yes")

    def say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


@pytest.mark.slow
def test_one_bad_address_is_one_dead_letter(recipe: Callable[[str], Any]) -> None:
    module = recipe("mails")
    people = ["ann", "nobody", "bob", "cy"]
    mails = [{"to": f"{one}@x.example", "subject": one, "text": "Hello"} for one in people]
    Mailbox.mails, Mailbox.breaks_after = [], 2
    with served(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox)) as server:
        options = {
            "host": "127.0.0.1", "port": server.server_address[1], "sender": "shop@shop.example",
        }  # fmt: skip
        with Harness(module.Send, options=options) as harness:
            harness.send(mails)
            harness.run()
            (dead,) = harness.dead
            assert (dead.record["to"], dead.error) == ("nobody@x.example", "550 no such mailbox")
            assert harness.processed == [mails[0], mails[2], mails[3]]
    subjects = [re.search(r"^Subject: (\w+)", text, re.MULTILINE) for text in Mailbox.mails]
    assert [found and found[1] for found in subjects] == ["ann", "bob", "cy"]
    names = [re.search(r"^Message-ID: <(\S+)@shop", text, re.MULTILINE) for text in Mailbox.mails]
    assert len({found and found[1] for found in names}) == 3


@pytest.mark.slow
def test_the_test_on_the_page(recipe: Callable[[str], Any], ingestd_harness: Any) -> None:
    recipe("test_mails").test_a_server_that_is_down_loses_no_mail(ingestd_harness)
