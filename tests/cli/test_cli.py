"""The command line as people meet it: real processes, their output and exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ingestd.config.keys import dotted, settings_of
from ingestd.settings import Settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # each test starts the program

HANDLERS = """
class Store:
    def __init__(self, **options): raise RuntimeError("check makes no handler")
    def __call__(self, batch: list[dict]) -> None: ...

def store(batch: list[dict]) -> None: ...
async def later(batch: list[dict]) -> None: ...
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(HANDLERS)
    return tmp_path


def ingestd(
    *arguments: str, cwd: Path, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command as the console script does: without the current folder on the path."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "ingestd", *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | (environ or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in run.stderr
    return run


def lines_of(out: str) -> dict[str, tuple[str, str]]:
    """Key to (value, origin) of what `check` printed."""
    found = {}
    for line in out.splitlines():
        if line and not line.startswith("#"):
            setting, origin = line.rsplit("  # ", 1)
            key, value = setting.split(" = ", 1)
            found[key] = (value.strip(), origin)
    return found


def test_check_says_what_is_in_effect_and_where_it_came_from(here: Path) -> None:
    (here / "ingestd.toml").write_text(
        'batch.age_max = "2s"\n[pipelines.clicks]\nhandler.target = "shop:store"\n'
    )
    run = ingestd(
        "check", "--batch.records_max", "500", "--listen=127.0.0.1:0", "shop:Store",
        "--pipelines.clicks.retry.backoff", "1s", "--handler.options.table", "t",
        "--http.cors_origins", "https://a.example, https://b.example",
        cwd=here, environ={"INGESTD_QUEUE__BYTES_MAX": "100MiB"},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    lines = lines_of(run.stdout)
    assert lines["batch.records_max"] == ("500", "flag --batch.records_max")
    assert lines["http.listen"] == ('"127.0.0.1:0"', "flag --listen")
    assert lines["http.cors_origins"] == (
        '["https://a.example", "https://b.example"]', "flag --http.cors_origins",
    )  # fmt: skip
    assert lines["handler.target"] == ('"shop:Store"', "argument HANDLER")
    assert lines["handler.options.table"] == ('"***"', "flag --handler.options.table")
    assert lines["queue.bytes_max"] == ('"100MiB"', "env INGESTD_QUEUE__BYTES_MAX")
    assert lines["batch.age_max"] == ('"2s"', f"file {here}/ingestd.toml")
    assert lines["drain.timeout"] == ('"30s"', "default")
    assert lines["pipelines.clicks.batch.age_max"] == ('"2s"', "as batch.age_max")
    assert lines["pipelines.clicks.retry.backoff"] == (
        '"1s"', "flag --pipelines.clicks.retry.backoff",
    )  # fmt: skip
    assert "# default: shop:Store is shop:Store" in run.stdout
    assert "# clicks: shop:store is shop:store" in run.stdout


def test_what_check_prints_is_a_configuration_with_the_same_effect(here: Path) -> None:
    (here / "ingestd.toml").write_text(
        'data_dir = "a \\"b\\" \\\\ \\u00e9\\n"\nhandler = { target = "shop:Store", options = '
        '{ n = 5, r = 0.5, on = true, l = [1, "x", {"a b" = 1}], e = {}, '
        '"odd.name" = "\\u0000" } }\n'
        "[pipelines.clicks]\nbatch.age_max = 0.00001\n"
    )
    first = ingestd("check", cwd=here)
    assert first.returncode == 0
    effective = tomllib.loads(first.stdout)
    written = tomllib.loads((here / "ingestd.toml").read_text())
    # Text is masked: nobody but the handler knows what it is.
    options = written["handler"]["options"]
    options["l"][1] = options["odd.name"] = "***"
    unsaid = {"transform": "", "targets": [], "validate": "process"}
    assert effective["handler"] == {**unsaid, **written["handler"]}
    assert effective["data_dir"] == str(here / written["data_dir"])
    (here / "again.toml").write_text(first.stdout)
    again = ingestd("check", "--config", "again.toml", cwd=here)
    assert again.returncode == 0
    assert tomllib.loads(again.stdout) == effective


def test_check_opens_nothing_and_creates_nothing(here: Path) -> None:
    before = sorted(here.iterdir())
    run = ingestd("check", "shop:Store", cwd=here, environ={"PYTHONDONTWRITEBYTECODE": "1"})
    assert run.returncode == 0
    assert sorted(here.iterdir()) == before


def test_check_without_a_handler_finds_the_sink(here: Path) -> None:
    run = ingestd("check", cwd=here)
    assert run.returncode == 0
    assert "# default: jsonl is ingestd.sinks.jsonl:JsonlSink" in run.stdout


def test_check_masks_what_looks_secret_and_what_came_from_a_secret(here: Path) -> None:
    hidden = ["hunter1", "hunter2", "hunter3", "hunter4", "hunter5", "hunter6", "hunter7"]
    (here / "credentials").mkdir()
    (here / "credentials" / "ingestd_handler__options__table").write_text("hunter1\n")
    (here / "ingestd.toml").write_text(
        'handler.target = "shop:Store"\n'
        "[handler.options]\n"
        'api_token = "hunter2"\n'
        'url = "postgres://me:hunter3@db/x"\n'
        'database = {PASSWORD = "hunter4", host = "visible"}\n'
        'list = [{secret_key = "hunter5"}]\n'
        "[pipelines.clicks]\n"
        "[hooks.ops]\n"
        'url = "https://hooks.example/x?key=hunter7"\n'
        f'secret = "whsec_{"A" * 32}"\n'
    )
    run = ingestd(
        "check", "--handler.options.dsn", "hunter6", cwd=here,
        environ={"CREDENTIALS_DIRECTORY": str(here / "credentials")},
    )  # fmt: skip
    assert run.returncode == 0
    assert [secret for secret in hidden if secret in run.stdout + run.stderr] == []
    lines = lines_of(run.stdout)
    assert lines["handler.options.table"] == (
        '"***"', f"secret {here}/credentials/ingestd_handler__options__table",
    )  # fmt: skip
    assert lines["pipelines.clicks.handler.options.table"][0] == '"***"'
    assert lines["handler.options.database.host"][0] == '"***"'
    assert lines["hooks.ops.url"][0] == '"https://hooks.example/x?…"'


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shop:lost"], "'lost'"),
        (["lost:store"], "'lost'"),
        (["shop:later", "--executor.kind", "thread"], "async"),
        (["shop:store", "--handler.options.x", "1"], "takes no options"),
        (["broken:store"], "ZeroDivisionError"),
        (["leaving:store"], "SystemExit"),
        (["ending:store"], "importing 'ending' raised SystemExit: os._exit(0) (ending.py:1)"),
        (["--pipelines.clicks.handler.target", "shop:lost"], "pipeline clicks: "),
    ],
)
def test_a_handler_that_cannot_be_had_is_one_line_and_78(
    here: Path, arguments: list[str], says: str
) -> None:
    (here / "broken.py").write_text("1 / 0\n")
    (here / "leaving.py").write_text("raise SystemExit(0)\n")
    (here / "ending.py").write_text("import os; os._exit(0)\n")
    run = ingestd("check", *arguments, cwd=here)
    assert run.returncode == 78
    (line,) = run.stderr.splitlines()
    assert line.startswith("ingestd: pipeline ")
    assert says in line


