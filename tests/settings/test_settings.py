from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from ingestd.config.keys import settings_of, unit_of
from ingestd.config.sections import Section
from ingestd.execution.settings import HandlerSettings
from ingestd.pipeline_settings import BatchSettings, PipelineSettings
from ingestd.settings import DrainSettings, Settings

ROOT = Path(__file__).resolve().parents[2]


def test_settings_made_in_code_see_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    monkeypatch.setenv("FORMAT", "text")
    assert Settings().format == "json"
    assert str(Settings().data_dir) == "ingestd-data"


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.format = "text"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.batch.records_max = 5  # type: ignore[misc]


def test_every_section_forbids_what_it_does_not_know() -> None:
    sections = [*Section.__subclasses__(), DrainSettings, Settings]
    assert len(sections) > 12
    for section in sections:
        with pytest.raises(ValidationError, match="nonsense"):
            section(nonsense=1)  # type: ignore[call-arg]


def test_every_number_is_bounded_on_both_sides() -> None:
    for path, field in settings_of(Settings):
        unit = unit_of(field)
        bounds = {type(mark).__name__ for mark in field.metadata}
        if unit is not None and unit.name == "words":
            assert "MaxLen" in bounds, path
        elif unit is not None:
            assert bounds & {"Ge", "Gt"}, path
            assert bounds & {"Le", "Lt"}, path


def test_a_pipeline_takes_what_it_leaves_out_from_the_top_key_by_key() -> None:
    settings = Settings(
        format="text",
        batch=BatchSettings(records_max=5, age_max="2s"),
        retry={"backoff_max": "1h"},
        drain={"delay": "3s", "timeout": "4s"},
        pipelines={"clicks": {"batch": {"age_max": "9s"}, "retry": {"backoff": "2m"}}},
    )
    clicks = settings.pipeline_settings()["clicks"]
    assert clicks.format == "text"
    assert (clicks.batch.records_max, clicks.batch.age_max) == (5, 9.0)
    assert (clicks.retry.backoff, clicks.retry.backoff_max) == (120.0, 3600.0)
    assert clicks.drain.timeout == 4.0
    assert settings.batch.age_max == 2.0


def test_a_handler_table_is_taken_whole() -> None:
    settings = Settings(
        handler=HandlerSettings(target="a:b", options={"x": 1}),
        pipelines={"one": {"handler": {"target": "c:d"}}, "two": {}, "three": {"handler": {}}},
    )
    pipelines = settings.pipeline_settings()
    assert pipelines["one"].handler == HandlerSettings(target="c:d")
    assert pipelines["two"].handler == HandlerSettings(target="a:b", options={"x": 1})
    assert pipelines["three"].handler == HandlerSettings()


def test_pipelines_come_default_first_and_filled_in() -> None:
    settings = Settings(pipelines={"b": {}, "a": PipelineSettings(format="bytes")})
    pipelines = settings.pipeline_settings()
    assert list(pipelines) == ["default", "b", "a"]
    assert all(isinstance(pipeline, PipelineSettings) for pipeline in pipelines.values())
    assert [pipeline.format for pipeline in pipelines.values()] == ["json", "json", "bytes"]


@pytest.mark.parametrize("name", ["default", "Clicks", "1st", "a b", "", "a" * 64, "a.b", "ä"])
def test_a_pipeline_has_a_plain_name_of_its_own(name: str) -> None:
    with pytest.raises(ValidationError):
        Settings(pipelines={name: {}})


def _jetstream(**own: object) -> dict[str, object]:
    return {"journal": {"kind": "jetstream", "jetstream": own}}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"retry": {"backoff": "2m"}}, "retry.backoff_max"),
        ({"executor": {"kind": "thread", "factory": "a:b"}}, "executor.kind"),
        ({"batch": {"bytes_max": "65MiB"}}, "queue.bytes_max"),
        ({"batch": {"key": "/id"}, "format": "text"}, "batch.key"),
        ({"handler": {"target": "a:b", "targets": ["jsonl"]}}, "handler.target"),
        ({"http": {"inflight_bytes_max": "1MiB"}}, "http.inflight_bytes_max"),
        ({"source": {"pipeline": "nowhere"}}, "source.pipeline"),
        ({"http": {"listen": "h:1"}, "admin": {"listen": "h:1"}}, "admin.listen"),
        ({"http": {"reuse_port": True, "listen": "127.0.0.1:0"}}, "http.reuse_port"),
        ({"pipelines": {"v": {"retry": {"backoff": "2m"}}}}, "pipelines.v.retry.backoff_max"),
        (_jetstream(tls={"key": "key.pem"}), "journal.jetstream.tls.key"),
        (_jetstream(servers=["nats://[::1"]), "journal.jetstream.servers"),
    ],
)
def test_what_cannot_work_together_is_refused(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError, match=key.replace(".", r"\.")):
        Settings(**settings)  # type: ignore[arg-type]


def test_two_addresses_with_port_0_are_two_addresses() -> None:
    settings = Settings(http={"listen": "127.0.0.1:0"}, admin={"listen": "127.0.0.1:0"})
    assert settings.http.listen == settings.admin.listen


def test_a_shared_port_is_one_of_the_http_source() -> None:
    http = {"reuse_port": True, "listen": "127.0.0.1:0"}
    assert Settings(http=http, source={"kind": "stdin"}).http.reuse_port  # type: ignore[arg-type]


def test_a_port_is_not_shared_where_the_platform_has_no_word_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ValidationError, match=r"http\.reuse_port: this platform has no SO_REUSE"):
        Settings(http={"reuse_port": True})  # type: ignore[arg-type]


def test_options_are_plain_data() -> None:
    options = {"text": "x", "number": 1, "ratio": 0.5, "on": True, "list": [1, "a"], "t": {"u": {}}}
    assert HandlerSettings(options=options).options == options
    for wrong in (None, object(), {1: 2}, {"": 1}, b"x"):
        with pytest.raises(ValidationError):
            HandlerSettings(options={"x": wrong})


def test_a_start_builds_validators_for_what_is_written_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ingestd.config.layers import Flag; "
        "from ingestd.config.loader import load; from ingestd.settings import Settings; "
        "flags = [Flag('batch.records_max', '5', '--batch.records_max')]; "
        "one = load(Settings, flags, environ={}, cwd=Path('.')).settings; "
        "built = [n for n, v in one if getattr(v, '__pydantic_complete__', False)]; "
        "late = [m for m in sys.modules if m.startswith('ingestd.sources.http.endpoints.')]; "
        "print(built, one.batch.records_max, one.queue.chunks_max, late)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    expected = "['batch'] 5 1024 ['ingestd.sources.http.endpoints.base']\n"
    assert (run.stdout, run.stderr) == (expected, "")


@pytest.mark.parametrize(
    ("executor", "window"),
    [
        ({"workers": 1}, 2),
        ({"workers": 3}, 8),
        ({"workers": 2, "workers_max": 8}, 16),
        ({"workers": 999}, 64),
    ],
)
def test_a_window_of_batches_by_key_has_two_for_each_worker(executor, window) -> None:
    made = Settings(batch={"key": "/id"}, executor=executor).pipeline_settings()["default"]
    assert made.batch_window()["window"] == window
    assert Settings(executor=executor).pipeline_settings()["default"].batch_window() == {}
