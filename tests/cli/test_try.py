"""`ingestd try`: a handler on the records of files; real processes, and a terminal."""

from __future__ import annotations

import gzip
import json
import os
import pty
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.cli.test_cli import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import asyncio, time
import ingestd
from ingestd import Batch

def store(batch: list[dict]) -> None:
    for record in batch:
        if record["n"] == 77:
            raise ValueError("seventy-seven")
    print("stored", len(batch), flush=True)

def choose(batch: Batch[dict]) -> None:
    batch.reject(3, "too small")
    batch.retry(4)

def typed(batch: list[int]) -> None: ...

def later(batch: list[dict]) -> None:
    raise ingestd.Retry("not now")

def down(batch: list[dict]) -> None:
    raise ConnectionError("no database")

def stop(batch: list[dict]) -> None:
    breakpoint()

class Slow:
    def __init__(self) -> None:
        print("hangs", flush=True)
        time.sleep(600)
    def __call__(self, batch: list[dict]) -> None: ...

def hang(batch: list[dict]) -> None:
    print("hangs", flush=True)
    time.sleep(600)

def double(record: dict) -> list[dict]:
    return [record, record]

class Store:
    def __init__(self, table: str) -> None:
        self.table = table
    async def __call__(self, batch: Batch[dict]) -> None:
        await asyncio.sleep(0)
        print("into", self.table, len(batch), batch.attempt, flush=True)
    async def close(self) -> None:
        print("closed", flush=True)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    lines = b"".join(b'{"n": %d}\n' % n for n in range(120))
    (tmp_path / "good.ndjson").write_bytes(lines)
    (tmp_path / "more.ndjson.gz").write_bytes(gzip.compress(b'{"n": 1}\n\n{\n{"n": 2}'))
    return tmp_path


def attempt(*arguments: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "ingestd", "try", *arguments],
        cwd=cwd, capture_output=True, text=True, input=text, timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_bad_record_is_found_and_its_traceback_is_shown_once(here: Path) -> None:
    run = attempt("app:store", "good.ndjson", "--batch.records_max", "50", cwd=here)
    assert run.returncode == 1
    assert run.stderr.count('raise ValueError("seventy-seven")') == 1
    assert "good.ndjson record 78: failed: ValueError: seventy-seven\n" in run.stdout
    assert "batch 1: 50 done in " in run.stdout
    assert "batch 2: 49 done, 1 failed in " in run.stdout
    assert "all records: 119 done, 1 failed; 3 batches, " in run.stdout
    assert "records/s in the handler" in run.stdout
    assert run.stdout.startswith("stored 50\n")
    assert not (here / "ingestd-data").exists()


def test_outcomes_as_json_over_several_files(here: Path) -> None:
    files = ("good.ndjson", "more.ndjson.gz", "-")
    run = attempt("app:choose", *files, "--json", "--limit", "123", cwd=here, text="[7]\n[8]\n")
    assert run.returncode == 1
    told = json.loads(run.stdout)
    assert [told[key] for key in ("records", "done", "invalid", "rejected", "retry", "failed")] == [
        123, 120, 1, 1, 1, 0,
    ]  # fmt: skip
    assert (told["batches"], told["seconds"] > 0) == (1, True)
    problems = [(one["file"], one["record"], one["outcome"]) for one in told["problems"]]
    assert sorted(problems) == [
        ("good.ndjson", 4, "rejected"), ("good.ndjson", 5, "retry"),
        ("more.ndjson.gz", 2, "invalid"),
    ]  # fmt: skip


def test_records_that_do_not_fit_the_annotation(here: Path) -> None:
    run = attempt("app:typed", "-", "--format", "json", cwd=here, text='1\n"a"\n2\n')
    assert "- record 2: rejected: Expected `int`, got `str`" in run.stdout
    assert "all records: 2 done, 1 rejected; 1 batch," in run.stdout
    assert attempt("app:typed", "-", cwd=here, text="1\n").returncode == 0


def test_what_fails_as_a_whole_costs_a_bounded_number_of_calls(here: Path) -> None:
    run = attempt("app:down", "good.ndjson", "--json", cwd=here)
    told = json.loads(run.stdout)
    assert (told["failed"], len(told["problems"])) == (120, 20)
    assert run.stderr.count("ConnectionError: no database") == 1
    assert "… and 100 more" in attempt("app:down", "good.ndjson", cwd=here).stdout
    run = attempt("app:later", "good.ndjson", cwd=here)
    assert "retry: not now, with 119 more of its batch\nall records: 120 retry" in run.stdout


def test_the_handler_that_is_named_is_called_whatever_a_pipeline_has(here: Path) -> None:
    """A configuration names the handlers of production: `try` must not call them instead."""
    (here / "own.toml").write_text('[pipelines.own.handler]\ntarget = "app:down"\n')
    files = ("good.ndjson", "--limit", "9", "--config", "own.toml")
    run = attempt("app:store", *files, "--pipeline", "own", cwd=here)
    assert (run.returncode, run.stdout.splitlines()[0]) == (0, "stored 9")
    (here / "own.toml").write_text('[handler]\ntargets = ["app:down"]\n')
    run = attempt("app:store", *files, cwd=here)
    assert run.returncode == 78
    assert run.stderr == (
        "ingestd: handler.target (argument HANDLER):"
        " app:store would get nothing, as handler.targets is set too\n"
    )
    (here / "own.toml").write_text('[pipelines.own.handler]\ntargets = ["app:down"]\n')
    run = attempt("app:store", *files, "--pipeline", "own", cwd=here)
    assert (run.returncode, run.stdout.splitlines()[0]) == (0, "stored 9")


