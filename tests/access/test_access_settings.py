"""Credentials of clients, as settings: every layer, every mistake, and no secret in any output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ingestd.config.network import is_loopback
from ingestd.http.credentials import hash_of, make_token
from ingestd.http.settings import HttpSettings
from ingestd.settings import Settings
from tests.access.tools import LOGS, NEXT, SHOP, Files
from tests.daemon.harness import daemon

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # most start the program
HASH = hash_of(SHOP)


def ingestd(*arguments: str, cwd: Path, stdin: str = "", **environ: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-m", "ingestd", *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environ,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in run.stderr
    return run


def test_each_layer_has_a_way_to_write_a_token_and_check_masks_all(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text(
        f'http.tokens.file.token = "{SHOP}"\n'
        'http.webhooks.hub = {kind = "github", secret = "hunter2 hunter2 hunter2"}\n'
        "[pipelines.logs]\n"
    )
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "ingestd_http__tokens__credential__token").write_text(f"{LOGS}\n")
    (credentials / "ingestd_http__tls__key_password").write_text("hunter3")
    run = ingestd(
        "check", "--http.tokens.flag.token", NEXT, "--http.tokens.flag.pipelines=logs, default",
        cwd=tmp_path, CREDENTIALS_DIRECTORY=str(credentials),
        INGESTD_HTTP__TOKENS__SHOP__TOKEN="environment-token-0123456789",
        INGESTD_HTTP__TOKENS__SHOP__RECORDS_PER_SECOND="50",
        INGESTD_HTTP__TOKENS__SHOP__BYTES_PER_SECOND="2MiB",
        INGESTD_HTTP__WEBHOOKS__HUB__TOLERANCE="1m",
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    lines = {line.split(" = ")[0]: line.split(" = ", 1)[1] for line in run.stdout.splitlines()
             if " = " in line}  # fmt: skip
    for name, origin in (
        ("file", "file "), ("flag", "flag --http.tokens.flag.token"),
        ("credential", "secret "), ("shop", "env INGESTD_HTTP__TOKENS__SHOP__TOKEN"),
    ):  # fmt: skip
        assert lines[f"http.tokens.{name}.token"].startswith('"***" ')
        assert origin in lines[f"http.tokens.{name}.token"]
    assert lines["http.tokens.flag.pipelines"].startswith('["logs", "default"] ')
    assert lines["http.tokens.shop.bytes_per_second"].startswith('"2MiB" ')
    assert lines["http.webhooks.hub.secret"].startswith('"***" ')
    assert lines["http.webhooks.hub.tolerance"].startswith('"60s" ')
    assert lines["http.tls.key_password"].startswith('"***" ')
    for secret in (SHOP, LOGS, NEXT, "environment-token", "hunter", hash_of(LOGS)[10:]):
        assert secret not in run.stdout


def test_what_check_prints_lets_nobody_in_who_has_only_seen_it(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text(
        f'http.tokens.shop.token = "{SHOP}"\nhttp.webhooks.x = {{kind="github", secret="s"}}\n'
    )
    (tmp_path / "again.toml").write_text(ingestd("check", cwd=tmp_path).stdout)
    run = ingestd("check", "--config", "again.toml", cwd=tmp_path)
    assert run.returncode == 78
    token, secret = run.stderr.splitlines()
    assert "http.tokens.shop.token" in token
    assert "http.webhooks.x.secret" in secret
    assert "stands for a secret" in secret


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('http.tokens.shop.tokn = "hunter2"', "did you mean http.tokens.shop.token?"),
        ('http.tokens.shop.record_per_second = 1', "http.tokens.shop.records_per_second?"),
        ('http.token.shop.file = "x"', "did you mean http.tokens?"),
        ('http.tokens.Shop.token = "x"', "a token's name starts with a-z"),
        ('http.tokens = "x"', "like http.tokens.shop.file"),
        ('http.tokens.shop = "x"', "like http.tokens.shop.file"),
        ('http.webhooks.a.secret = "x"', "http.webhooks.a.kind (default): is missing"),
        ('http.webhooks.a = {kind = "paypal", secret = "x"}', "'sendgrid' or 'hmac'"),
        ('http.webhooks.A = {kind = "github", secret = "x"}', "a webhook's name starts with a-z"),
        ('http.webhooks.a = {kind = "github"}', "needs one of secret and file"),
        ('http.webhooks.a = {kind = "github", secret = "x", pipeline = "no"}', "no pipeline 'no'"),
        ('format="text"\nhttp.webhooks.a = {kind = "github", secret = "x"}', "deliveries are json"),
        ('http.webhooks.a = {kind = "standard", secret = "hunter2!"}', "whsec_ and base64"),
        ('http.tokens.shop.token = "hunter2"', "should be 16 to 512 visible"),
        ('http.tokens.shop.token = "hunter2 hunter2 hunter2"', "without spaces"),
        ('http.tokens.shop.token = 5', "should be text"),
        (f'http.tokens.shop.token = "{HASH}"', "is the hash of a token, not a token"),
        ('http.tokens.shop.hash = "hunter2-hunter2-hunter2"', "should be sha256: and 64"),
        ('http.tokens.shop = {}', "needs one of token, hash, file and client_certificate"),
        (f'http.tokens.shop = {{hash = "{HASH}", pipelines = ["no"]}}', "no pipeline 'no'"),
        (f'http.tokens.shop = {{hash = "{HASH}", pipelines = []}}', "http.tokens.shop.pipelines"),
        (f'http.tokens.shop = {{hash = "{HASH}", records_per_second = -1}}', "at least 0"),
        ('http.tokens.shop.client_certificate = "x"', "needs http.tls.client_ca"),
        (f'http.tokens.a.hash = "{HASH}"\nhttp.tokens.b.token = "{SHOP}"', "has a token of"),
        ('http.tokens.shop.file = "lost"', "http.tokens.shop.file: cannot read {here}/lost"),
        ('http.tokens.shop.file = "hunter2"', "line 2 of {here}/hunter2 is neither a token"),
        ('http.tokens.shop.file = "empty"', "there is nothing in {here}/empty"),
        ('http.tls.key = "x"', "needs http.tls.certificate"),
        ('http.tls.client_ca = "x"', "needs http.tls.certificate"),
        ('http.tls.client_required = true', "needs http.tls.client_ca"),
        ('http.tls.certificate = "lost.pem"', "http.tls.certificate: cannot read {here}/lost.pem"),
        ('http.allow_anonymous = "perhaps"', "should be true or false"),
        (f'http = {{allow_anonymous = true, tokens.a.hash = "{HASH}"}}', "http.allow_anonymous"),
        ('http.listen = "0.0.0.0:1"', "every client could send"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_and_78_and_shows_no_secret(
    tmp_path: Path, toml: str, says: str
) -> None:
    (tmp_path / "hunter2").write_text(f"{SHOP}\nhunter3\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "ingestd.toml").write_text(toml + "\n")
    run = ingestd("check", cwd=tmp_path)
    assert run.returncode == 78
    (line,) = run.stderr.splitlines()
    assert says.replace("{here}", str(tmp_path)) in line
    for secret in (SHOP, "hunter3", "hunter2!", "hunter2-", "hunter2 h", '"hunter2"', "'hunter2'"):
        assert secret not in line


def test_run_says_the_same_and_leaves_with_78(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text('http.tls.certificate = "lost.pem"\n')
    run = ingestd("run", "--listen", "127.0.0.1:0", "--admin.listen", "127.0.0.1:0", cwd=tmp_path)
    assert run.returncode == 78
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"ingestd: http.tls.certificate: cannot read {tmp_path}/lost.pem")


def test_an_expired_certificate_is_a_warning(tmp_path: Path) -> None:
    server = Files(tmp_path / "pem").server(days=-1)
    run = ingestd("check", "--http.tls.certificate", server, cwd=tmp_path)
    assert run.returncode == 0
    assert "warning: http.tls.certificate: " in run.stderr
    assert "expired" in run.stderr
    with daemon("--http.tls.certificate", server, cwd=tmp_path) as door:
        assert "expired" in door.event("certificate_doubtful")["problem"]


# -- who is open to whom -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True), ("127.8.9.1:1", True), ("[::1]:1", True), ("localhost:1", True),
        ("0.0.0.0:1", False), (":1", False), ("[::]:1", False), ("10.0.0.1:1", False),
        ("host.example:1", False), ("127.0.0.1.example:1", False), ("[::ffff:10.0.0.1]:1", False),
    ],
)  # fmt: skip
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


@pytest.mark.parametrize(
    ("http", "starts"),
    [
        ({}, False),
        ({"tls": {"certificate": "c"}}, False),
        ({"allow_anonymous": True}, True),
        ({"tokens": {"a": {"hash": HASH}}}, True),
        ({"tls": {"certificate": "c", "client_ca": "d", "client_required": True}}, True),
        ({"tls": {"certificate": "c", "client_ca": "d"}}, True),
        ({"webhooks": {"a": {"kind": "github", "secret": "x"}}}, True),
    ],
)
def test_nobody_is_open_to_everybody_without_having_said_so(
    http: dict[str, Any], starts: bool
) -> None:
    def start(**more: Any) -> Settings:
        return Settings(http={**http, "listen": ":8080", **more})

    if starts:
        assert start()
    else:
        with pytest.raises(ValueError, match=r"http\.listen"):
            start()
    assert Settings(http=http)
    assert Settings(http={**http, "listen": ":8080"}, source={"kind": "stdin"})


def test_the_settings_keep_no_token() -> None:
    settings = HttpSettings(tokens={"shop": {"token": SHOP}})
    assert settings.tokens["shop"].token.get_secret_value() == HASH
    assert SHOP not in repr(settings.model_dump())
    assert HASH not in repr(settings)


# -- ingestd token -------------------------------------------------------------------------------


def test_token_makes_one_and_says_how_to_use_it(tmp_path: Path) -> None:
    run = ingestd("token", cwd=tmp_path)
    token = run.stdout.removesuffix("\n")
    assert run.returncode == 0
    assert token.startswith("ingestd_")
    assert len(token) >= 8 + 43
    assert hash_of(token) in run.stderr
    assert token not in run.stderr
    assert (
        ingestd("token", "--hash", cwd=tmp_path, stdin=run.stdout).stdout == f"{hash_of(token)}\n"
    )
    assert len({make_token() for _ in range(100)}) == 100


@pytest.mark.parametrize("stdin", ["", "hunter2\n", "hunter2 hunter2 hunter2\n", f"{HASH}\n"])
def test_token_hashes_only_tokens(tmp_path: Path, stdin: str) -> None:
    run = ingestd("token", "--hash", cwd=tmp_path, stdin=stdin)
    assert (run.returncode, run.stdout) == (2, "")
    assert "hunter2" not in run.stderr


# -- a whole life --------------------------------------------------------------------------------


def test_no_token_is_in_anything_that_a_daemon_says(tmp_path: Path) -> None:
    environ = {"INGESTD_HTTP__TOKENS__SHOP__TOKEN": SHOP, "INGESTD_LOG__LEVEL": "debug"}
    with daemon(cwd=tmp_path, environ=environ) as door:
        bodies = []
        for token in (SHOP, NEXT):
            for path in ("/v1/records", "/v1/records/nowhere", "/elsewhere"):
                headers = {"Authorization": f"Bearer {token}"}
                bodies.append(str(door.request("POST", path, b"1", headers)))
        seen = ("/v1/status", "/metrics", "/readyz")
        bodies += [str(door.request("GET", path, admin=True)) for path in seen]
        door.terminate()
        assert door.wait() == 0
    assert any("401" in body for body in bodies)
    assert any("202" in body for body in bodies)
    for text in [*bodies, *map(str, door.events), *door.other]:
        for secret in (SHOP, NEXT, HASH.removeprefix("sha256:")):
            assert secret not in text
