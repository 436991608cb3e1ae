from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from ingestd.base.errors import ConfigError
from ingestd.config.layers import Flag
from ingestd.config.loader import Loaded, load
from ingestd.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["default", "file", "run-secret", "credential", "env", "flag"]
VALUES = {"default": 1000, "file": 1, "run-secret": 2, "credential": 3, "env": 4, "flag": 5}


@dataclass
class World:
    """Everything that `load` reads, in a folder of its own."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    config: str | None = None

    def __post_init__(self) -> None:
        for name in ("cwd", "run", "credentials", "etc"):
            (self.root / name).mkdir()

    def toml(self, text: str, where: str = "cwd/ingestd.toml") -> str:
        (self.root / where).write_text(text)
        return str(self.root / where)

    def secret(self, name: str, text: str, where: str = "credentials") -> str:
        self.environ["CREDENTIALS_DIRECTORY"] = str(self.root / "credentials")
        (self.root / where / name).write_text(text)
        return str(self.root / where / name)

    def flag(self, key: str, value: str) -> None:
        self.flags.append(Flag(key, value, f"--{key}"))

    def load(self) -> Loaded[Settings]:
        return load(
            Settings,
            self.flags,
            environ=self.environ,
            cwd=self.root / "cwd",
            config=self.config,
            secrets=self.root / "run",
            system_config=self.root / "etc" / "ingestd.toml",
        )

    def problems(self) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.load()
        assert caught.value.exit_code == 78
        return str(caught.value).splitlines()

    def problem(self) -> str:
        (line,) = self.problems()
        return line

    def write(self, layer: str, key: str, value: object) -> str:
        """The key in one layer; the origin that it should have."""
        path = key.split(".")
        if layer == "file":
            return f"file {self.toml(f'{key} = {value}')}"
        if layer in {"run-secret", "credential"}:
            folder = {"run-secret": "run", "credential": "credentials"}[layer]
            return f"secret {self.secret('ingestd_' + '__'.join(path), str(value), folder)}"
        if layer == "env":
            name = "INGESTD_" + "__".join(path).upper()
            self.environ[name] = str(value)
            return f"env {name}"
        if layer == "flag":
            self.flag(key, str(value))
            return f"flag --{key}"
        return "default"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(("lower", "upper"), list(itertools.combinations(LAYERS, 2)))
def test_the_upper_layer_wins(world: World, lower: str, upper: str) -> None:
    world.write(lower, "batch.records_max", VALUES[lower])
    origin = world.write(upper, "batch.records_max", VALUES[upper])
    loaded = world.load()
    assert loaded.settings.batch.records_max == VALUES[upper]
    assert loaded.origins["batch.records_max"] == origin


@pytest.mark.parametrize(("lower", "upper"), list(itertools.combinations(LAYERS[1:], 2)))
def test_layers_of_a_named_pipeline_are_joined_key_by_key(
    world: World, lower: str, upper: str
) -> None:
    below = world.write(lower, "pipelines.clicks.batch.records_max", 7)
    above = world.write(upper, "pipelines.clicks.handler.options.n", 8)
    loaded = world.load()
    clicks = loaded.settings.pipelines["clicks"]
    assert clicks.batch.records_max == 7
    assert str(clicks.handler.options["n"]) == "8"
    assert loaded.origins["pipelines.clicks.batch.records_max"] == below
    assert loaded.origins["pipelines.clicks.handler.options.n"] == above
    assert loaded.origins["pipelines.clicks.handler.target"] == "default"
    assert loaded.origins["pipelines.clicks.batch.age_max"] == "as batch.age_max"


def test_nothing_written_is_the_defaults(world: World) -> None:
    loaded = world.load()
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert "batch.records_max" in loaded.origins


def test_the_last_of_a_flag_wins(world: World) -> None:
    world.flag("data_dir", "one")
    world.flag("data_dir", "two")
    assert str(world.load().settings.data_dir) == "two"


@pytest.mark.parametrize(("named_by", "origin"), [("flag", "a.toml"), ("variable", "b.toml")])
def test_the_named_file_is_read_and_no_other(world: World, named_by: str, origin: str) -> None:
    world.toml("batch.records_max = 1")
    world.toml("batch.age_max = 1", "etc/ingestd.toml")
    world.toml("queue.chunks_max = 10", "cwd/a.toml")
    world.toml("queue.chunks_max = 10", "cwd/b.toml")
    world.environ["INGESTD_CONFIG"] = "b.toml"
    if named_by == "flag":
        world.config = "a.toml"
    loaded = world.load()
    changed = {key: where for key, where in loaded.origins.items() if where != "default"}
    assert changed == {"queue.chunks_max": f"file {world.root / 'cwd' / origin}"}


def test_the_systems_file_is_read_when_there_is_none_here(world: World) -> None:
    where = world.toml("batch.records_max = 3", "etc/ingestd.toml")
    assert world.load().origins["batch.records_max"] == f"file {where}"
    world.toml("batch.age_max = 1")
    assert world.load().origins["batch.records_max"] == "default"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_named_file_that_is_missing_is_named(world: World, how: str) -> None:
    if how == "flag":
        world.config = "lost.toml"
    else:
        world.environ["INGESTD_CONFIG"] = "lost.toml"
    assert world.problem() == f"there is no configuration file {world.root}/cwd/lost.toml"


@pytest.mark.parametrize(
    "content", [b"batch = ", b"\xff\xfe", b"a = " + b"[" * 5000, b"x = " + b"9" * 5000]
)
def test_a_file_that_is_not_toml_is_one_line(world: World, content: bytes) -> None:
    (world.root / "cwd" / "ingestd.toml").write_bytes(content)
    assert world.problem().startswith("configuration file ")


def test_a_folder_as_configuration_file_is_one_line(world: World) -> None:
    world.config = str(world.root)
    assert "cannot read configuration file" in world.problem()


@pytest.mark.parametrize("layer", ["run-secret", "credential", "env", "flag"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("record_bytes_mx", "record_bytes_max"),
        ("records_max", "batch.records_max"),
        ("batch.record_max", "batch.records_max"),
        ("bacth.records_max", "batch.records_max"),
        ("retry.waiting_max", "retry.waiting_records_max"),
        ("batch.max", "batch.records_max"),
        ("executor.worker", "executor.workers"),
        ("handler.option.dsn", "handler.options"),
        ("batch.records_max.more", "batch.records_max"),
        ("pipelines.clicks.batch.record_max", "pipelines.clicks.batch.records_max"),
        ("pipelines.clicks.drain.timout", "pipelines.clicks.drain.timeout"),
    ],
)
def test_an_unknown_name_is_said_with_the_nearest(
    world: World, layer: str, key: str, meant: str
) -> None:
    origin = world.write(layer, key, 5)
    name = {
        "env": "INGESTD_" + meant.upper().replace(".", "__"),
        "flag": f"--{meant}",
    }.get(layer, "ingestd_" + meant.replace(".", "__"))
    said = origin.replace("env ", "variable ")
    assert world.problem() == f"unknown {said}, did you mean {name}?"


@pytest.mark.parametrize(
    ("key", "unknown", "meant"),
    [
        ("record_bytes_mx", "record_bytes_mx", "record_bytes_max"),
        ("records_max", "records_max", "batch.records_max"),
        ("batch.record_max", "batch.record_max", "batch.records_max"),
        ("bacth.records_max", "bacth", "batch"),
        ("http.body_bytes_max", "http.body_bytes_max", "http.decompressed_bytes_max"),
        ("handler.option.dsn", "handler.option", "handler.options"),
        ("pipeline.clicks.format", "pipeline", "pipelines"),
        ("pipelines.clicks.bach.records_max", "pipelines.clicks.bach", "pipelines.clicks.batch"),
        (
            "pipelines.clicks.batch.record_max",
            "pipelines.clicks.batch.record_max",
            "pipelines.clicks.batch.records_max",
        ),
    ],
)
def test_an_unknown_key_in_the_file_is_said_with_the_nearest(
    world: World, key: str, unknown: str, meant: str
) -> None:
    where = world.toml(f"{key} = 5")
    assert world.problem() == f"unknown key {unknown} (file {where}), did you mean {meant}?"


@pytest.mark.parametrize("key", ["pipelines.a.http.listen", "pipelines.a.drain.delay"])
def test_what_is_for_the_whole_daemon_is_no_key_of_a_pipeline(world: World, key: str) -> None:
    world.toml(f'{key} = "1s"')
    assert world.problem().startswith(f"unknown key {key.removesuffix('.listen')} (")


def test_a_name_like_nothing_gets_no_suggestion(world: World) -> None:
    world.environ["INGESTD_QQQQQQ"] = "1"
    assert world.problem() == "unknown variable INGESTD_QQQQQQ"


def test_variables_and_files_of_others_are_theirs(world: World) -> None:
    world.environ |= {"INGEST": "1", "MY_INGESTD_X": "1", "BATCH__RECORDS_MAX": "x"}
    world.secret("database_password", "x")
    world.secret("INGESTD_X", "x")
    (world.root / "credentials" / "ingestd_folder").mkdir()
    assert world.load().settings == Settings()


def test_what_kubernetes_tells_of_a_service_called_ingestd_is_no_setting(world: World) -> None:
    links = {
        "INGESTD_SERVICE_HOST": "10.0.0.1",
        "INGESTD_SERVICE_PORT": "8080",
        "INGESTD_SERVICE_PORT_HTTP": "8080",
        "INGESTD_PORT": "tcp://10.0.0.1:8080",
        "INGESTD_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "INGESTD_PORT_8080_TCP_PROTO": "tcp",
        "INGESTD_ADMIN_SERVICE_HOST": "10.0.0.2",
        "INGESTD_ADMIN_PORT_8081_TCP_ADDR": "10.0.0.2",
    }
    world.environ |= links
    assert world.load().settings == Settings()
    world.environ["INGESTD_BATCH_RECORDS_MAX"] = "5"
    assert "INGESTD_BATCH__RECORDS_MAX" in world.problem()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INGESTD_PORT", "8080"),
        ("INGESTD_HTTP_PORT", "8080"),
        ("INGESTD_SERVICE_PORT", "8080"),
        ("INGESTD_SERVICE_HOST", "name"),
    ],
)
def test_what_only_looks_like_a_service_is_a_mistake(
    world: World, name: str, value: str, inside: bool
) -> None:
    if inside:
        world.environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.0"
    world.environ[name] = value
    assert f"unknown variable {name}" in world.problem()


def test_what_docker_tells_of_a_link_called_ingestd_is_no_setting(world: World) -> None:
    world.environ |= {
        "INGESTD_PORT": "tcp://172.17.0.5:8080",
        "INGESTD_PORT_8080_TCP": "tcp://172.17.0.5:8080",
        "INGESTD_PORT_8080_TCP_PORT": "8080",
    }
    assert world.load().settings == Settings()


def test_urls_come_as_an_array_in_a_variable(world: World) -> None:
    world.environ["INGESTD_FETCH__URLS"] = '["https://a.example/x", "https://b.example/y"]'
    assert world.load().settings.fetch.urls == ("https://a.example/x", "https://b.example/y")
    world.environ["INGESTD_FETCH__URLS"] = '["https://a.example/x"'
    assert "should be a list of URLs" in world.problem()


def test_a_byte_order_mark_is_no_part_of_the_file(world: World) -> None:
    (world.root / "cwd" / "ingestd.toml").write_bytes(b"\xef\xbb\xbfformat = 'text'\r\n")
    assert world.load().settings.format == "text"


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("4M", "write MB (1,000,000 bytes) or MiB (1,048,576 bytes)"),
        ("4k", "write kB (1,000 bytes) or KiB (1,024 bytes)"),
        ("4G", "write GB (1,000,000,000 bytes) or GiB (1,073,741,824 bytes)"),
    ],
)
def test_a_letter_alone_is_told_both_units(world: World, size: str, says: str) -> None:
    world.environ["INGESTD_BATCH__BYTES_MAX"] = size
    assert says in world.problem()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("batch.records_max", '"many"', "'many' is not a whole number"),
        ("batch.records_max", "true", "True is not a whole number"),
        ("batch.records_max", "1.5", "1.5 is not a whole number"),
        ("batch.records_max", "0", "should be at least 1"),
        ("batch.records_max", "[1]", "is not a whole number"),
        ("batch.age_max", '"1 parsec"', "'1 parsec' is not a time"),
        ("batch.age_max", "-1", "should be at least 0s"),
        ("batch.age_max", '"2d"', "should be at most 24h"),
        ("batch.bytes_max", '"4M"', "'4M' is not a size"),
        ("batch.bytes_max", '"17GiB"', "should be at most 16GiB"),
        ("executor.workers", "0", "should be at least 1"),
        ("executor.timeout", "0", "should be more than 0s"),
        ("executor.kind", '"fork"', "should be 'auto', 'process', 'thread' or 'async'"),
        ("executor.factory", '"pool"', "should be module:callable"),
        ("format", "7", "should be 'json', 'text' or 'bytes'"),
        ("http.listen", '"8080"', "HOST:PORT"),
        ("http.listen", "8080", "should be text: put it in quotes"),
        ("executor.kind", '"proces"', "; did you mean 'process'?"),
        ("admin.listen", '"x"', "HOST:PORT"),
        ("handler.target", '""', "should not be empty"),
        ("handler.target", "1979-05-27", "should be text"),
        ("data_dir", "5", "should be the path of a folder"),
        ("data_dir", '""', "should be the path of a folder"),
        ("batch", "5", "is a table: set a key in it, like batch.records_max"),
        ("handler", '"a:b"', "is a table: set a key in it, like handler.target"),
        ("handler.options", '"a"', "is a table"),
        ("handler.options.at", "1979-05-27", "should be text, a number"),
        ("pipelines", "5", "is a table: set a key in it, like pipelines.clicks.handler.target"),
        ("pipelines.clicks", "5", "is a table"),
        ("pipelines.clicks.retry", "5", "like pipelines.clicks.retry.attempts_max"),
        ("pipelines.clicks.executor.workers", "0", "should be at least 1"),
        ("pipelines.Clicks.executor.workers", "1", "a pipeline's name"),
        ("pipelines.default.executor.workers", "1", "is set at the top level"),
    ],
)
def test_a_wrong_value_in_the_file_is_one_line_with_key_and_origin(
    world: World, key: str, value: str, says: str
) -> None:
    where = world.toml(f"{key} = {value}")
    line = world.problem()
    assert line.startswith(".".join(key.split(".")[:2]))
    assert f"(file {where})" in line
    assert says in line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("INGESTD_BATCH__AGE_MAX", "soon", "'soon' is not a time"),
        ("INGESTD_BATCH", "5", "like INGESTD_BATCH__RECORDS_MAX"),
        ("INGESTD_PIPELINES", "{}", "like INGESTD_PIPELINES__CLICKS__HANDLER__TARGET"),
        ("INGESTD_HANDLER__OPTIONS", "[1]", "JSON object"),
        ("INGESTD_HANDLER__OPTIONS", '{"x": null}', "should be text, a number"),
        ("INGESTD_PIPELINES__1__FORMAT", "json", "a pipeline's name"),
    ],
)
def test_a_wrong_variable_is_one_line_with_its_name(
    world: World, name: str, value: str, says: str
) -> None:
    world.environ[name] = value
    line = world.problem()
    assert f"(env {name})" in line
    assert says in line


def test_all_problems_of_all_layers_come_at_once(world: World) -> None:
    world.toml('nonsense = 1\n[batch]\nage_max = "soon"\n')
    world.secret("ingestd_nonsense", "1")
    world.environ |= {"INGESTD_NONSENSE": "1", "INGESTD_LOG__LEVEL": "loud"}
    world.flag("executor.workers", "none")
    lines = world.problems()
    assert len(lines) == 6
    for key in ("nonsense (file", "secret ", "INGESTD_NONSENSE", "log.level", "batch.age_max",
                "executor.workers"):  # fmt: skip
        assert any(key in line for line in lines), key


def test_what_a_pipeline_takes_from_the_top_is_reported_once(world: World) -> None:
    world.toml("[executor]\nworkers = 0\n[pipelines.a]\n[pipelines.b]\n")
    assert world.problem().startswith("executor.workers ")
    world.toml('[retry]\nbackoff = "2m"\n[pipelines.a]\n[pipelines.b]\n')
    assert world.problem().startswith("retry.backoff_max (default): 60s is shorter than ")


def test_a_contradiction_names_the_key_and_where_it_came_from(world: World) -> None:
    world.environ["INGESTD_PIPELINES__A__QUEUE__BYTES_MAX"] = "1MiB"
    assert world.problem() == (
        "pipelines.a.queue.bytes_max (env INGESTD_PIPELINES__A__QUEUE__BYTES_MAX): "
        "1MiB has no room for one batch of batch.bytes_max (4MiB)"
    )


def test_a_list_is_written_in_every_layer_and_the_upper_one_is_whole(world: World) -> None:
    key, name = "http.cors_origins", "ingestd_http__cors_origins"
    world.toml('[http]\ncors_origins = ["https://a.example", "https://b.example"]')
    assert world.load().settings.http.cors_origins == ("https://a.example", "https://b.example")
    world.secret(name, "https://c.example,https://d.example\n")
    assert world.load().settings.http.cors_origins == ("https://c.example", "https://d.example")
    world.environ[name.upper()] = "https://e.example https://f.example"
    assert world.load().settings.http.cors_origins == ("https://e.example", "https://f.example")
    world.flag(key, '["https://g.example"]')
    assert world.load().settings.http.cors_origins == ("https://g.example",)
    assert world.load().origins[key] == f"flag --{key}"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("null", "sandboxed"),
        ("* https://a.example", "alone"),
        ("https://a.example/", "without a path"),
        ("https://A.example", "small letters"),
        ("https://a.example:443", "usual port"),
        ("http://a.example:80", "usual port"),
        ("a.example", "scheme://host"),
        ("[https://a.example", "list of words"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(world: World, written: str, said: str) -> None:
    world.flag("http.cors_origins", written)
    with pytest.raises(
        ConfigError, match=r"^http\.cors_origins \(flag --http\.cors_origins\): "
    ) as no:
        world.load()
    assert said in str(no.value)


def test_origins_as_browsers_send_them(world: World) -> None:
    origins = ("http://localhost:3000", "https://a.example:8443", "http://[::1]:1", "app://x_1")
    world.flag("http.cors_origins", ", ".join(origins))
    assert world.load().settings.http.cors_origins == origins


def test_an_empty_pipeline_is_a_pipeline(world: World) -> None:
    world.toml("[pipelines.a]\n")
    assert list(world.load().settings.pipelines) == ["a"]


def test_an_empty_handler_table_is_taken_whole(world: World) -> None:
    world.toml('handler.target = "a:b"\n[pipelines.a.handler]\n')
    loaded = world.load()
    assert loaded.settings.pipelines["a"].handler.target == "jsonl"
    assert loaded.origins["pipelines.a.handler.target"] == "default"


def test_options_of_all_layers_are_joined(world: World) -> None:
    file = world.toml('handler.options = {table = "t", port = 5, deep = {a = 1, b = 2}}')
    world.secret("ingestd_handler__options__dsn", "postgres://u:p@h\n")
    world.environ["INGESTD_HANDLER__OPTIONS__PORT"] = "6"
    world.environ["INGESTD_HANDLER__OPTIONS__DEEP__B"] = "3"
    world.flag("handler.options.table", "u")
    loaded = world.load()
    assert loaded.settings.handler.options == {
        "table": "u", "port": "6", "dsn": "postgres://u:p@h", "deep": {"a": 1, "b": "3"},
    }  # fmt: skip
    assert loaded.origins["handler.options.deep.a"] == f"file {file}"
    assert loaded.origins["handler.options.deep.b"] == "env INGESTD_HANDLER__OPTIONS__DEEP__B"


def test_options_as_one_json_object_keep_their_types(world: World) -> None:
    world.environ["INGESTD_HANDLER__OPTIONS"] = '{"port": 5, "on": true, "hosts": ["a", "b"]}'
    loaded = world.load()
    assert loaded.settings.handler.options == {"port": 5, "on": True, "hosts": ["a", "b"]}
    assert loaded.origins["handler.options.port"] == "env INGESTD_HANDLER__OPTIONS"


def test_an_upper_text_replaces_a_table_below_it_and_the_other_way_round(world: World) -> None:
    world.toml('handler.options = {x = {a = 1}, y = "text"}')
    world.environ |= {"INGESTD_HANDLER__OPTIONS__X": "1", "INGESTD_HANDLER__OPTIONS__Y__Z": "2"}
    loaded = world.load()
    assert loaded.settings.handler.options == {"x": "1", "y": {"z": "2"}}
    assert "handler.options.x.a" not in loaded.origins


@pytest.mark.parametrize("opened", ['{"a":', "["])
def test_options_that_are_nested_too_deep_are_refused(world: World, opened: str) -> None:
    closed = {"[": "]"}.get(opened, "}")
    inner = opened * 500 + ("1" if closed == "}" else "") + closed * 500
    world.environ["INGESTD_HANDLER__OPTIONS"] = f'{{"x": {inner}}}'
    assert "nested deeper" in world.problem()


def test_a_secret_keeps_its_spaces_and_loses_one_line_end(world: World) -> None:
    world.secret("ingestd_handler__options__a", " x \r\n")
    world.secret("ingestd_handler__options__b", "x\n\n")
    world.secret("ingestd_handler__options__c", "")
    assert world.load().settings.handler.options == {"a": " x ", "b": "x\n", "c": ""}


def test_a_secret_that_cannot_be_read_is_named(world: World) -> None:
    (world.root / "run" / "ingestd_handler__options__a").write_bytes(b"\xff\xfe")
    (world.root / "run" / "ingestd_handler__options__b").write_bytes(b"x" * (2**20 + 1))
    (world.root / "run" / "ingestd_handler__options__c").symlink_to("lost")
    lines = world.problems()
    assert [line.split("options__")[1][0] for line in lines] == ["a", "b", "c"]


def test_a_folder_of_secrets_need_not_exist(world: World) -> None:
    world.environ["CREDENTIALS_DIRECTORY"] = str(world.root / "lost")
    assert world.load().settings == Settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch.age_max", "hunter2"),
        ("batch.bytes_max", "hunter2"),
        ("batch.records_max", "hunter2"),
        ("log.level", "hunter2"),
        ("http.listen", "hunter2"),
        ("source.pipeline", "hunter2"),
        ("handler.options", "hunter2"),
        ("nonsense", "hunter2"),
        ("batch", "hunter2"),
    ],
)
def test_no_error_shows_what_is_in_a_secret(world: World, key: str, value: str) -> None:
    where = world.write("credential", key, value)
    line = world.problem()
    assert "hunter2" not in line
    assert where.removeprefix("secret ") in line


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("http.tokens.shop.token", "should be 16 to 512 visible ASCII characters without spaces"),
        ("http.tokens.shop.hash", "should be sha256: and 64 hexadecimal digits"),
        ("admin.tokens.ops.token", "should be 16 to 512 visible ASCII characters without spaces"),
        ("hooks.ops.url", "is not valid: should be the URL of the receiver"),
        ("hooks.ops.secret", "should be whsec_ and base64"),
    ],
)
def test_a_wrong_value_in_a_secret_is_explained(world: World, key: str, said: str) -> None:
    world.write("credential", key, "hunter2")
    (line,) = (line for line in world.problems() if key in line)
    assert said in line
    assert "hunter2" not in line


def test_an_empty_secret_is_named(world: World) -> None:
    world.secret("ingestd_http__tokens__shop__token", "")
    line = world.problem()
    assert line.startswith("http.tokens.shop (secret ")
    assert "is empty" in line


def test_no_error_shows_an_option(world: World) -> None:
    world.toml('handler.options = {password = "hunter2", at = 1979-05-27}')
    line = world.problem().replace(str(world.root), "")  # whose number may be that year
    assert "hunter2" not in line
    assert "1979" not in line


def test_a_journal_has_room_for_what_a_stream_appends_at_once(world: World) -> None:
    """Smaller, it would refuse such an append for ever, and nobody would know."""
    world.toml('[journal]\nbytes_max = "3MiB"\n[source]\nkind = "stdin"\n')
    assert world.problem().endswith("3MiB has no room for two blocks of input (4MiB)")