def test_a_file_that_is_missing_is_told_before_the_handler_is_called(here: Path) -> None:
    flags = ("--batch.records_max", "50")
    run = attempt("app:store", "good.ndjson", "gone.ndjson", *flags, cwd=here)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "ingestd: gone.ndjson: No such file or directory\n"


def test_what_was_done_before_a_file_that_is_damaged_is_told(here: Path) -> None:
    whole = (here / "more.ndjson.gz").read_bytes()
    (here / "more.ndjson.gz").write_bytes(whole[:-9])
    flags = ("--batch.records_max", "120", "--limit", "200")
    run = attempt("app:choose", "good.ndjson", "more.ndjson.gz", *flags, cwd=here)
    assert run.returncode == 2
    assert "all records: 118 done, 1 invalid, 1 rejected, 1 retry; 1 batch," in run.stdout
    assert "ingestd: more.ndjson.gz: the gzip body is not valid: it is cut off" in run.stderr


def test_a_module_may_change_the_folder(here: Path) -> None:
    (here / "away.py").write_text("import os\nos.chdir('/')\ndef store(batch): ...\n")
    run = attempt("away:store", "good.ndjson", cwd=here)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_limit_is_at_least_one_record(here: Path) -> None:
    run = attempt("app:store", "good.ndjson", "--limit", "-3", cwd=here)
    assert (run.returncode, run.stdout) == (2, "")
    assert "argument --limit: should be at least 1" in run.stderr


def test_a_file_that_is_no_lines_is_told_what_makes_lines_of_it(here: Path) -> None:
    (here / "packed.ndjson").write_bytes(gzip.compress(b'{"n": 1}\n'))
    (here / "pretty.json").write_text('{\n  "n": 1\n}\n')
    run = attempt("app:store", "packed.ndjson", "pretty.json", "good.ndjson", cwd=here)
    packed, pretty = [line for line in run.stderr.splitlines() if line.startswith("ingestd:")]
    assert packed == "ingestd: packed.ndjson: it is compressed (gzip), advice: zcat FILE |"
    assert pretty.startswith("ingestd: pretty.json: it is JSON over several lines, advice: jq -c")


def test_options_transform_and_coroutines(here: Path) -> None:
    flags = ("--handler.options.table", "t", "--handler.transform", "app:double")
    run = attempt("app:Store", "good.ndjson", *flags, cwd=here)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("into t 240 1\n")
    assert "closed\nall records: 120 done; 1 batch," in run.stdout


def test_a_sink_writes(here: Path) -> None:
    run = attempt("sqlite", "good.ndjson", "--handler.options.path", str(here / "x.db"), cwd=here)
    assert (run.returncode, run.stderr) == (0, "")
    assert (here / "x.db").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "name a HANDLER and at least one FILE"),
        (("app:store",), 2, "name a HANDLER and at least one FILE"),
        (("app:store", "gone"), 2, "gone: No such file or directory"),
        (("app:store", "."), 2, ".: Is a directory"),
        (("app:stor", "good.ndjson"), 78, "did you mean 'store'?"),
        (("app:store", "good.ndjson", "--limt", "1"), 2, "did you mean --limit?"),
        (("app:store", "good.ndjson", "--pipeline", "x"), 2, "there is no pipeline 'x'"),
        (("app:Store", "good.ndjson"), 78, "table"),
        (("app:store", "app.py.gz"), 2, "app.py.gz: the gzip body is not valid"),
    ],
)
def test_mistakes(here: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    (here / "app.py.gz").write_text(APP)
    run = attempt(*arguments, cwd=here)
    assert (run.returncode, says in run.stderr) == (code, True), run.stderr
    assert "Traceback" not in run.stderr


def test_the_debugger_and_ctrl_c_in_a_terminal(here: Path) -> None:
    for target, keys, says in (
        ("app:stop", b"p len(batch)\nq\n", b"120\r\n"),
        ("app:hang", b"\x03", b"hangs"),
        ("app:Slow", b"\x03", b"hangs"),
    ):
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "ingestd", "try", target, "good.ndjson"],
            cwd=here, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        ) as process:  # fmt: skip
            os.close(theirs)
            seen = b""
            try:
                while b"(Pdb)" not in seen and b"hangs" not in seen:
                    seen += os.read(ours, 4096)
                if keys == b"\x03":
                    time.sleep(0.1)
                    process.send_signal(signal.SIGINT)
                else:
                    os.write(ours, keys)
                assert process.wait(60) == 1
                while b"interrupted" not in seen:
                    seen += os.read(ours, 4096)
            finally:
                process.kill()
                os.close(ours)
        assert says in seen
        assert seen.count(b"(Pdb)") <= 2
