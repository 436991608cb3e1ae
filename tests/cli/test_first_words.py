"""Small mistakes on a command line: an early Ctrl-C, two sources, an empty table, a used port."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.base.errors import AddressError
from ingestd.cli.output import number_of
from ingestd.host.sockets import listen_fault
from ingestd.http.listener import bind
from tests.cli.test_cli import ROOT

if TYPE_CHECKING:
    from pathlib import Path

INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None, at=sys.argv.pop(1)):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from ingestd.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["ingestd.base.errors", "ingestd.cli.output", "argparse", "ingestd.cli.token"]
)
def test_ctrl_c_while_it_imports_is_one_line(module: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED, module, "token"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "ingestd: interrupted\n"


def test_two_kinds_of_source_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--source", "http", "--source.kind=forward"]) == 2
    said = capsys.readouterr().err
    assert "--source.kind http and forward: it chooses one source" in said
    assert "[sources.NAME]" in said
    assert main(["check", "--source", "http", "--source", "http"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu", "app:x"], "unknown command 'rnu', did you mean run?"),
        (["frobnicate"], "unknown command 'frobnicate', there are run, check, dev, try, prove"),
        (["dead", "show", "x"], "'x' is not a whole number"),
        (["dead", "lsit"], "unknown action 'lsit', did you mean list?"),
        (["run", "--port", "80"], "unknown flag --port, did you mean --listen?"),
        (["dev", "--host=0.0.0.0"], "unknown flag --host, did you mean --listen?"),
        (["dead", "list", "--where", "x"], "unknown flag --where (see ingestd dead list --help)"),
        (["peek", "--were", "a=1"], "unknown flag --were, did you mean --where?"),
        (["peek", "--where", "x"], "'x' is no condition: one is KEY=VALUE"),
    ],
)
def test_a_wrong_word_is_told_with_the_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ingestd: ")
    assert said in line


def test_counts_have_their_number() -> None:
    assert [number_of(n, "dead letter") for n in (0, 1, 2)] == [
        "0 dead letters", "1 dead letter", "2 dead letters",
    ]  # fmt: skip


def test_help_shows_lists_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "['" not in told
    assert "[tcp://127.0.0.1:5514, udp://127.0.0.1:5514]" in told
    common, _, others = told.partition(" settings: each as")
    assert "--batch.age_max TIME" in common
    assert "--batch.age_max" not in others
    assert "settings: each as a flag (--batch.records_max 500), as a variable" in told


@pytest.mark.parametrize("table", ["", 'label = "x"\n'])
def test_an_endpoint_without_a_pipeline_is_a_warning(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ingestd.toml").write_text(f"[http.endpoints.loki]\n{table}")
    assert main(["check"]) == 0
    warning = "http.endpoints.loki: the endpoint is off, because its table has no pipeline"
    warning += " (set http.endpoints.loki.pipeline)\n"
    assert f"warning: {warning}" in capsys.readouterr().err
    (tmp_path / "ingestd.toml").write_text('[http.endpoints.loki]\npipeline = ""\n')
    assert main(["check"]) == 0
    assert capsys.readouterr().err == ""


async def test_a_used_port_is_said_in_the_same_words_everywhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        with pytest.raises(OSError, match="in use") as caught:
            await bind("127.0.0.1", port, 5)
    words = "address already in use; another program has it: choose another address"
    assert listen_fault(caught.value).startswith(words)
    assert listen_fault(caught.value, "; or share").endswith("; or share")
    assert listen_fault(ValueError("no")) == "no"
    assert "below 1024 needs root or" in listen_fault(PermissionError(errno.EACCES, "x"))
    away = listen_fault(OSError(errno.EADDRNOTAVAIL, "x"))
    assert away.endswith("; no network interface of this machine has it")
    error = AddressError(address="x:1", setting="http.listen", problem=listen_fault(caught.value))
    assert words in str(error)
