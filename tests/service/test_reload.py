"""What a reload takes of new settings, and what it refuses: decided, and in the real daemon."""

from __future__ import annotations

import json
import os
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest

from ingestd.base.errors import ConfigError
from ingestd.config.loader import plan
from ingestd.http.auth import Authenticator
from ingestd.settings import Settings, validation_errors
from ingestd.sources.http.access import read_access
from tests.access.tools import LOGS, SHOP, Files, bearer
from tests.daemon.harness import Daemon, daemon
from tests.service.tools import until

pytestmark = pytest.mark.slow

TOKEN = {"shop": {"token": SHOP}}


def test_what_is_the_same_changes_nothing() -> None:
    settings = Settings(http={"tokens": TOKEN}, pipelines={"clicks": {}})
    same = Settings(http={"tokens": TOKEN}, pipelines={"clicks": {}})
    change = plan(settings, same, validation_errors)
    assert (change.changed, change.needs_restart) == ([], [])
    assert change.settings == settings


def test_what_can_change_and_what_can_not() -> None:
    running = Settings(pipelines={"clicks": {}, "old": {}})
    change = plan(
        running,
        Settings(
            batch={"records_max": 7, "key": "/id"},
            queue={"chunks_max": 9},
            log={"level": "debug", "format": "json"},
            http={"tokens": TOKEN, "records_max": 5},
            pipelines={
                "clicks": {"batch": {"age_max": "3s"}, "retry": {"attempts_max": 2}},
                "new": {},
            },
        ),
        validation_errors,
    )
    token = "token hash file client_certificate pipelines records_per_second bytes_per_second"
    assert set(change.changed) == {
        "log.level",
        "batch.records_max",
        "pipelines.clicks.batch.records_max",
        "pipelines.clicks.batch.age_max",
        *(f"http.tokens.shop.{key}" for key in token.split()),
    }
    assert set(change.needs_restart) == {
        "http.records_max",
        "log.format",
        "queue.chunks_max",
        "batch.key",
        "pipelines.clicks.batch.key",
        "pipelines.clicks.queue.chunks_max",
        "pipelines.clicks.retry.attempts_max",
        "pipelines.new",
        "pipelines.old",
    }
    now = change.settings
    assert (now.log.level, now.log.format) == ("debug", "auto")
    assert now.http.records_max == running.http.records_max
    assert now.http.tokens.keys() == {"shop"}
    assert now.pipelines.keys() == {"clicks", "old"}
    assert now.pipelines["clicks"].batch.age_max == 3
    assert now.pipelines["clicks"].queue.chunks_max == running.queue.chunks_max


@pytest.mark.parametrize(
    ("before", "after", "about"),
    [
        # The address is public until the restart.
        ({"http": {"listen": "0.0.0.0:1", "tokens": TOKEN}}, {}, "http.listen"),
        (
            {},
            {"queue": {"bytes_max": "1GiB"}, "batch": {"bytes_max": "512MiB"}},
            "queue.bytes_max",
        ),
        (
            {},
            {
                "pipelines": {"new": {}},
                "http": {"tokens": {"shop": {"token": SHOP, "pipelines": ["new"]}}},
            },
            "http.tokens.shop.pipelines",
        ),
    ],
)
def test_what_goes_only_with_a_restart_is_refused(
    before: dict[str, Any], after: dict[str, Any], about: str
) -> None:
    with pytest.raises(ConfigError, match="needs a restart") as refused:
        plan(Settings(**before), Settings(**after), validation_errors)
    assert str(refused.value).startswith(f"{about}: ")


def test_what_a_token_owes_it_goes_on_owing() -> None:
    slow, fast = ({"shop": {"token": SHOP, "records_per_second": rate}} for rate in (1, 1000))
    settings = Settings(http={"tokens": slow}).http
    access = read_access(settings, {"default": "json"}, "default")
    gate = Authenticator(settings, access)
    principal = gate._principals["shop"]
    principal.charge(100, 0)
    assert principal.wait() > 50
    again = Authenticator(settings, access, before=gate)
    assert again._principals["shop"].wait() > 50
    faster = Settings(http={"tokens": fast}).http
    assert (
        Authenticator(faster, read_access(faster, {"default": "json"}, "default"), before=again)
        ._principals["shop"]
        .wait()
        == 0
    )


