"""A daemon with several sources, and with components of a package outside of it; real processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from ingestd.config.loader import load, plan
from ingestd.registry import SOURCES
from ingestd.settings import Settings, validation_errors
from ingestd.source_group import key_rule
from tests.daemon.harness import ROOT, Daemon, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

OWN_KINDS = ", ".join(map(repr, SOURCES.own))


class Web:
    """Serves a line at each path; `/held` only once it is let go."""

    def __init__(self) -> None:
        self.held = held = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/held":
                    held.wait(60)
                body = b"not json\n" if self.path == "/bad" else b'{"n": 1}\n'
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web() -> Iterator[Web]:
    one = Web()
    turn = threading.Thread(target=one.server.serve_forever)
    turn.start()
    yield one
    one.held.set()
    one.server.shutdown()
    one.server.server_close()
    turn.join()


def fetch(name: str, url: str, pipeline: str) -> str:
    return f"""
[sources.{name}]
kind = "fetch"
urls = ["{url}"]
allow_private = true
pipeline = "{pipeline}"
"""


PIPELINES = "[pipelines.a]\nformat = 'json'\n[pipelines.b]\nformat = 'json'\n"


def until_processed(one: Daemon, pipeline: str) -> None:
    deadline = time.monotonic() + 60
    while one.status()["pipelines"][pipeline]["processed"] < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_input_ends_for_itself_and_the_daemon_leaves_with_the_last(
    tmp_path: Path, web: Web
) -> None:
    (tmp_path / "ingestd.toml").write_text(
        "batch.age_max = '1h'\n"
        + fetch("first", f"{web.url}/1", "a")
        + fetch("second", f"{web.url}/held", "b")
        + PIPELINES
    )
    with daemon(cwd=tmp_path) as one:
        started = one.event("daemon_started")
        assert {name: each["source"] for name, each in started["sources"].items()} == {
            "first": "fetch",
            "second": "fetch",
        }
        assert one.event("source_ended")["source"] == "first"
        until_processed(one, "a")  # although its batch could wait for an hour
        assert one.request("GET", "/readyz", admin=True)[0] == 200
        shown = one.status()["sources"]
        assert {name: each["state"] for name, each in shown.items()} == {
            "first": "ended",
            "second": "running",
        }
        assert shown["first"]["records"] == 1
        page = one.request("GET", "/metrics", admin=True)[2].decode()
        assert 'ingestd_source_running{kind="fetch",source="first"} 0.0' in page
        assert 'ingestd_source_running{kind="fetch",source="second"} 1.0' in page
        web.held.set()
        assert one.wait() == 0
        assert one.event("input_ended")
        drained = [e for e in one.events if e["event"] == "drained"]
        assert {e["pipeline"]: e["processed"] for e in drained} == {"default": 0, "a": 1, "b": 1}
        assert one.event("input_summed_up")["urls_done"] == 2


def test_a_server_goes_on_when_standard_input_has_ended(tmp_path: Path) -> None:
    flags = ("--sources.pipe.kind", "stdin", "--sources.web.kind", "http")
    with daemon(
        *flags, "--sources.web.listen", "127.0.0.1:0", cwd=tmp_path, stdin=subprocess.PIPE
    ) as one:
        one.process.stdin.write(b"1\n2\n")
        one.process.stdin.close()
        assert one.event("source_ended")["source"] == "pipe"
        listening = one.event("daemon_started")["sources"]["web"]["listening"][0]
        connection = http.client.HTTPConnection(listening, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/records", b"3\n")
            assert connection.getresponse().status == 202
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained")["processed"] == 3


def test_an_input_of_which_nothing_was_accepted_is_said_by_the_exit_code(
    tmp_path: Path, web: Web
) -> None:
    (tmp_path / "ingestd.toml").write_text(
        fetch("good", f"{web.url}/1", "a") + fetch("bad", f"{web.url}/bad", "b") + PIPELINES
    )
    with daemon(cwd=tmp_path) as one:
        assert one.wait() == 65
        assert one.event("nothing_processed")["source"] == "bad"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[sources.x]\nkind = 'http'\n[sources.y]\nkind = 'http'\n",
            "sources.y.listen (default): sources.x.listen is 127.0.0.1:8080 too",
        ),
        (
            "[source]\nkind = 'http'\n[sources.y]\nkind = 'http'\n",
            "sources.y.listen (default): http.listen is 127.0.0.1:8080 too",
        ),
        (
            "[sources.x]\nkind = 'stdin'\n[sources.y]\nkind = 'fetch'\nfile = '-'\n",
            (
                "sources.y.kind (file ingestd.toml): sources.x reads standard input too,"
                " and only one source can"
            ),
        ),
        (
            "[sources.x]\nkind = 'stdin'\npipeline = 'no'\n",
            "sources.x.pipeline (file ingestd.toml): there is no pipeline 'no'",
        ),
        (
            "[sources.x]\nkind = 'carrier'\n",
            f"sources.x (file ingestd.toml): 'carrier' is not one of the kinds {OWN_KINDS}",
        ),
        (
            "[sources.x]\npipeline = 'a'\n",
            f"sources.x (file ingestd.toml): needs a kind: {OWN_KINDS}",
        ),
        (
            "[sources.x]\nkind = 'stdin'\nlisten = '127.0.0.1:1'\n",
            "sources.x.listen (file ingestd.toml): is not a setting of this kind",
        ),
        (
            "[sources.x]\nkind = 'http'\nlistn = '127.0.0.1:1'\n",
            "unknown key sources.x.listn (file ingestd.toml), did you mean sources.x.listen?",
        ),
        (
            "[sources.X]\nkind = 'http'\n",
            (
                "sources.X (file ingestd.toml): a source's name starts with a-z,"
                " goes on with a-z 0-9 _ - and has at most 63"
            ),
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "ingestd.toml").write_text(text)
    with pytest.raises(Exception, match="sources") as caught:
        load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none")
    assert problem in str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def web_with(**more: object) -> Settings:
    return Settings(sources={"web": {"kind": "http", "listen": "127.0.0.1:0", **more}})


def test_a_reload_changes_what_a_named_source_may_change() -> None:
    before = web_with(tokens={"shop": {"hash": f"sha256:{'0' * 64}"}})
    after = web_with(tokens={"shop": {"hash": f"sha256:{'1' * 64}"}}, requests_max=5)
    change = plan(before, after, validation_errors)
    assert change.changed == ["sources.web.tokens.shop.hash"]
    assert change.needs_restart == ["sources.web.requests_max"]
    web = change.settings.sources["web"]
    assert (web.tokens, web.requests_max) == (after.sources["web"].tokens, 1024)
    other = Settings(sources={"web": {"kind": "stdin"}})
    assert plan(before, other, validation_errors).needs_restart == ["sources.web"]


def test_keys_are_remembered_long_enough_for_each_server() -> None:
    settings = Settings(
        sources={
            "one": {"kind": "http", "listen": "127.0.0.1:1", "idempotency_ttl": "1h"},
            "two": {"kind": "http", "listen": "127.0.0.1:2", "idempotency_ttl": "2h"},
        }
    )
    rule = key_rule(settings)
    assert (rule.ttl, rule.shared) == (7200.0, True)
    assert key_rule(Settings(http={"idempotency_ttl": "3h"})).ttl == 10800.0


# -- a package from outside ------------------------------------------------------------------------

COUNTER = '''
import asyncio
import sys
from pathlib import Path
from pydantic import Field
from ingestd.base.append import Append
from ingestd.base.record import Records
from ingestd.config.sections import Section
from ingestd.execution.settings import ExecutorKind
from ingestd.journal.settings import JournalKind
from ingestd.sources.base import InputCounts, Source, SourceKind

class CounterSettings(Section):
    """`[counter]`."""
    upto: int = Field(3, ge=1, description="the last number that is counted")

class Counter(Source):
    def __init__(self, settings, intake):
        self.upto, self.intake, self.done = settings.upto, intake, 0
    async def start(self):
        self.task = asyncio.ensure_future(self.run())
    async def run(self):
        for number in range(1, self.upto + 1):
            await self.intake.accept(Append(Records.sized([b"%d" % number])))
            self.done = number
    def counts(self):
        return InputCounts(self.done, 0, self.done)
    async def wait_finished(self):
        await self.task
    async def stop_taking(self, deadline):
        self.task.cancel()
    async def close(self):
        self.task.cancel()

class CounterKind(SourceKind):
    settings = CounterSettings
    def problems(self, settings, **_):
        if settings.upto == 13:
            yield "upto", "brings bad luck"
    def build(self, settings, context):
        return Counter(settings, context.pipelines[context.pipeline])

class KeptSettings(Section):
    """`[journal.kept]`."""
    note: str = Field("", description="a word for the log")
    records_max: int = Field(100, ge=1, description="most records that are kept")

class KeptKind(JournalKind):
    settings = KeptSettings
    def problems(self, own):
        if own.note == "bad":
            yield "note", "is a bad word"
    def build(self, settings, context, own):
        from ingestd.journal.memory import MemoryJournal
        print(f"journal {own.note} {own.records_max} {settings.bytes_max}", file=sys.stderr)
        return MemoryJournal(bytes_max=settings.bytes_max, clock=context.clock)

class PoolSettings(Section):
    """`[executor.pool]`."""
    threads: int = Field(1, ge=1, description="threads of the pool")

class PoolKind(ExecutorKind):
    settings = PoolSettings
    def problems(self, own):
        if own.threads == 13:
            yield "threads", "bring bad luck"
    def build(self, own):
        from concurrent.futures import ThreadPoolExecutor
        print(f"executor {own.threads}", file=sys.stderr)
        return ThreadPoolExecutor(own.threads)

class Adder:
    def __init__(self, path: str):
        self.path = Path(path)
    def __call__(self, batch: list[int]) -> None:
        with self.path.open("a") as out:
            out.writelines(f"{number}\\n" for number in batch)
'''


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """A package with a component of each kind but endpoints, in a folder of its own."""
    folder = tmp_path / "site"
    info = folder / "counting-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "counting.py").write_text(COUNTER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ingestd.sources]\ncounter = counting:CounterKind\nbroken = counting:Nothing\n"
        "[ingestd.sinks]\nadder = counting:Adder\n"
        "[ingestd.journals]\nkept = counting:KeptKind\ngone = counting:Nothing\n"
        "[ingestd.executors]\npool = counting:PoolKind\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def ingestd(*args: str, cwd: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ingestd", *args],
        cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **environ},
    )  # fmt: skip


def test_a_source_and_a_sink_from_outside_are_used(tmp_path: Path, outside: dict[str, str]) -> None:
    out = tmp_path / "numbers"
    flags = ("adder", "--handler.options.path", str(out), "--source", "counter")
    with daemon(*flags, "--counter.upto", "5", cwd=tmp_path, environ=outside) as one:
        assert one.event("daemon_started")["source"] == "counter"
        assert one.wait() == 0
        assert one.event("drained")["processed"] == 5
    assert out.read_text().split() == ["1", "2", "3", "4", "5"]


def test_a_source_from_outside_runs_beside_others(tmp_path: Path, outside: dict[str, str]) -> None:
    out = tmp_path / "numbers"
    (tmp_path / "ingestd.toml").write_text(
        "[sources.few]\nkind = 'counter'\n[sources.many]\nkind = 'counter'\nupto = 7\n"
        f"[handler]\ntarget = 'adder'\noptions = {{ path = {json.dumps(str(out))} }}\n"
    )
    with daemon(cwd=tmp_path, environ=outside) as one:
        assert one.wait() == 0
    assert sorted(map(int, out.read_text().split())) == [1, 1, 2, 2, 3, 3, 4, 5, 6, 7]


def test_help_and_check_know_components_from_outside(
    tmp_path: Path, outside: dict[str, str]
) -> None:
    shown = ingestd("run", "--help", cwd=tmp_path, environ=outside).stdout
    assert f"--source {'|'.join(SOURCES.own)}|broken|counter" in shown
    assert "the last number that is counted [3]" in shown
    own, _, others = shown.partition("sinks: jsonl, ")[2].partition(", adder")
    assert "sqlite" in own
    assert others
    flags = ("--source", "counter", "--sources.more.kind", "counter", "--counter.upto", "4")
    told = ingestd("check", "adder", "--handler.options.path", "x", *flags,
                   cwd=tmp_path, environ=outside)  # fmt: skip
    assert told.returncode == 0, told.stderr
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert "counter.upto = 4 # flag --counter.upto" in lines
    assert "sources.more.upto = 3 # default" in lines
    assert "# default: adder is counting:Adder (executor: process)" in lines
    wrong = ingestd("check", *flags, "--sources.more.upto", "13", cwd=tmp_path, environ=outside)
    assert (wrong.returncode, wrong.stderr) == (
        78,
        "ingestd: sources.more.upto (flag --sources.more.upto): brings bad luck\n",
    )


@pytest.mark.parametrize("flags", [("--source", "broken"), ("--sources.x.kind", "broken")])
def test_a_source_that_cannot_be_imported_is_an_error_only_where_it_is_used(
    tmp_path: Path, outside: dict[str, str], flags: tuple[str, str]
) -> None:
    assert ingestd("check", cwd=tmp_path, environ=outside).returncode == 0
    told = ingestd("check", *flags, cwd=tmp_path, environ=outside)
    assert told.returncode == 78
    assert "the source 'broken' cannot be loaded from counting:Nothing" in told.stderr


def test_a_journal_and_an_executor_from_outside_have_settings_of_their_own(
    tmp_path: Path, outside: dict[str, str]
) -> None:
    out = tmp_path / "numbers"
    (tmp_path / "ingestd.toml").write_text(
        "[journal]\nkind = 'kept'\n[journal.kept]\nnote = 'hello'\n"
        "[executor]\nkind = 'pool'\n[executor.pool]\nthreads = 3\n"
        "[pipelines.other.journal.kept]\nrecords_max = 7\n"
        f"[handler]\ntarget = 'adder'\noptions = {{ path = {json.dumps(str(out))} }}\n"
    )
    with daemon("--source", "counter", cwd=tmp_path, environ=outside) as one:
        executors = one.event("daemon_started")["executors"]
        assert executors == {"default": "pool", "other": "pool"}
        assert one.wait() == 0
        assert one.other.count("executor 3") == 2
        assert [line for line in one.other if "journal" in line] == [
            "journal hello 100 8589934592",
            "journal hello 7 8589934592",
        ]
    assert sorted(map(int, out.read_text().split())) == [1, 2, 3]
    told = ingestd("check", cwd=tmp_path, environ=outside)
    assert told.returncode == 0, told.stderr
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    file = f"file {tmp_path}/ingestd.toml"
    assert f'journal.kept.note = "hello" # {file}' in lines
    assert "journal.kept.records_max = 100 # default" in lines
    assert 'pipelines.other.journal.kept.note = "hello" # as journal.kept.note' in lines
    assert f"pipelines.other.journal.kept.records_max = 7 # {file}" in lines
    assert "# default: adder is counting:Adder (executor: pool)" in lines


def test_help_shows_the_settings_of_journals_and_executors_from_outside(
    tmp_path: Path, outside: dict[str, str]
) -> None:
    shown = ingestd("run", "--help", cwd=tmp_path, environ=outside).stdout
    assert "most records that are kept [100]" in shown
    assert "--executor.pool.threads" in shown
    assert "--journal.kind sqlite|memory|jetstream|gone|kept" in shown


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--journal.kind", "kept", "--journal.kept.note", "bad"), "is a bad word"),
        (("--executor.kind", "pool", "--executor.pool.threads", "13"), "bring bad luck"),
        (("--executor.pool.threads", "0"), "should be at least 1"),
        (("--journal.kept.nte", "x"), "did you mean --journal.kept.note?"),
        (("--journal.gone.x", "1"), "unknown flag --journal.gone.x: the journal 'gone' cannot be"),
        (("--journal.kind", "gone"), "the journal 'gone' cannot be loaded from counting:Nothing"),
    ],
)
def test_mistakes_in_settings_of_journals_and_executors_from_outside(
    tmp_path: Path, outside: dict[str, str], flags: tuple[str, ...], problem: str
) -> None:
    told = ingestd("check", *flags, cwd=tmp_path, environ=outside)
    assert told.returncode in {2, 78}
    assert problem in told.stderr


def test_a_table_that_no_source_reads_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text(
        '[http]\nlisten = "127.0.0.1:1"\n[sources.s]\nkind = "syslog"\nlisten = "udp://127.0.0.1:0"\n'
    )
    told = ingestd("check", cwd=tmp_path, environ={})
    assert told.returncode == 0
    (line,) = told.stderr.splitlines()
    assert line.startswith("ingestd: warning: no source reads [http], because there are tables")
    (tmp_path / "ingestd.toml").write_text("[http]\nrequests_max = 7\n")
    flags = ("--sources.s.kind", "syslog", "--sources.s.listen", "udp://127.0.0.1:0")
    with Daemon(*flags, "--listen", "127.0.0.1:0", cwd=tmp_path) as one:
        assert one.event("settings_unread")["problem"].startswith("no source reads [http]")


def test_errors_of_a_named_source_name_its_own_keys(tmp_path: Path) -> None:
    flags = ("--sources.s.kind", "syslog", "--sources.s.listen", "udp://0.0.0.0:5514")
    told = ingestd("check", *flags, cwd=tmp_path, environ={})
    assert told.returncode == 78
    assert "set sources.s.allow_anonymous = true" in told.stderr
    assert "syslog.allow_anonymous" not in told.stderr.replace("sources.s", "")
