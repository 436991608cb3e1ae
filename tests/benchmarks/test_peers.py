"""Peers that others wrote: found or not, asked, and measured where they are installed."""

from __future__ import annotations

import json
import os
import stat
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest
import yaml

from benchmarks.__main__ import main
from benchmarks.cells import cells_of
from benchmarks.peers import PROGRAMS, all_peers
from benchmarks.peers.agents import FluentBit, Vector
from benchmarks.peers.base import Counts, sample
from benchmarks.peers.logprep import Logprep
from benchmarks.peers.ours import IngestdPair
from benchmarks.processes import running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

NAMES = [program.name for program in PROGRAMS]
SINK = """\
import socket, sys, time, pathlib
listening = socket.socket(socket.AF_UNIX)
listening.bind("in.sock")
listening.listen()
stream, _ = listening.accept()
with open("out", "wb") as out:
    while block := stream.recv(65536):
        out.write(block); out.flush()
time.sleep(300)
"""
"""A daemon that takes a stream into a file and stays, as rsyslogd does."""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_who_is_missing_is_listed_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = [f"--{name}={tmp_path / 'nowhere'}" for name in NAMES]
    directory = ["--directory", str(tmp_path / "disk")]
    quick = ["--rounds", "1", "--lines", "1000", "--only", "stdin-file/loop"]
    assert main([*nowhere, *directory, *quick]) == 0
    lines = {
        line.split("|")[1].strip(): line
        for line in capsys.readouterr().out.splitlines()
        if "|" in line
    }
    for name in NAMES:
        assert "nowhere not found" in lines[name]
    assert "not run by us" in lines["vector"]
    assert "not run by us" not in lines["logprep"]


def test_everybody_says_what_a_yes_means_and_how_it_is_set() -> None:
    peers = all_peers()
    assert len({peer.name for peer in peers}) == len(peers)
    for peer in peers:
        assert peer.accepted
        assert "\n" not in peer.settings(1.0)
    measured = {peer.name for _, peer in cells_of(peers)}
    assert {"ingestd", "loop"} <= measured
    assert not any(peer.missing() for peer in peers if peer.name in measured)


def test_a_program_is_asked_for_its_version(tmp_path: Path) -> None:
    told = program(tmp_path / "vector", "#!/bin/sh\necho vector 0.50.1 '(x86_64)'\n")
    assert Vector(str(told)).version() == "0.50.1"
    both = program(
        tmp_path / "logprep", "#!/bin/sh\necho 'python version: 3.11.7\nlogprep version: 21.1.0'\n"
    )
    assert Logprep(str(both)).version() == "21.1.0"
    silent = program(tmp_path / "fluent-bit", "#!/bin/sh\nexit 1\n")
    assert FluentBit(str(silent)).version() == "unknown"


def test_configurations_can_be_read(tmp_path: Path) -> None:
    for name in ("logprep", "fluent-bit", "vector"):
        program(tmp_path / name, "#!/bin/sh\n")
        (tmp_path / f"{name}-data").mkdir()

    vector = Vector(str(tmp_path / "vector")).service(tmp_path / "vector-data", 1.0)
    config = tomllib.loads((tmp_path / "vector-data" / "vector.toml").read_text())
    assert config["sources"]["door"]["address"] == f"127.0.0.1:{vector.port}"
    assert config["sinks"]["nowhere"]["buffer"]["type"] == "disk"

    logprep = Logprep(str(tmp_path / "logprep")).service(tmp_path / "logprep-data", 1.0)
    config = yaml.safe_load((tmp_path / "logprep-data" / "pipeline.yml").read_text())
    assert config["input"]["door"]["uvicorn_config"]["port"] == logprep.port
    assert config["metrics"]["port"] == logprep.status[0].port

    fluent = FluentBit(str(tmp_path / "fluent-bit")).service(tmp_path / "fluent-bit-data", 1.0)
    text = (tmp_path / "fluent-bit-data" / "fluent-bit.conf").read_text()
    settings = [line.split() for line in text.splitlines() if line.startswith(" ")]
    assert ["port", str(fluent.port)] in settings
    assert ["storage.sync", "full"] in settings
    assert fluent.content_type == "application/json"


def test_pages_are_counted() -> None:
    page = b"""# HELP taken_total what was taken
# TYPE taken_total counter
taken_total{component="input",pid="1"} 10.0
taken_total{component="input",pid="2"} 5
taken_total{component="output",pid="1"} 7.0
taken_total_created{component="input"} 1.7e9
"""
    assert sample(page, "taken_total", 'component="input"') == 15
    assert sample(page, "taken_total") == 22
    labels = 'component="input",name="door"'
    page = (
        f"logprep_number_of_processed_events_total{{{labels}}} 40.0\n"
        f"logprep_message_backlog_size{{{labels}}} 2.0\n"
    ).encode()
    assert Logprep().counts(page) == Counts(42, 40)
    numbers = {
        "input": {"door": {"records": 9, "bytes": 90}},
        "output": {"out": {"proc_records": 7, "dropped_records": 1}},
    }
    assert FluentBit().counts(json.dumps(numbers).encode()) == Counts(9, 7, 1)


def test_a_pair_shares_its_port_and_nothing_else(tmp_path: Path) -> None:
    pair = IngestdPair().service(tmp_path, 1.0)
    assert len(pair.commands) == len(pair.ready) == len(pair.status) == 2
    listens = [each.argv[each.argv.index("--listen") + 1] for each in pair.commands]
    assert listens == [f"127.0.0.1:{pair.port}"] * 2
    for option in ("--admin.listen", "--data-dir"):
        values = {each.argv[each.argv.index(option) + 1] for each in pair.commands}
        assert len(values) == 2
    assert len({each.folder for each in pair.commands}) == 2


def test_a_pipe_is_moved_into_a_daemon_that_is_ended_after_it(tmp_path: Path) -> None:
    sink = tmp_path / "sink.py"
    sink.write_text(SINK)
    feeder = [sys.executable, "-m", "benchmarks.peers.rsyslog_stdin", "in.sock", "out"]
    reading, writing = os.pipe()
    payload = b"a line\n" * 100_000
    with running([*feeder, sys.executable, str(sink)], tmp_path, reading) as child:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(payload)
        assert child.wait(60) == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "out").read_bytes() == payload


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("logprep", "http-100"),
        ("fluent-bit", "http-100"),
        ("syslog-ng", "stdin-pipe"),
        ("rsyslog", "stdin-pipe"),
    ],
)
def test_who_is_installed_is_measured(tmp_path: Path, name: str, cell: str) -> None:
    (peer,) = [peer for peer in all_peers() if peer.name == name]
    if peer.missing():
        pytest.skip(peer.missing())
    written = tmp_path / "out.json"
    quick = ["--rounds", "1", "--lines", "5000", "--seconds", "0.3", "--load", "python"]
    where = ["--directory", str(tmp_path / "disk"), "--json", str(written)]
    assert main([*quick, *where, "--only", f"{cell}/{name}"]) == 0
    result = json.loads(written.read_text())
    assert result["runs"][0]["rate"] > 0
    assert result["versions"][name][0].isdigit()