# -- the daemon ----------------------------------------------------------------------------------


def hang_up(one: Daemon, event: str) -> dict[str, Any]:
    """SIGHUP; what the daemon says to it."""
    before = len(one.events)
    one.terminate(signal.SIGHUP)
    until(lambda: any(line.get("event") == event for line in one.events[before:]))
    return next(line for line in one.events[before:] if line.get("event") == event)


def configure(folder: Path, **tables: dict[str, Any]) -> None:
    """Writes `ingestd.toml`."""
    text = "# settings\n"
    for name, table in tables.items():
        text += f"[{name.replace('__', '.')}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    (folder / "ingestd.toml").write_text(text)


def test_everything_that_can_change_changes_at_once(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import pathlib\n"
        "def store(batch: list[int]) -> None:\n"
        "    with pathlib.Path('sizes').open('a') as sizes:\n"
        "        print(len(batch), file=sizes)\n"
    )
    files = Files(tmp_path / "pem")
    context = ssl.create_default_context(cafile=files.ca)
    configure(tmp_path, batch={"records_max": 1000, "age_max": "1ms"})
    with daemon("app:store", cwd=tmp_path) as one:
        # An open batch that is beyond the new bounds when they come.
        configure(tmp_path, batch={"records_max": 1000, "age_max": "1h"})
        said = hang_up(one, "reloaded")
        assert (said["changed"], said["needs_restart"]) == (["batch.age_max"], [])
        assert one.post(b"1\n" * 30)[0] == 202
        configure(
            tmp_path,
            batch={"records_max": 10, "age_max": "1ms"},
            log={"level": "debug"},
            executor={"timeout": "7s"},
        )
        said = hang_up(one, "reloaded")
        assert set(said["changed"]) == {"batch.records_max", "batch.age_max", "log.level"}
        assert said["needs_restart"] == ["executor.timeout"]
        assert one.post(b"1\n" * 25)[0] == 202
        one.until_settled()
        sizes = [int(line) for line in (tmp_path / "sizes").read_text().split()]
        assert sizes[0] == 30
        assert sum(sizes) == 55
        assert max(sizes[1:]) == 10
        # Debug lines come now: one of each request that can't be read.
        assert one.request("BREW/ING", "/")[0] == 400
        one.event("request_unreadable")
        # Tokens, a webhook and TLS, where there was none.
        configure(
            tmp_path,
            http__tokens__shop={"token": SHOP},
            http__webhooks__hub={"kind": "github", "secret": "a secret of the tests"},
            http__tls={"certificate": files.server()},
        )
        assert "http.tls.certificate" in hang_up(one, "reloaded")["changed"]
        assert ask(one, context, "/v1/records", bearer(SHOP)) == 202
        assert ask(one, context, "/v1/records", bearer(LOGS)) == 401
        assert ask(one, context, "/v1/webhooks/hub", {"Content-Type": "application/json"}) == 401
        # And back.
        configure(tmp_path)
        hang_up(one, "reloaded")
        assert one.post(b"1\n")[0] == 202
        assert one.post(b"1\n", "/v1/webhooks/hub")[0] == 404
        one.terminate()
        assert one.wait() == 0