def test_a_child_of_a_module_may_end_itself(here: Path) -> None:
    forks = "import os\nif not os.fork():\n    os._exit(3)\nassert os.wait()[1] >> 8 == 3\n"
    (here / "forking.py").write_text(f"{forks}def store(batch): pass\n")
    run = ingestd("check", "forking:store", cwd=here)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_wrong_configuration_is_78_with_all_problems(here: Path, command: str) -> None:
    (here / "ingestd.toml").write_text("bacth.records_max = 1\n")
    run = ingestd(
        command, "--batch.age_max", "soon", "--source", "fax", cwd=here,
        environ={"INGESTD_BACTH": "1"},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (78, "")
    lines = run.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("ingestd: ") for line in lines)
    for part in ("unknown key bacth", "INGESTD_BACTH", "flag --batch.age_max", "flag --source"):
        assert any(part in line for line in lines)
    assert sorted(file.name for file in here.iterdir()) == ["ingestd.toml", "shop.py"]


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_setting_that_the_journal_cannot_keep_is_78(here: Path, command: str) -> None:
    done = ingestd(command, "--journal.kind", "memory", "--dead.age_max", "1h", cwd=here)
    assert done.returncode == 78
    assert "'memory' has no dead letters that could expire: dead.age_max" in done.stderr


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_handler_that_would_never_be_called_is_78_also_if_it_is_the_default(
    here: Path, command: str
) -> None:
    targets = '[handler]\ntargets = ["shop:store"]\n'
    (here / "own.toml").write_text(targets)
    for words, origin in (
        (["jsonl"], "argument HANDLER"),
        (["--handler.target", "jsonl"], "flag --handler.target"),
    ):
        run = ingestd(command, *words, "--config", "own.toml", cwd=here)
        assert run.returncode == 78
        assert run.stderr == (
            f"ingestd: handler.target ({origin}):"
            " jsonl would get nothing, as handler.targets is set too\n"
        )
    (here / "own.toml").write_text(f'{targets}target = "jsonl"\n')
    assert ingestd("check", "--config", "own.toml", cwd=here).returncode == 0


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_named_file_that_is_missing_is_78(here: Path, command: str) -> None:
    run = ingestd(command, "--config", "lost.toml", cwd=here)
    assert run.returncode == 78
    assert run.stderr == f"ingestd: there is no configuration file {here}/lost.toml\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--bacth.records_max", "5"], "did you mean --batch.records_max?"),
        (["run", "--batch.record_max=5", "shop:store"], "did you mean --batch.records_max?"),
        (["check", "--dta-dir", "x"], "did you mean --data-dir?"),
        (["check", "--lissten", "x"], "did you mean --listen?"),
        (["check", "--batch", "5"], "unknown flag --batch"),
        (["check", "--pipelines.a.bach.age_max", "5"], "did you mean --pipelines.a.batch.age_max?"),
        (["check", "--handler.optoins.x", "5"], "did you mean --handler.options"),
        (["check", "-x"], "unknown flag -x"),
        (["check", "a:b", "c:d"], "unexpected argument 'c:d'"),
        (["check", "--batch.age_max"], "expected one argument"),
        (["chekc"], "'chekc'"),
        (["--lissten"], "--lissten"),
        ([], "run or check"),
    ],
)
def test_wrong_use_is_2_and_says_what_was_meant(
    here: Path, arguments: list[str], says: str
) -> None:
    run = ingestd(*arguments, cwd=here)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("ingestd: ")
    assert says in line
    assert "--help" in line


