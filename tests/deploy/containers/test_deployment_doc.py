"""The commands in docs/DEPLOYMENT.md are run, in order, in a copy of the checkout."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

import ingestd
from ingestd.prove.servers import free_port
from tests.deploy.base import ROOT
from tests.deploy.containers import manifests
from tests.deploy.containers.engine import tool
from tests.deploy.containers.test_monitoring import RULES

if TYPE_CHECKING:
    from tests.deploy.containers.engine import Engine

PAGE = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
NEEDED = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "ingestd",
          "requirements", "deploy")  # fmt: skip


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def blocks(title: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", section(title), re.DOTALL | re.MULTILINE)


def test_the_alerts_are_listed_as_they_are() -> None:
    listed = re.findall(r"^\| `(Ingestd\w+)` \| (\w+) \|", section("Watching it"), re.MULTILINE)
    assert sorted(listed) == sorted((rule["alert"], rule["labels"]["severity"]) for rule in RULES)


def test_what_it_says_of_handlers_is_the_shipped_dockerfile() -> None:
    shipped = (ROOT / "deploy" / "docker" / "handler" / "Dockerfile").read_text()
    assert f"```dockerfile\n{shipped}```" in section("Docker")
    assert f"ingestd:{ingestd.__version__}" in shipped


def test_files_that_it_names_are_there() -> None:
    for title in ("Docker", "Kubernetes", "Helm", "Watching it"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", section(title)):
            assert (ROOT / "docs" / link).exists(), link
    for folder in re.findall(r"^\| `([^`]+)` \|", section("Kubernetes"), re.MULTILINE):
        path = folder if folder.startswith("deploy/") else f"deploy/kubernetes/{folder}"
        assert (ROOT / path / "kustomization.yaml").is_file()


@pytest.mark.slow
def test_the_values_that_it_shows_are_the_charts(tmp_path: Path) -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", section("Helm"), re.DOTALL | re.MULTILINE)
    assert shown
    for block in shown:
        found = manifests.made_with(**yaml.safe_load(block))
        manifests.assert_valid(found, tmp_path / "objects.yaml")


@pytest.mark.slow
def test_the_commands_do_what_they_say(engine: Engine, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in NEEDED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "secrets", "mine")
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    shim = engine.shim(tmp_path / "bin")
    tools = [str(Path(tool(name)).parent) for name in ("kubectl", "helm") if tool(name)]
    environ = {"PATH": os.pathsep.join([str(shim), os.environ["PATH"], *tools])}
    ports = {f"127.0.0.1:{port}": f"127.0.0.1:{free_port()}" for port in (8080, 8081)}

    def script(commands: list[str]) -> str:
        text = "\n".join(commands)
        for written, free in ports.items():
            text = text.replace(written, free)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=copy, env=environ,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    try:
        said = script(blocks("Docker"))
    finally:
        # Their names are the document's; in this store nobody else has them.
        engine.start("rm", "--force", "--volumes", "--time", "0", "ingestd")
        engine.start("volume", "rm", "--force", "ingestd")
    assert '{"accepted":1,"invalid":0,"errors":[]}' in said
    assert '"event":"daemon_left","code":0' in said
    assert '"pending":0' in said
    assert said.count("# default: store:store is store:store") == 2
    if not manifests.unable():
        script(blocks("Kubernetes"))
        found = list(yaml.safe_load_all((copy / "rendered.yaml").read_text()))
        assert manifests.container(found)["image"] == "registry.example/shop/ingestd:1"
        assert {o["metadata"]["namespace"] for o in found} == {"ingestd"}
        (secret,) = (o for o in found if o["kind"] == "Secret")
        assert secret["data"].keys() == {"shop"}
        assert "CHANGE-ME" not in str(secret)
    if tool("helm"):
        script(blocks("Helm"))
        found = list(yaml.safe_load_all((copy / "chart.yaml").read_text()))
        assert manifests.container(found)["image"] == "registry.example/shop/ingestd:1"
        (secret,) = (o for o in found if o["kind"] == "Secret")
        hashed = base64.b64decode(secret["data"]["shop"]).decode()
        assert hashed == (copy / "shop.hash").read_text().strip()
    if tool("promtool"):
        assert "SUCCESS" in script(blocks("Watching it"))
