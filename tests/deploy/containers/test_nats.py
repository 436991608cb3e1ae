"""NATS and daemons without volumes, as compose and the manifests ship them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ingestd.config.units import parse_seconds
from ingestd.prove.servers import free_port
from ingestd.settings import Settings
from tests.daemon.harness import daemon, written
from tests.deploy.base import ROOT
from tests.deploy.containers.engine import run, tool
from tests.deploy.containers.manifests import FOLDER, container, objects, one, workload
from tests.nats import needs_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCKER = ROOT / "deploy" / "docker" / "nats"
SERVER, READERS = FOLDER / "nats" / "server", FOLDER / "nats" / "ingestd"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
CONFIG = (DOCKER / "nats.conf").read_text()
PASSWORD = "p0123456789abcdef"


# -- compose -------------------------------------------------------------------------------------


def test_secrets_are_made_once_and_are_those_that_compose_names(tmp_path: Path) -> None:
    script = tmp_path / "make-secrets"
    script.write_bytes((DOCKER / "make-secrets").read_bytes())
    script.chmod(0o755)
    subprocess.run([script], check=True)
    password = (tmp_path / "secrets" / "nats.password").read_text()
    assert re.fullmatch("p[0-9a-f]{64}", password)
    assert (tmp_path / "secrets" / "nats.env").read_text() == f"NATS_PASSWORD={password}\n"
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    subprocess.run([script], check=True)
    assert (tmp_path / "secrets" / "nats.password").read_text() == password
    assert COMPOSE["secrets"] == {"nats_password": {"file": "secrets/nats.password"}}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_names_what_is_there_and_may_do_no_more_than_it_needs(name: str) -> None:
    service = COMPOSE["services"][name]
    for mount in service["volumes"]:
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (DOCKER / source).is_file()
            assert mount.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]
    assert "build" in service or re.search(r":\d", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name.startswith("nats"):
        assert service["environment"] == {"SERVER_NAME": name}
        assert f"{name}:6222" in CONFIG
        left = re.findall(r"lame_duck_\w+: (\S+)", CONFIG)
        assert parse_seconds(service["stop_grace_period"]) >= sum(map(parse_seconds, left))


def test_its_daemons_have_no_volume_and_settings_that_are_settings() -> None:
    service = COMPOSE["services"]["ingestd"]
    assert service["deploy"] == {"replicas": 2}
    assert not [mount for mount in service["volumes"] if not mount.endswith(":ro")]
    settings = Settings(**tomllib.loads((DOCKER / "ingestd.toml").read_text()) | {
        "nats": {"servers": service["environment"]["INGESTD_NATS__SERVERS"], "stream": "RECORDS",
                 "username": "ingestd", "password": "x"},
    })  # fmt: skip
    assert settings.journal.kind == "memory"
    assert len(settings.nats.servers) == 3
    grace = parse_seconds(service["stop_grace_period"])
    assert grace >= settings.drain.delay + settings.drain.timeout + 10


class Shipped:
    """Three servers with the configuration as it is shipped, but for addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [(free_port(), free_port(), free_port()) for _ in range(3)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.urls = [f"nats://127.0.0.1:{port}" for port, _, _ in self.ports]
        for number, (port, monitor, route) in enumerate(self.ports, 1):
            text = CONFIG.replace("/data", str(folder / f"nats{number}"))
            for of, own in ((4222, port), (8222, monitor), (6222, route)):
                assert f'"0.0.0.0:{of}"' in text
                text = text.replace(f'"0.0.0.0:{of}"', f'"127.0.0.1:{own}"')
            for other, (_, _, there) in enumerate(self.ports, 1):
                text = text.replace(f"nats{other}:6222", f"127.0.0.1:{there}")
            (folder / f"nats{number}.conf").write_text(text)
            self.processes.append(self._start(number))

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "SERVER_NAME": f"nats{number}", "NATS_PASSWORD": PASSWORD}
        with (self.folder / f"nats{number}.log").open("ab") as log:
            return subprocess.Popen(
                [needs_server(), "-c", self.folder / f"nats{number}.conf"], env=environ,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def jsz(self, number: int) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.ports[number][1]}/jsz"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return dict(json.load(answer))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def shipped(tmp_path: Path) -> Iterator[Shipped]:
    servers = Shipped(tmp_path)
    yield servers
    servers.close()