def test_a_handler_may_stand_before_between_and_behind_the_flags(here: Path) -> None:
    for arguments in (
        ["shop:store", "--log.level", "debug"],
        ["--log.level", "debug", "shop:store"],
        ["--log.level=debug", "shop:store", "--format", "json"],
        ["--log.level=debug", "--", "shop:store"],
    ):
        run = ingestd("check", *arguments, cwd=here)
        assert run.returncode == 0, arguments
        assert lines_of(run.stdout)["handler.target"] == ('"shop:store"', "argument HANDLER")


def test_values_may_look_like_anything(here: Path) -> None:
    run = ingestd(
        "check", "sqlite", "--handler.options.columns", "-5", "--handler.options.table=--x=y%s {}",
        cwd=here,
    )  # fmt: skip
    lines = lines_of(run.stdout)
    assert lines["handler.options.columns"][0] == '"-5"'
    assert lines["handler.options.table"][0] == '"--x=y%s {}"'


@pytest.mark.parametrize("command", ["run", "check"])
def test_help_shows_every_setting_with_its_default(here: Path, command: str) -> None:
    run = ingestd(command, "--help", cwd=here, environ={"COLUMNS": "200"})
    assert (run.returncode, run.stderr) == (0, "")
    short = {"source.kind": "--source", "http.listen": "--listen", "data_dir": "--data-dir"}
    for path, _ in settings_of(Settings):
        flag = short.get(dotted(path), f"--{dotted(path)}")
        assert f"  {flag}" in run.stdout
    for text in ("[127.0.0.1:8080]", "[32MiB]", "[500ms]", "[1000]", "HANDLER", "78 configuration"):
        assert text in run.stdout


