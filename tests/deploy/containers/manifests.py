"""The manifests as `kubectl apply -k` and `helm install` would send them."""

from __future__ import annotations

import base64
import functools
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.base import ROOT
from tests.deploy.containers.engine import run, tool

if TYPE_CHECKING:
    from pathlib import Path

Object = dict[str, Any]

FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
OVERLAYS = sorted(path for path in (FOLDER / "overlays").iterdir() if path.is_dir())
KUSTOMIZE_MIN = (4, 5)

CHART = ROOT / "deploy" / "helm" / "ingestd"
"""The chart with its defaults, where a folder of kustomize is asked for."""
VALUES = CHART.parent / "values"
"""The chart with one of these files of values, likewise."""
# Of operators; there are no schemas of them to be had.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
HASH = f"sha256:{'0' * 64}"


@functools.cache
def unable() -> str:
    """Why nothing can be rendered here; empty if it can."""
    kubectl = tool("kubectl")
    if not kubectl:
        return "needs kubectl"
    done = subprocess.run(
        [kubectl, "version", "--client", "-o", "json"], capture_output=True, text=True
    )
    version = json.loads(done.stdout or "{}").get("kustomizeVersion", "v0.0")
    if tuple(map(int, version.lstrip("v").split(".")[:2])) < KUSTOMIZE_MIN:
        return "needs a kubectl with kustomize 4.5 (kubectl 1.24) or newer"
    return ""


def helm(*arguments: str, values: Object | None = None) -> subprocess.CompletedProcess[str]:
    """Calls helm, with values from its standard input if there are some."""
    if not tool("helm"):
        pytest.skip("needs helm")
    more = [] if values is None else ["--values", "-"]
    return subprocess.run(
        [tool("helm"), *arguments, *more], input=json.dumps(values), capture_output=True, text=True
    )


def chart(file: Path | None = None, **values: Any) -> str:
    """What the chart renders to, as the release `ingestd` with a token of the name `shop`."""
    files = ["--values", str(file)] if file else []
    values.setdefault("tokens", {"hashes": {"shop": HASH}})
    done = helm("template", "ingestd", str(CHART), *files, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made_with(file: Path | None = None, **values: Any) -> list[Object]:
    """The objects of the chart with values on top of its defaults and of a file of them."""
    return [o for o in yaml.safe_load_all(chart(file, **values)) if o]


@functools.cache
def rendered(folder: Path) -> str:
    if folder.is_relative_to(CHART.parent):
        return chart(folder if folder.is_file() else None)
    if why := unable():
        pytest.skip(why)
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # a warning: something is deprecated
    return done.stdout


def objects(folder: Path) -> list[Object]:
    return [o for o in yaml.safe_load_all(rendered(folder)) if o]


def assert_valid(found: list[Object], path: Path) -> None:
    """Holds objects against Kubernetes' own schemas, by way of a file at `path`."""
    validate = tool("kubernetes-validate")
    if not validate:
        pytest.skip("needs kubernetes-validate")
    known = [o for o in found if o["kind"] not in CUSTOM]
    path.write_text(yaml.safe_dump_all(known))
    done = run(validate, "--strict", "-k", "1.31", str(path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passed") == len(known)


def one(found: list[Object], kind: str, name: str = "") -> Object:
    (match,) = (
        o for o in found if o["kind"] == kind and (not name or o["metadata"]["name"] == name)
    )
    return match


def workload(found: list[Object]) -> Object:
    (match,) = (o for o in found if o["kind"] in {"StatefulSet", "Deployment"})
    return match


def container(found: list[Object]) -> Object:
    (only,) = workload(found)["spec"]["template"]["spec"]["containers"]
    return dict(only)


def replica(found: list[Object], name: str, ports: dict[str, int]) -> str:
    """A workload's first replica, made as its controller makes it, for `podman kube play`.

    What podman 4.3 can't do is done for it: a secret's data is decoded and becomes a config map's
    (it would mount the base64), and ports are published on this machine.

    Args:
        found: everything that was rendered.
        name: of the pod, and what its volumes' names end with.
        ports: of this machine, by the ports' names.
    """
    made: list[Object] = []
    template = json.loads(json.dumps(workload(found)["spec"]["template"]))
    volumes = template["spec"]["volumes"]
    for item in found:
        if item["kind"] == "ConfigMap":
            made.append(item)
        elif item["kind"] == "Secret":
            data = {k: base64.b64decode(v).decode() for k, v in item["data"].items()}
            made.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": item["metadata"],
                         "data": data})  # fmt: skip
    for volume in volumes:
        if secret := volume.pop("secret", None):
            volume["configMap"] = {"name": secret["secretName"]}
    for claim in workload(found)["spec"].get("volumeClaimTemplates", []):
        # Named as podman names its volumes; the run makes them, and keeps them between pods.
        own = f"{name}-{claim['metadata']['name']}"
        source = {"persistentVolumeClaim": {"claimName": own}}
        volumes.append({"name": claim["metadata"]["name"], **source})
    # Names of config maps become names of podman's volumes, which are the run's alone.
    for part in made:
        if part["kind"] == "ConfigMap":
            old = part["metadata"]["name"]
            part["metadata"] = {"name": f"{name}-{old}"}
            for volume in volumes:
                if volume.get("configMap", {}).get("name") == old:
                    volume["configMap"]["name"] = f"{name}-{old}"
    for each in template["spec"]["containers"]:
        each["imagePullPolicy"] = "Never"
        for port in each["ports"]:
            port |= {"hostIP": "127.0.0.1", "hostPort": ports[port["name"]]}
    made.append({"apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
                 "metadata": {"name": name, "labels": template["metadata"]["labels"]}})  # fmt: skip
    return yaml.safe_dump_all(made)
