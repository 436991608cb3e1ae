"""compose.yaml: what it names is there, and its daemon really comes up by it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ingestd.config.units import parse_seconds
from ingestd.prove.servers import free_port
from ingestd.settings import Settings
from tests.deploy.base import ROOT
from tests.deploy.containers.container import Spoken
from tests.deploy.containers.engine import RUN, tool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.deploy.containers.engine import Engine

FOLDER = ROOT / "deploy" / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: Mapping[str, dict[str, Any]] = COMPOSE["services"]


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """Made by the shipped script, in a copy of the folder."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    folder = tmp_path / "deploy" / "docker"
    shutil.rmtree(folder / "secrets", ignore_errors=True)
    subprocess.run([folder / "make-secrets"], check=True)
    return {path.name: path.read_text() for path in (folder / "secrets").iterdir()}


def test_secrets_are_made_once_and_are_those_that_compose_names(
    secrets: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "deploy" / "docker"
    named = {Path(secret["file"]) for secret in COMPOSE["secrets"].values()}
    assert {folder / path for path in named} == set((folder / "secrets").iterdir())
    assert secrets["postgres.password"] in secrets["postgres.dsn"]
    assert len({*secrets.values()}) == 4
    assert re.fullmatch("[0-9a-f]{64}", secrets["shop.token"])
    assert (folder / "secrets").stat().st_mode & 0o777 == 0o700
    subprocess.run([folder / "make-secrets"], check=True)
    again = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    assert again == secrets


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_names_is_there(name: str) -> None:
    service = SERVICES[name]
    for secret in service.get("secrets", []):
        assert (secret if isinstance(secret, str) else secret["source"]) in COMPOSE["secrets"]
    for mount in service.get("volumes", []):
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (FOLDER / source).is_file()
            assert mount.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]
    # Images that are not made here have a version.
    assert "build" in service or re.search(r":v?\d", service["image"])
    if "build" in service:
        assert (FOLDER / service["build"] / "Dockerfile").is_file()


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_reached_from_elsewhere_or_may_do_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "privileged" not in service
    if name != "postgres":  # whose entry point changes the owner of its volume
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_docker_waits_longer_than_the_daemon_takes_to_leave() -> None:
    drain = Settings().drain
    grace = parse_seconds(SERVICES["ingestd"]["stop_grace_period"])
    assert grace >= drain.delay + drain.timeout + 10


def test_prometheus_asks_the_daemon() -> None:
    scraped = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = scraped["scrape_configs"]
    (target,) = (name for config in job["static_configs"] for name in config["targets"])
    host, _, port = target.partition(":")
    assert host in SERVICES
    assert f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]


@pytest.mark.slow
def test_its_daemon_comes_up_with_its_secrets(
    engine: Engine, secrets: dict[str, str], tmp_path: Path
) -> None:
    """Without its database, whose image can't be had everywhere: it takes records all the same."""
    podman_compose = tool("podman-compose")
    if not podman_compose:
        pytest.skip("needs podman-compose")
    file = tmp_path / "deploy" / "docker" / "compose.yaml"
    one = Spoken()
    one.port, one.admin_port = free_port(), free_port()
    text = file.read_text().replace('"127.0.0.1:8080:', f'"127.0.0.1:{one.port}:')
    file.write_text(text.replace('"127.0.0.1:8081:', f'"127.0.0.1:{one.admin_port}:'))
    environ = engine.environ()
    environ["PATH"] = f"{engine.shim(tmp_path / 'bin')}{os.pathsep}{environ['PATH']}"

    def compose(*args: str) -> None:
        command = [podman_compose, "--in-pod", "false", "-f", str(file), "-p", f"{RUN}-compose"]
        done = subprocess.run(
            [*command, *args], env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout

    try:
        compose("up", "--detach", "ingestd")
        one.until_ready()
        status, answer = one.request(
            "POST", "/v1/records", b'{"user":"ada"}', token=secrets["shop.token"]
        )
        assert (status, answer["accepted"]) == (202, 1)
        assert one.request("POST", "/v1/records", b"{}", token="")[0] == 401
        assert one.numbers()["pending"] == 1
        log = engine("logs", f"{RUN}-compose_ingestd_1")
        assert secrets["shop.token"] not in log
        assert secrets["postgres.password"] not in log
    finally:
        # Its sink is not there: a drain would take its whole time.
        compose("down", "--volumes", "--timeout", "1")
