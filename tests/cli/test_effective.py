"""Settings in effect with their origins, through reloads that change some of them or none."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import pytest

from ingestd.base.errors import ConfigError
from ingestd.cli.configured import Configuration
from ingestd.settings import Settings, plan_reload

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "whsec_" + "A" * 32


class Files:
    """A folder with a configuration and secrets, and the settings that a daemon has of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret("ingestd_log__level", "info")
        self.configuration = Configuration(Namespace(flags=(), config=None))

    def write(self, text: str) -> None:
        (self.folder / "ingestd.toml").write_text(text)

    def secret(self, name: str, value: str) -> None:
        (self.folder / "secrets" / name).write_text(value)

    def start(self) -> None:
        self.settings: Settings = self.configuration.load().settings

    def reload(self) -> None:
        loaded = self.configuration.load(self.settings).settings
        self.settings = plan_reload(self.settings, loaded).settings

    def shown(self, key: str) -> tuple[object, str]:
        rows = self.configuration.effective(self.settings)
        return next((value, origin) for name, value, origin in rows if name == key)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    (tmp_path / "secrets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "secrets"))
    return Files(tmp_path)


def test_a_secret_that_stays_in_effect_stays_hidden(files: Files) -> None:
    files.write(f'[hooks.ops]\nsecret = "{SECRET}"\n')
    files.secret("ingestd_hooks__ops__url", "http://h.example/secret")
    files.start()
    origin = f"secret {files.folder}/secrets/ingestd_hooks__ops__url"
    assert files.shown("hooks.ops.url") == ("***", origin)
    (files.folder / "secrets/ingestd_hooks__ops__url").unlink()
    files.write(f'[hooks.ops]\nurl = "http://h.example/other"\nsecret = "{SECRET}"\n')
    for _ in range(2):  # it needs a restart
        files.reload()
        assert files.shown("hooks.ops.url") == ("***", origin)
    files.write("batch.records_max = 7\n")
    files.reload()
    assert files.shown("hooks.ops.url") == ("***", origin)
    assert files.shown("batch.records_max") == (7, f"file {files.folder}/ingestd.toml")


def test_what_a_refused_reload_says_is_not_in_effect(files: Files) -> None:
    files.write("batch.records_max = 7\n")
    files.start()
    files.secret("ingestd_http__keep_headers", "x-shop")
    files.reload()
    origin = f"secret {files.folder}/secrets/ingestd_http__keep_headers"
    assert files.shown("http.keep_headers") == ("***", origin)
    # A token for a pipeline that comes with a restart alone.
    files.write(
        'http.keep_headers = ["x-other"]\n[pipelines.new]\n'
        '[http.tokens.a]\ntoken = "0123456789-0123456789"\npipelines = ["new"]\n'
    )
    (files.folder / "secrets/ingestd_http__keep_headers").unlink()
    for _ in range(2):
        with pytest.raises(ConfigError):
            files.reload()
        assert files.shown("http.keep_headers") == ("***", origin)
