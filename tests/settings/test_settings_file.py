"""config/ingestd.toml and the models say the same, in both directions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ingestd.config.keys import dotted, settings_of, shown, unit_of
from ingestd.config.loader import load
from ingestd.http.settings import TokenSettings, WebhookSettings
from ingestd.settings import AdminTokenSettings, HookSettings, Settings

FILE = Path(__file__).parents[2] / "config" / "ingestd.toml"
TEXT = FILE.read_text()


def _flat(table: dict[str, object], prefix: tuple[str, ...] = ()) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, (*prefix, name))
        else:
            flat[dotted((*prefix, name))] = value
    return flat


def test_every_key_is_there_with_its_default_as_people_write_it() -> None:
    in_code = {
        dotted(path): shown(field, field.get_default(call_default_factory=True, validated_data={}))
        for path, field in settings_of(Settings)
    }
    in_code["data_dir"] = str(in_code["data_dir"])
    assert _flat(tomllib.loads(TEXT)) == in_code


def test_the_file_loads_and_changes_nothing(tmp_path: Path) -> None:
    loaded = load(Settings, environ={}, cwd=tmp_path, config=str(FILE), secrets=tmp_path / "none")
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {f"file {FILE}"}


def test_the_example_of_a_pipeline_works_when_its_comment_signs_are_gone(tmp_path: Path) -> None:
    example = TEXT[TEXT.index("# [pipelines.") :]
    text = re.sub(r"(?m)^# ?", "", example)
    (tmp_path / "ingestd.toml").write_text(TEXT.replace(example, text))
    loaded = load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none")
    clicks = loaded.settings.pipelines["clicks"]
    assert clicks.batch.age_max == 0.25
    assert clicks.handler.options == {"table": "clicks"}
    assert clicks.executor.kind == "process"


def test_the_example_of_sources_works_when_its_comment_signs_are_gone(tmp_path: Path) -> None:
    example = TEXT[TEXT.index("# [sources.web]") : TEXT.index("\n[admin]")]
    text = re.sub(r"(?m)^# ?", "", example) + "\n[pipelines.clicks]\nformat = 'json'\n"
    (tmp_path / "ingestd.toml").write_text(text)
    settings = load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none").settings
    running = {one.name: (one.kind, one.pipeline) for one in settings.running_sources()}
    assert running == {"web": ("http", "default"), "history": ("fetch", "clicks")}


def test_the_examples_of_a_token_and_a_webhook_name_every_key(tmp_path: Path) -> None:
    start = TEXT.index("# [http.tokens.")
    end = TEXT.index("\n[", start)
    example = "\n".join(
        re.sub(r"^# ?", "", line).replace("…", "x" * 16)
        for line in TEXT[start:end].splitlines()
        if "=" in line or line.startswith("# [")
    ).replace("client_certificate", "# client_certificate")
    (tmp_path / "ingestd.toml").write_text(example)
    settings = load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none").settings
    token, webhook = settings.http.tokens["shop"], settings.http.webhooks["github"]
    others = [settings.http.webhooks[name] for name in ("calls", "other")]
    named = {key for one in (webhook, *others) for key in one.model_fields_set}
    assert token.model_fields_set | {"client_certificate"} == set(TokenSettings.model_fields)
    assert named == set(WebhookSettings.model_fields)
    usual = {"signature_prefix", "algorithm", "encoding", "signed", "timestamp_header", "id_field"}
    assert others[1].model_dump(include=usual) == webhook.model_dump(include=usual)
    unsaid = {"pipelines", "records_per_second", "bytes_per_second"}
    assert token.model_dump(include=unsaid) == TokenSettings().model_dump(include=unsaid)
    assert webhook.tolerance == WebhookSettings(kind="github").tolerance


def test_the_example_of_an_operator_names_every_key(tmp_path: Path) -> None:
    start = TEXT.index("# [admin.tokens.")
    example = TEXT[start : TEXT.index("\n[", start)]
    text = re.sub(r"(?m)^# ?", "", example).replace("…", "x" * 16)
    (tmp_path / "ingestd.toml").write_text(text)
    token = load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none").settings.admin
    assert token.tokens["ops"].model_fields_set == set(AdminTokenSettings.model_fields)
    assert token.tokens["ops"].role == AdminTokenSettings().role


def test_the_example_of_a_hook_names_every_key(tmp_path: Path) -> None:
    start = TEXT.index("# [hooks.")
    text = re.sub(r"(?m)^# ?", "", TEXT[start : TEXT.index("\n\n", start)])
    (tmp_path / "ingestd.toml").write_text(text.replace("…", f"whsec_{'x' * 32}"))
    hook = load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none").settings.hooks["ops"]
    assert hook.model_fields_set == set(HookSettings.model_fields)
    unsaid = {"on", "every", "paused_after"}
    usual = HookSettings(url=hook.url, secret=hook.secret.get_secret_value())
    assert hook.model_dump(include=unsaid) == usual.model_dump(include=unsaid)


@pytest.mark.parametrize("path", [path for path, _ in settings_of(Settings)], ids=dotted)
def test_every_key_has_a_meaning_and_every_number_a_unit(path: tuple[str, ...]) -> None:
    section = TEXT
    if len(path) > 1:
        section = TEXT[TEXT.index(f"\n[{'.'.join(path[:-1])}]") + 1 :].split("\n[", 1)[0]
    (line,) = re.findall(rf"(?m)^{path[-1]} *= .*$", section.split("\n[", 1)[0])
    comment = line.partition("#")[2].strip()
    assert comment
    unit = unit_of(dict(settings_of(Settings))[path])
    word = {"bytes": "size", "seconds": "time"}.get(unit.name) if unit else None
    assert word is None or word in comment
