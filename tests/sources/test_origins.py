"""Each source says where its records came from, and the handler and `ingestd dead` can read it."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.__main__ import main
from ingestd.http.settings import KEPT_HEADERS_MAX
from ingestd.sources.http.endpoints.records import RecordsEndpoint
from tests.daemon.harness import ROOT, Daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

HANDLER = """
import json, ingestd
from msgspec.structs import asdict
def store(batch: ingestd.Batch[dict]) -> None:
    with open("calls", "a") as calls:
        for i, record in enumerate(batch):
            known = {name: value for name, value in asdict(batch.envelope(i)).items() if value}
            print(json.dumps([record["n"], known]), file=calls)
"""
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TOKEN = "t" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lib.py").write_text(HANDLER)
    return tmp_path


def start(folder: Path, *flags: str, **more: Any) -> Daemon:
    return Daemon("lib:store", "--data-dir", "data", *flags, cwd=folder, **more)


def origins(folder: Path, daemon: Daemon | None = None, count: int = 1) -> dict[int, Any]:
    """What the handler was told of each record, once there are so many."""
    deadline = time.monotonic() + 60
    while True:
        path = folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return dict(json.loads(line) for line in lines)
        assert time.monotonic() < deadline, daemon and daemon.events[-5:]
        time.sleep(0.02)


def letters(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["dead", "list", "--json", "--data-dir", str(folder / "data")]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_requests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ingestd.toml").write_text(
        '[http]\nkeep_headers = ["X-Tenant", "user-agent"]\nallow_anonymous = false\n'
        f'[http.tokens.shop]\ntoken = "{TOKEN}"\n'
        '[http.webhooks.github]\nkind = "github"\nsecret = "0123456789abcdef"\n'
    )
    body = b'{"n": 6}'
    signed = hmac.new(b"0123456789abcdef", body, hashlib.sha256).hexdigest()
    shop = {"Authorization": f"Bearer {TOKEN}"}
    with start(folder) as daemon:
        jsonl = {**shop, "Content-Type": "application/x-ndjson"}
        assert daemon.post(b'{"n": 1}\n{bad\n', **jsonl)[0] == 202
        assert daemon.post(b'{"n": 2}', **shop, traceparent=TRACE, X_TENANT="a")[0] == 202
        assert daemon.post(b'{"n": 3}', **shop, traceparent="nonsense", User_Agent="cu")[0] == 202
        # In pieces, as a stream.
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
        connection.request(
            "POST", "/v1/records", iter([b'{"n": 4}\n', b'{"n": 5}\n']),
            {**jsonl, "X-Tenant": "b"}, encode_chunked=True,
        )  # fmt: skip
        assert connection.getresponse().status == 202
        connection.close()
        github = {"X-Hub-Signature-256": f"sha256={signed}", "X-GitHub-Delivery": "d-1"}
        github |= {"X-GitHub-Event": "push", "Content-Type": "application/json"}
        assert daemon.request("POST", "/v1/webhooks/github", body, github)[0] == 202
        found = origins(folder, daemon, 6)
        daemon.terminate()
        assert daemon.wait() == 0
    usual = {"source": "http", "endpoint": "records", "client": "shop"}
    lines = {"content_type": "application/x-ndjson"}
    assert found == {
        1: usual | lines,
        2: usual | {"traceparent": TRACE, "headers": {"x-tenant": "a"}},
        3: usual | {"headers": {"user-agent": "cu"}},
        4: usual | lines | {"headers": {"x-tenant": "b"}},
        5: usual | lines | {"headers": {"x-tenant": "b"}},
        6: {
            "source": "http", "endpoint": "webhooks", "client": "github",
            "content_type": "application/json",
            "headers": {"x-github-event": "push", "x-github-delivery": "d-1"},
        },
    }  # fmt: skip
    (letter,) = letters(folder, capsys)
    assert (letter["reason"], letter["envelope"]) == ("malformed", usual | lines)


def test_dead_show_tells_the_origin_and_a_retry_gives_it_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "lib.py").write_text(
        HANDLER + "    if record.get('bad') and not __import__('os').path.exists('mended'):\n"
        "        batch.reject(i, 'no')\n"
    )
    keep = ("--http.keep_headers", "x-tenant")
    with start(folder, *keep) as daemon:
        assert daemon.post(b'{"n": 1, "bad": 1}', traceparent=TRACE, X_Tenant="a\tb")[0] == 202
        before = origins(folder, daemon)
        daemon.terminate()
        assert daemon.wait() == 0
    assert main(["dead", "show", "1", "--data-dir", str(folder / "data")]) == 0
    page = capsys.readouterr().out.splitlines()
    assert {
        "source    http", "endpoint  records", "header    x-tenant: a b",
        f"traceparent {TRACE}",
    } <= set(page)  # fmt: skip
    assert main(["dead", "show", "1", "--json", "--data-dir", str(folder / "data")]) == 0
    assert json.loads(capsys.readouterr().out)["envelope"] == before[1]
    assert main(["dead", "retry", "1", "--data-dir", str(folder / "data")]) == 0
    (folder / "calls").unlink()
    (folder / "mended").touch()
    with start(folder) as daemon:
        assert origins(folder, daemon) == before


def test_headers_that_are_kept_change_with_a_reload(folder: Path) -> None:
    config = folder / "ingestd.toml"
    config.write_text('[http]\nkeep_headers = ["x-one"]\n')
    with start(folder) as daemon:
        assert daemon.post(b'{"n": 1}', X_One="1", X_Two="2")[0] == 202
        config.write_text('[http]\nkeep_headers = ["x-two"]\n')
        daemon.terminate(signal.SIGHUP)
        daemon.event("reloaded")
        assert daemon.post(b'{"n": 2}', X_One="1", X_Two="2")[0] == 202
        found = origins(folder, daemon, 2)
    assert [found[n]["headers"] for n in (1, 2)] == [{"x-one": "1"}, {"x-two": "2"}]


@pytest.mark.parametrize(
    "name",
    [
        "Authorization", "proxy-authorization", "Cookie", "set-cookie2", "X-Hub-Signature-256",
        "Stripe-Signature", "webhook-signature", "X-API-Key", "apikey", "X-Gitlab-Token",
        "X-Auth-Secret", "X-Password", "a:b",
    ],
)  # fmt: skip
def test_a_header_that_holds_a_secret_is_refused_by_name(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "ingestd.toml").write_text(f"[http]\nkeep_headers = {json.dumps(['x-fine', name])}\n")
    assert main(["check", "lib:store"]) == 78
    error = capsys.readouterr().err
    assert "http.keep_headers" in error
    assert name in error
    assert "x-fine" not in error


def test_an_endpoint_can_not_keep_a_secret_either(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(RecordsEndpoint, "keep_headers", ("X-Fine", "X-Hub-Signature"))
    assert main(["check", "lib:store"]) == 78
    assert "endpoint records: X-Hub-Signature is not kept" in capsys.readouterr().err


def test_so_many_headers_are_kept_at_most(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    names = " ".join(f"x-{n}" for n in range(KEPT_HEADERS_MAX + 1))
    assert main(["check", "lib:store", "--http.keep_headers", names]) == 78
    assert "http.keep_headers" in capsys.readouterr().err


def test_lines_of_standard_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "ingestd", "run", "lib:store", "--source", "stdin"]
    command += ["--data-dir", "data", "--admin.listen", "127.0.0.1:0"]
    done = subprocess.run(
        command, cwd=folder, input=b'{"n": 1}\n{bad\n', capture_output=True, timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert origins(folder) == {1: {"source": "stdin"}}
    assert letters(folder, capsys)[0]["envelope"] == {"source": "stdin"}


class Feed(BaseHTTPRequestHandler):
    """Answers with lines, some of them blank and one that is no record."""

    def do_GET(self) -> None:
        body = b'{"n": 1}\n\n{bad\n{"n": 4}\n\r\n{"n": 6}'
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_lines_of_a_download_under_the_name_of_their_source(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Feed)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/feed"
        (folder / "ingestd.toml").write_text(
            f'[sources.feed]\nkind = "fetch"\nallow_private = true\nurls = ["{url}?key=hidden"]\n'
        )
        with start(folder) as daemon:
            assert daemon.wait() == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    known = {"source": "feed", "content_type": "application/x-ndjson"}
    line = {n: known | {"attributes": {"url": f"{url}?…", "line": n}} for n in (1, 3, 4, 6)}
    assert origins(folder) == {n: line[n] for n in (1, 4, 6)}
    (letter,) = letters(folder, capsys)
    assert letter["envelope"] == line[3]