PUBLISH = """
import asyncio, sys, time
import nats, nats.errors

async def publish(password, first, end, *urls):
    client = await nats.connect(list(urls), user="ingestd", password=password)
    stream = client.jetstream(timeout=30)
    until = time.monotonic() + 100
    for n in range(int(first), int(end)):
        while True:
            try:
                await stream.publish("records.a", b'{"n":%d}' % n, headers={"Nats-Msg-Id": str(n)})
                break
            except nats.errors.Error:  # a leader is elected
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)
    await client.close()

asyncio.run(publish(*sys.argv[1:]))
"""


def publish(urls: list[str], first: int, end: int) -> None:
    """In a process of its own, as nats-py leaves transports behind where a server is gone."""
    command = [sys.executable, "-c", PUBLISH, PASSWORD, str(first), str(end), *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_three_servers_a_stream_and_a_daemon_that_reads_it(
    shipped: Shipped, tmp_path: Path
) -> None:
    """And the loss of a server loses nothing."""
    (tmp_path / "password").write_text(PASSWORD)
    environ = {
        "INGESTD_NATS__SERVERS": ",".join(shipped.urls),
        "INGESTD_NATS__PASSWORD": PASSWORD,
    }
    for _ in range(2):  # the second time it is there
        done = subprocess.run(
            [sys.executable, DOCKER / "make_stream.py"], capture_output=True, text=True,
            timeout=180, env=os.environ | environ | {"PASSWORD_FILE": str(tmp_path / "password")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == "stream RECORDS: 3 replicas, ['records.>']\n"
    assert shipped.jsz(0)["config"]["sync_always"] is True
    with daemon("--config", str(DOCKER / "ingestd.toml"), cwd=tmp_path, environ=environ) as one:
        publish(shipped.urls, 0, 50)
        shipped.processes[0].kill()
        shipped.processes[0].wait()
        publish(shipped.urls[1:], 50, 100)
        deadline = time.monotonic() + 120
        while one.status()["pipelines"]["default"]["processed"] < 100:
            assert time.monotonic() < deadline, one.events
            time.sleep(0.05)
        one.terminate()
        assert one.wait() == 0
    assert {json.loads(line)["n"] for line in written(tmp_path)} == set(range(100))


# -- Kubernetes ----------------------------------------------------------------------------------


def test_both_places_have_the_same_servers_and_the_same_stream() -> None:
    there = (SERVER / "nats.conf").read_text()
    for number in (1, 2, 3):
        there = there.replace(f"nats-{number - 1}.nats-pods:6222", f"nats{number}:6222")
    there = there.replace('pid_file: "/run/nats/nats.pid"\n\n', "").replace("$POD", "$SERVER")

    def told(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.strip().startswith("#")]

    assert told(there) == told(CONFIG)
    script = (DOCKER / "make_stream.py").read_text()
    assert (SERVER / "make_stream.py").read_text() == script


def restricted(pod: dict[str, Any]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    for each in pod["containers"]:
        own = each["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} == each["resources"].keys()
        names = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
        assert {mount["name"] for mount in each["volumeMounts"]} <= names


@pytest.mark.slow
def test_the_servers_keep_a_majority() -> None:
    found = objects(SERVER)
    stateful = one(found, "StatefulSet")
    spec, template = stateful["spec"], stateful["spec"]["template"]
    restricted(template["spec"])
    restricted(one(found, "Job")["spec"]["template"]["spec"])
    assert spec["replicas"] == 3
    assert spec["podManagementPolicy"] == "Parallel"
    assert set(spec["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    room = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) * 1.024**3
    assert room > int(re.findall(r"max_file_store: (\d+)GB", CONFIG)[0])
    budget = one(found, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == (
        "kubernetes.io/hostname", "DoNotSchedule",
    )  # fmt: skip
    labels = template["metadata"]["labels"]
    selectors = [o["spec"]["selector"] for o in found if o["kind"] == "Service"]
    selectors += [
        budget["selector"]["matchLabels"],
        one(found, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        spec["selector"]["matchLabels"],
    ]
    job = one(found, "Job")["spec"]["template"]["metadata"]["labels"]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= job.items()
    ports = {port["name"]: port["containerPort"] for port in container(found)["ports"]}
    assert ports == {"client": 4222, "cluster": 6222, "monitor": 8222}
    left = re.findall(r"lame_duck_\w+: (\S+)", CONFIG)
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace >= sum(map(parse_seconds, left)) + 10
    password = one(found, "Secret", "nats-password")
    assert list(password["data"]) == ["password"]
    assert "CHANGE-ME" in (SERVER / "kustomization.yaml").read_text()


@pytest.mark.slow
def test_the_readers_are_a_deployment_without_volumes() -> None:
    found = objects(READERS)
    assert not [o for o in found if o["kind"] in {"StatefulSet", "PersistentVolumeClaim"}]
    deployment = workload(found)
    assert deployment["kind"] == "Deployment"
    assert "replicas" not in deployment["spec"]
    pod = deployment["spec"]["template"]["spec"]
    restricted(pod)
    assert {key for volume in pod["volumes"] for key in volume} == {
        "name", "configMap", "secret", "emptyDir",
    }  # fmt: skip
    environ = {e["name"]: e["value"] for e in container(found)["env"]}
    assert environ["INGESTD_JOURNAL__KIND"] == "memory"
    (text,) = (o["data"]["ingestd.toml"] for o in found if "ingestd.toml" in o.get("data", {}))
    own = tomllib.loads(text)
    own["nats"]["password"] = "x"
    settings = Settings(**own)
    assert [one.kind for one in settings.running_sources()] == ["nats"]
    mounts = {m["mountPath"]: m["name"] for m in container(found)["volumeMounts"]}
    (volume,) = (v for v in pod["volumes"] if v["name"] == mounts["/run/secrets"])
    secret = one(found, "Secret", volume["secret"]["secretName"])
    assert list(secret["data"]) == ["ingestd_nats__password"]
    assert [port["name"] for port in container(found)["ports"]] == ["admin"]
    assert [o["metadata"]["name"] for o in found if o["kind"] == "Service"] == ["ingestd-pods"]
    (rule,) = one(found, "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": "admin", "protocol": "TCP"}]
    grace = pod["terminationGracePeriodSeconds"]
    assert grace >= settings.drain.delay + settings.drain.timeout + 10


@pytest.mark.slow
def test_messages_that_wait_decide_how_many_readers_there_are() -> None:
    found = objects(READERS)
    spec = one(found, "ScaledObject")["spec"]
    target = spec["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", workload(found)["metadata"]["name"])
    (trigger,) = spec["triggers"]
    own = tomllib.loads((READERS / "ingestd.toml").read_text())["nats"]
    assert trigger["type"] == "nats-jetstream"
    assert trigger["metadata"]["stream"] == own["stream"]
    assert trigger["metadata"]["consumer"] == own["durable"]
    host = trigger["metadata"]["natsServerMonitoringEndpoint"]
    service = one(objects(SERVER), "Service", host.partition(".")[0])
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert host.endswith(f":{ports['monitor']}")
    assert own["servers"] == [f"nats://nats:{ports['client']}"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    (policy,) = behavior["scaleDown"]["policies"]
    grace = workload(found)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert policy["periodSeconds"] >= grace


@pytest.mark.slow
@pytest.mark.parametrize("folder", [SERVER, READERS], ids=lambda folder: folder.name)
def test_kubernetes_own_schemas_fit(folder: Path, tmp_path: Path) -> None:
    validate = tool("kubernetes-validate")
    if not validate:
        pytest.skip("needs kubernetes-validate")
    known = [o for o in objects(folder) if o["kind"] != "ScaledObject"]
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(known))
    done = run(validate, "--strict", "-k", "1.31", str(path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passed") == len(known)
