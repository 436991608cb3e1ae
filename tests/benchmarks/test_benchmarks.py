"""The benchmark runs, counts what it says it counts, and leaves nothing behind. Never a speed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.cells import choose, rotated
from benchmarks.measure import Run, check
from benchmarks.peers.base import Counts
from benchmarks.processes import ROOT, Failed
from benchmarks.report import as_json, rate_table
from benchmarks.results import Result, problems

pytestmark = pytest.mark.slow

QUICK = ("--rounds", "1", "--age", "0.1", "--lines", "3000")


def quick(tmp_path: Path, *arguments: str) -> int:
    return main([*QUICK, "--directory", str(tmp_path / "disk"), *arguments])


def rows(table: str) -> dict[tuple[str, str], list[str]]:
    """The first two cells to the others, of a table's lines."""
    lines = [line[1:-1].split("|") for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return {(first, second): others for first, second, *others in cells}


@pytest.mark.slow
def test_a_run_prints_its_tables_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi", reason="a baseline needs fastapi")
    pytest.importorskip("uvicorn", reason="a baseline needs uvicorn")
    written = tmp_path / "out.json"
    picture = tmp_path / "out.svg"
    peers = ("ingestd", "loop", "fastapi")
    only = [f"--only={scenario}/{peer}" for scenario in ("http-100", "stdin-*") for peer in peers]
    only += ["--only=start", "--only=journal", f"--picture={picture}"]
    code = quick(tmp_path, "--seconds", "1", "--load", "python", "--json", str(written), *only)
    out = capsys.readouterr().out
    assert code == 0, out

    table = rows(out.partition("\n\n")[0])
    head = ["on disk before the yes", "records/s", "ingestd ÷ it"]
    assert table.pop(("scenario", "peer")) == head
    del table[("-" * len("stdin-file"), "-" * len("fastapi"))]
    measured = [("http-100", peer) for peer in peers]
    measured += [(source, p) for source in ("stdin-file", "stdin-pipe") for p in peers[:2]]
    assert list(table) == measured
    for (_, peer), (on_disk, rate, times) in table.items():
        assert on_disk == ("yes" if peer == "ingestd" else "no")
        assert re.fullmatch(r"[\d,]+", rate)
        assert re.fullmatch(r"[\d.]+", times) if peer != "ingestd" else not times
    for fact in ("CPU", "kernel", "file system", "Python", "SQLite", "aiohttp", "stdin"):
        assert f"- {fact}: " in out

    result = json.loads(written.read_text())
    assert set(result) == {"machine", "versions", "settings", "summary", "bars", "runs"}
    assert len(result["summary"]) == 3 + 2 + 2
    assert all(not one["problem"] for one in result["runs"])
    assert picture.read_text().startswith("<svg ")
    starts = [one["figures"]["ready"] for one in result["runs"] if one["scenario"] == "start"]
    assert len(starts) >= len(peers)
    assert all(0 < seconds < 300 for seconds in starts)
    (journal,) = [one["figures"] for one in result["runs"] if one["scenario"] == "journal"]
    assert journal["share"] == pytest.approx(journal["journal"] / journal["plain"])
    judged = {bar["bar"]: bar for bar in result["bars"]}
    assert isinstance(judged["exec to ready, a thread for the handler"]["met"], bool)
    assert judged["single records, or ÷ fastapi"] == {
        "bar": "single records, or ÷ fastapi",
        "wanted": "≥ 3 \N{MULTIPLICATION SIGN}",
        "median": None,
        "met": None,
    }
    runs = [one for one in result["runs"] if one["run"]]
    assert len(runs) == 3 + 2 + 2
    for one in runs:
        assert one["rate"] == min(one["run"]["accepted"], one["run"]["processed"]) > 0
        assert one["run"]["refused"] == 0
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
@pytest.mark.slow
def test_wrk_makes_the_load_where_it_is_installed(tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    only = ("--only", "http-1/ingestd")
    assert quick(tmp_path, "--seconds", "1", "--json", str(written), *only) == 0
    result = json.loads(written.read_text())
    assert result["settings"]["load"].startswith("wrk")
    assert result["versions"]["wrk"]
    assert result["runs"][0]["rate"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_child(tmp_path: Path, number: signal.Signals) -> None:
    only = ("--only", "http-1/loop", "--seconds", "300", "--load", "python")
    command = [sys.executable, "-m", "benchmarks", *QUICK, "--directory", str(tmp_path), *only]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as benchmark:
        try:
            children = wait_for_children(benchmark.pid, "benchmarks.web_aiohttp", "benchmarks.load")
            benchmark.send_signal(number)
            assert benchmark.wait(60) == 128 + number
        finally:
            benchmark.kill()
    deadline = time.monotonic() + 60  # they were told to end, and may still be at it
    while time.monotonic() < deadline and any(
        Path(f"/proc/{child}").exists() for child in children
    ):
        time.sleep(0.02)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert list(tmp_path.iterdir()) == []


def wait_for_children(parent: int, *modules: str) -> list[int]:
    """The children of a process, as soon as each of the modules runs in one of them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        running = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in pids]
        if all(any(module.encode() in words for words in running) for module in modules):
            return [int(pid) for pid in pids]
        time.sleep(0.02)
    raise AssertionError(f"{modules} did not all run")


def test_another_peer_begins_each_round() -> None:
    cells = choose(["stdin-file", "http-1/*"])
    orders = [[f"{s.name}/{p.name}" for s, p in rotated(cells, number)] for number in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0][-2:] == ["stdin-file/ingestd", "stdin-file/loop"]
    assert orders[1][-2:] == ["stdin-file/loop", "stdin-file/ingestd"]
    assert orders[0][0] == "http-1/ingestd"
    assert orders[1][0] == "http-1/loop"


def test_what_names_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "http-2"])
    assert "http-100/ingestd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "counts",
    [Counts(100, 99), Counts(99, 99), Counts(100, 99, dead=1)],
    ids=["backlog", "fewer than the clients were told", "given up"],
)
def test_a_run_that_lost_something_does_not_count(counts: Counts) -> None:
    check(Counts(100, 100), at_least=100)
    check(Counts(101, 101), at_least=100)  # one more was on its way when the load ended
    with pytest.raises(Failed):
        check(counts, at_least=100)


def run(rate: float) -> Run:
    return Run(accepted=rate * 2, processed=rate, seconds=1.0)


def test_the_tables_give_medians_and_ratios_round_by_round() -> None:
    results = [
        Result(number, "http-1", peer, run(rate))
        for number, ours, theirs in ((1, 100, 10), (2, 300, 100), (3, 200, 100))
        for peer, rate in (("ingestd", ours), ("loop", theirs))
    ]
    results.append(Result(4, "http-1", "ingestd", None, "exit code 1"))
    results.append(Result(4, "http-1", "loop", run(1)))
    table = rows(rate_table(results))
    assert table["http-1", "ingestd"] == ["yes", "200 (100 to 300)", ""]
    assert table["http-1", "loop"] == ["no", "55 (1 to 100)", "3.00"]
    assert problems(results) == ["round 4, http-1, ingestd: exit code 1"]
    ours, theirs = as_json(results, {})["summary"]
    assert ours["runs"] == 3
    assert ours["rate"] == {"median": 200, "low": 100, "high": 300}
    assert theirs["ingestd_times_as_fast"] == 3.0
