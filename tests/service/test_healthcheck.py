"""`ingestd healthcheck`, at the real daemon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ingestd.cli.healthcheck import reachable
from tests.daemon.harness import ROOT, daemon
from tests.service.tools import listening

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def check(*arguments: str, cwd: Path, **environ: str) -> tuple[int, str, str]:
    """What it says; it waits for a minute if nothing else is said."""
    if "--timeout" not in arguments:
        arguments = ("--timeout", "60s", *arguments)
    env = {k: v for k, v in os.environ.items() if not k.startswith("INGESTD_")}
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "healthcheck", *arguments], cwd=cwd,
        env={**env, "PYTHONPATH": str(ROOT), **environ}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_ready_draining_and_gone(tmp_path: Path) -> None:
    with daemon("--drain.delay", "1h", cwd=tmp_path) as one:
        where = {"INGESTD_ADMIN__LISTEN": f"0.0.0.0:{one.admin_port}"}
        assert check(cwd=tmp_path, **where) == (0, "", "")
        one.terminate()
        one.event("drain_started")
        code, out, said = check(cwd=tmp_path, **where)
        assert (code, out, said) == (1, "", "ingestd: /readyz is 503: draining\n")
        assert check("--live", cwd=tmp_path, **where) == (0, "", "")
        one.terminate()
        one.wait()
    code, out, said = check("--live", cwd=tmp_path, **where)
    assert (code, out) == (1, "")
    assert said.count("\n") == 1
    assert "no answer from 0.0.0.0:" in said
    assert "refused; start the daemon, or name its admin address with --admin.listen\n" in said


def test_who_does_not_answer_in_time(tmp_path: Path) -> None:
    with listening() as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        code, _, said = check("--timeout", "100ms", "--admin.listen", address, cwd=tmp_path)
    assert (code, said) == (1, f"ingestd: no answer from {address}: timed out\n")


def test_who_answers_something_else(tmp_path: Path) -> None:
    import threading

    with listening() as odd:

        def answer() -> None:
            sock, _ = odd.accept()
            sock.recv(4096)
            sock.sendall(b"SSH-2.0-x\r\n")
            sock.close()

        other = threading.Thread(target=answer)
        other.start()
        address = f"127.0.0.1:{odd.getsockname()[1]}"
        code, _, said = check("--admin.listen", address, cwd=tmp_path)
        other.join()
    assert code == 1
    assert said.count("\n") == 1


def test_a_file_that_is_being_edited_makes_nobody_ill(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as one:
        (tmp_path / "ingestd.toml").write_text(
            f'[admin]\nlisten = ":{one.admin_port}"\n[batch]\nrecords_max = "seve'
        )
        address = f":{one.admin_port}"
        assert check("--admin.listen", address, cwd=tmp_path)[0] == 0
        (tmp_path / "ingestd.toml").write_text(
            f'[admin]\nlisten = "{address}"\n[batch]\nrecords_max = -7\nnonsense = 1\n'
        )
        assert check(cwd=tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("listen", "reached"),
    [
        ("127.0.0.1:8081", ("127.0.0.1", 8081)),
        ("0.0.0.0:8081", ("127.0.0.1", 8081)),
        (":8081", ("127.0.0.1", 8081)),
        ("[::]:8081", ("::1", 8081)),
        ("10.1.2.3:8081", ("10.1.2.3", 8081)),
        ("localhost:8081", ("localhost", 8081)),
    ],
)
def test_where_it_asks(listen: str, reached: tuple[str, int]) -> None:
    assert reachable(listen) == reached


@pytest.mark.parametrize("listen", ["", ":0", "8081", "nonsense"])
def test_where_it_can_not_ask(listen: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        reachable(listen)


def test_it_asks_no_proxy(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        said = check("--admin.listen", address, cwd=tmp_path, **proxies)[2]
    assert "Connection refused" in said