def test_help_and_version(here: Path) -> None:
    run = ingestd("--help", cwd=here)
    assert run.returncode == 0
    assert "run" in run.stdout
    assert "check" in run.stdout
    run = ingestd("--version", cwd=here)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("ingestd ")


@pytest.mark.parametrize("arguments", [["check"], ["run", "--help"], ["--version"]])
def test_a_reader_that_has_gone_is_no_error(here: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "ingestd", *arguments],
            cwd=here,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.mark.parametrize("replaced", ["", "sys.stdout = io.StringIO()"])
def test_what_a_module_prints_is_no_part_of_the_settings(here: Path, replaced: str) -> None:
    (here / "loud.py").write_text(f"import io, sys\nprint('loud', end='')\n{replaced}\n{HANDLERS}")
    run = ingestd("check", "loud:store", "--json", cwd=here)
    assert (run.returncode, run.stderr) == (0, "loud")
    assert json.loads(run.stdout)["exit_code"] == 0


def in_shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"{shlex.join([sys.executable, '-P', '-m', 'ingestd'])} {line}"],
        cwd=cwd, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("to", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")]
)
@pytest.mark.parametrize("command", ["check", "check --json", "token", "--version"])
def test_a_stdout_that_cannot_be_written_is_one_line(
    here: Path, command: str, to: str, why: str
) -> None:
    run = in_shell(f"{command} {to}", here)
    assert run.returncode == 1
    assert f"ingestd: standard output: {why}\n" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_closed_stdin_is_an_empty_one_and_a_closed_stderr_is_not_stdout(here: Path) -> None:
    run = in_shell("token --hash <&-", here)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    run = in_shell("try shop:store - <&-", here)
    assert (run.returncode, run.stderr) == (0, "")
    run = in_shell("check --nonsense 2>&-", here)
    assert (run.returncode, run.stdout) == (2, "")


def test_an_interrupted_command_is_one_line(here: Path) -> None:
    (here / "shop.py").write_text("raise KeyboardInterrupt\n")
    run = ingestd("check", "shop:store", cwd=here)
    assert run.returncode == 1
    assert run.stderr == "ingestd: interrupted\n"