def ask(one: Daemon, context: ssl.SSLContext, path: str, headers: dict[str, str]) -> int:
    import http.client

    connection = http.client.HTTPSConnection("localhost", one.port, context=context, timeout=60)
    try:
        connection.request("POST", path, b"1", headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_wrong_settings_are_refused_as_a_whole(tmp_path: Path) -> None:
    configure(tmp_path, http__tokens__shop={"token": SHOP})
    with daemon(cwd=tmp_path) as one:
        (tmp_path / "ingestd.toml").write_text(
            '[log]\nlevel = "debug"\n[batch]\nrecords_max = 7\n'
            '[http.tokens.logs]\nfile = "no-such"\n'
        )
        assert "no-such" in hang_up(one, "reload_refused")["error"]
        (tmp_path / "ingestd.toml").write_text("[batch]\nrecords_max = 0\nbyte_max = 1\n")
        said = hang_up(one, "reload_refused")["error"]
        assert "batch.records_max" in said
        assert "batch.byte_max" in said
        (tmp_path / "ingestd.toml").write_text("")  # as while it is written anew
        assert "is empty" in hang_up(one, "reload_refused")["error"]
        (tmp_path / "ingestd.toml").write_text("[batch\n")
        assert "is not TOML" in hang_up(one, "reload_refused")["error"]
        # All is as it was.
        assert one.post(b"1\n", **bearer(SHOP))[0] == 202
        assert one.post(b"1\n")[0] == 401
        assert not [line for line in one.events if line["level"] == "debug"]
        configure(tmp_path, http__tokens__shop={"token": SHOP})
        assert hang_up(one, "reloaded")["changed"] == []


@pytest.mark.slow
def test_no_value_of_an_option_is_ever_logged(tmp_path: Path) -> None:
    """At the start, at a failure with its traceback, at reloads, at the end, and at a bad start."""
    (tmp_path / "app.py").write_text(
        "class Store:\n"
        "    def __init__(self, dsn, headers=None):\n"
        "        self.dsn, self.headers = dsn, headers\n"
        "    def __call__(self, batch: list[dict]) -> None:\n"
        "        dsn = self.dsn\n"
        "        if batch[0].get('bad'):\n"
        "            raise RuntimeError('no')\n"
    )
    hidden = ["hunter1", "hunter2", "hunter3", "hunter4"]

    def options(*values: str, more: str = "") -> None:
        (tmp_path / "ingestd.toml").write_text(
            'log.level = "debug"\ndrain.timeout = "10ms"\nexecutor.kind = "thread"\n'
            'handler.target = "app:Store"\n'
            f'[handler.options]\ndsn = "odd://{values[0]}"\nheaders = {{x = "{values[1]}"}}\n{more}'
        )

    options("hunter1", "hunter2")
    with daemon(cwd=tmp_path) as one:
        one.post(b'{"bad": 1}\n')
        one.event("batch_failed")
        options("hunter3", "hunter2")
        assert hang_up(one, "reloaded")["needs_restart"] == ["handler.options.dsn"]
        options("hunter3", "hunter2", more='y = "hunter4\n')
        hang_up(one, "reload_refused")
        one.terminate()
        one.wait()
        said = repr(one.events) + repr(one.other)
    options("hunter1", "hunter2", more='y = "hunter4"\n')
    with Daemon(cwd=tmp_path) as two:
        assert two.wait() == 78
        said += repr(two.events) + repr(two.other)
    assert "y" in two.other[-1]
    assert not [one for one in hidden if one in said]


def test_settings_that_came_through_a_pipe_are_not_read_again(tmp_path: Path) -> None:
    """It is empty then, and without tokens anybody may send."""
    reading, writing = os.pipe()
    os.write(writing, f'[http.tokens.shop]\ntoken = "{SHOP}"\n'.encode())
    os.close(writing)
    with daemon("--config", f"/dev/fd/{reading}", cwd=tmp_path, fds=(reading,)) as one:
        os.close(reading)
        assert "no regular file" in hang_up(one, "reload_refused")["error"]
        assert one.post(b"1\n")[0] == 401
        assert one.post(b"1\n", **bearer(SHOP))[0] == 202


def test_a_reload_waits_for_no_file_and_reads_none_without_end(tmp_path: Path) -> None:
    fifo, token, config = (tmp_path / name for name in ("fifo", "token", "ingestd.toml"))
    os.mkfifo(fifo)
    token.write_text(SHOP)
    tables = {"http__tokens__shop": {"file": str(token)}}
    configure(tmp_path, **tables)
    with daemon(cwd=tmp_path) as one:
        for place in (fifo, Path("/dev/zero"), tmp_path):
            config.unlink()
            config.symlink_to(place)
            assert str(config) in hang_up(one, "reload_refused")["error"]
            config.unlink()
            for table in ({"certificate": str(place)}, {"client_ca": str(place)}):
                configure(tmp_path, **tables, http__tls=table)
                assert "http.tls" in hang_up(one, "reload_refused")["error"]
            configure(tmp_path, **tables)
            token.unlink()
            token.symlink_to(place)
            assert "http.tokens.shop.file" in hang_up(one, "reload_refused")["error"]
            token.unlink()
            token.write_text(SHOP)
            hang_up(one, "reloaded")
        assert one.post(b"1\n")[0] == 401
        assert one.post(b"1\n", **bearer(SHOP))[0] == 202