def test_a_folder_that_is_gone_is_one_line(here: Path) -> None:
    gone = here / "gone"
    gone.mkdir()
    script = (
        f"import os, sys; os.rmdir({str(gone)!r}); "
        "from ingestd.__main__ import main; sys.exit(main(['check']))"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=gone,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 78
    assert run.stderr.startswith("ingestd: the current folder is gone")


def test_a_terminal_that_knows_only_ascii_gets_everything(here: Path) -> None:
    (here / "ingestd.toml").write_text('data_dir = "dätä→"\n')
    run = ingestd("check", cwd=here, environ={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert run.returncode == 0
    assert f'data_dir = "{here}/d\\xe4t\\xe4\\u2192"' in run.stdout


def test_importing_ingestd_is_light(here: Path) -> None:
    script = (
        "import sys, ingestd; ingestd.Batch, ingestd.Reject, ingestd.__version__; "
        "heavy = {'pydantic', 'pydantic_settings', 'aiohttp', 'structlog', 'asyncio'}; "
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=here,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_the_public_names() -> None:
    import ingestd as package
    from ingestd.handlers.batch import Batch, Reject

    assert package.Batch is Batch
    assert package.Reject is Reject
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018


SECRETS = {
    "hook": "https://hooks.slack.example/services/T0/B0/hunter",
    "sas": "https://x.blob.example/c?sv=1&sig=hunter",
    "headers": '{"Authorization": "Bearer hunter"}',
    "bearer": "Bearer hunter",
    "odd": "my+scheme:me:hunter@host",
    "plain": "hunter",
}


def test_options_are_masked_unless_they_are_known_to_be_harmless(here: Path) -> None:
    (here / "open.py").write_text(
        "class Open:\n"
        "    def __init__(self, **options): pass\n"
        "    def __call__(self, batch): pass\n"
    )
    flags = [part for key, value in SECRETS.items() for part in (f"--handler.options.{key}", value)]
    run = ingestd("check", "open:Open", "--handler.options.size", "50", *flags, cwd=here)
    assert run.returncode == 0
    assert "hunter" not in run.stdout + run.stderr
    assert lines_of(run.stdout)["handler.options.size"][0] == '"50"'


def test_what_a_sink_of_ours_is_told_is_shown(here: Path) -> None:
    run = ingestd("check", "sqlite", "--handler.options.table", "clicks", cwd=here)
    assert lines_of(run.stdout)["handler.options.table"][0] == '"clicks"'


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.parametrize("arguments", [["run", "--help"], ["--help"], ["prove", "--help"]])
def test_help_needs_no_utf_8(here: Path, arguments: list[str], environ: dict[str, str]) -> None:
    run = ingestd(*arguments, cwd=here, environ=environ)
    assert (run.returncode, run.stderr) == (0, "")
    assert "usage" in run.stdout
    # The flags of a command come before the settings, which fill some screens.
    if arguments[0] == "prove":
        assert run.stdout.index("--kills N  ") < run.stdout.index("--server-kills N  ")
        assert run.stdout.index("--server-kills N  ") < run.stdout.index("\nsettings:")


@pytest.mark.parametrize("level", ["0", "2"])
def test_messages_do_not_vanish_with_the_docstrings(here: Path, level: str) -> None:
    run = ingestd("check", "nothing:here", cwd=here, environ={"PYTHONOPTIMIZE": level})
    assert run.returncode == 78
    assert "no module named 'nothing'" in run.stderr
    run = ingestd("check", "--batch", "1", cwd=here, environ={"PYTHONOPTIMIZE": level})
    assert run.returncode == 2
    assert "unknown flag --batch" in run.stderr


def test_a_tilde_is_the_home_folder(here: Path) -> None:
    home = here / "home"
    run = ingestd(
        "check", "sqlite", "--data-dir", "~/x", "--handler.options.path", "~/y.db",
        "--fetch.file", "~/urls", cwd=here, environ={"HOME": str(home)},
    )  # fmt: skip
    lines = lines_of(run.stdout)
    assert lines["data_dir"][0] == f'"{home}/x"'
    assert lines["handler.options.path"][0] == f'"{home}/y.db"'
    assert lines["fetch.file"][0] == f'"{home}/urls"'
    run = ingestd("check", "--data-dir", "~nobody-here/x", cwd=here)
    assert run.returncode == 78
    assert "data_dir: there is no home folder for '~nobody-here/x'" in run.stderr


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_what_needs_no_settings_imports_none(here: Path, argument: str) -> None:
    script = (
        "import sys; from ingestd.__main__ import main; assert main([sys.argv[1]]) == 0; "
        "print(*sorted(sys.modules), sep='\\n', file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", script, argument],
        cwd=here, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    modules = set(run.stderr.splitlines())
    assert run.stdout
    assert "ingestd.cli.output" in modules
    assert not modules & {"ingestd.settings", "ingestd.daemon", "pydantic", "asyncio", "aiohttp"}


def test_a_command_imports_no_other(here: Path) -> None:
    script = (
        "import sys; from ingestd.__main__ import main; main(['token']); "
        "print(*[m for m in sys.modules if m.startswith('ingestd.cli.')])"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=here, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert set(run.stdout.splitlines()[-1].split()) == {"ingestd.cli.output", "ingestd.cli.token"}
