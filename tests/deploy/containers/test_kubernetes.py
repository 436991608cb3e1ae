"""A replica of the shipped manifests really runs, and leaves as kubelet makes it leave."""

from __future__ import annotations

import base64
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.http.credentials import hash_of
from ingestd.prove.servers import free_port
from tests.deploy.containers import manifests
from tests.deploy.containers.container import TOKEN, Spoken
from tests.deploy.containers.engine import RUN, wait, written
from tests.real_input import nginx_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.containers.engine import Engine

pytestmark = pytest.mark.slow


class Replica(Spoken):
    """The first one of a workload, in a pod of podman's; its volume outlives it."""

    def __init__(self, engine: Engine, folder: Path, name: str, where: Path) -> None:
        self.engine = engine
        self.name = f"{RUN}-{name}"
        self.main = f"{self.name}-ingestd"
        self.port, self.admin_port = free_port(), free_port()
        found = manifests.objects(folder)
        # What the operator does: a hash for the token that comes with it.
        (secret,) = (o for o in found if o["kind"] == "Secret")
        secret["data"]["shop"] = base64.b64encode(hash_of(TOKEN).encode()).decode()
        own = manifests.workload(found)["spec"]["template"]["spec"]
        self.grace = own["terminationGracePeriodSeconds"]
        self.probes = manifests.container(found)
        self.file = where / f"{name}.yaml"
        ports = {"http": self.port, "admin": self.admin_port}
        self.file.write_text(manifests.replica(found, self.name, ports))

        # Made for the workload, not by it: it outlives the pod.
        self.claims = [
            f"{self.name}-{claim['metadata']['name']}"
            for claim in manifests.workload(found)["spec"].get("volumeClaimTemplates", [])
        ]
        for claim in self.claims:
            engine("volume", "create", claim)

    def start(self) -> None:
        self.engine("kube", "play", str(self.file))
        self.until_ready()

    def probe(self, kind: str) -> int:
        get = self.probes[f"{kind}Probe"]["httpGet"]
        assert get["port"] == "admin"
        return self.request("GET", get["path"], admin=True)[0]

    def stop(self) -> int:
        """SIGTERM, and at the end of the grace period SIGKILL; the daemon's exit code."""
        self.engine("pod", "stop", "--time", str(self.grace), self.name)
        return int(self.engine.inspect(self.main)["State"]["ExitCode"])

    def remove(self) -> None:
        self.engine.start("pod", "rm", "--force", "--time", "0", self.name)


@pytest.fixture
def replica(engine: Engine, tmp_path: Path) -> Iterator[Replica]:
    made = Replica(engine, manifests.BASE, "base-0", tmp_path)
    try:
        yield made
    finally:
        made.remove()


def test_a_replica_of_the_base_takes_records_and_leaves_none(
    replica: Replica, engine: Engine
) -> None:
    body = nginx_log().read_bytes()
    replica.start()
    assert {replica.probe(kind) for kind in ("startup", "readiness", "liveness")} == {200}
    assert replica.request("POST", "/v1/records", body, token="")[0] == 401
    assert replica.post(body) == 500

    # Deleted: it is not ready at once, and serves those who come late.
    with subprocess.Popen(
        engine.command("pod", "stop", "--time", str(replica.grace), replica.name),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env=engine.environ(),
    ) as stopping:  # fmt: skip
        wait(lambda: replica.probe("readiness") == 503, what="not ready")
        assert replica.probe("liveness") == 200
        assert replica.post(body) == 500
        assert stopping.wait(replica.grace) == 0
    assert engine.inspect(replica.main)["State"]["ExitCode"] == 0
    assert '"pending":0' in engine("logs", replica.main).splitlines()[-2]

    # Another pod on the same claim goes on where this one ended.
    state = engine("volume", "inspect", "--format", "{{.Mountpoint}}", *replica.claims)
    replica.remove()
    replica.start()
    assert replica.numbers()["accepted"] == 1000
    assert replica.post(body) == 500
    assert replica.until_settled()["processed"] == 1500
    assert replica.stop() == 0
    found = Counter(written(Path(state) / "data"))
    assert found == Counter(line for line in body.splitlines() for _ in range(3))


def test_the_token_that_comes_with_it_lets_it_not_start(engine: Engine, tmp_path: Path) -> None:
    made = Replica(engine, manifests.BASE, "unchanged-0", tmp_path)
    text = made.file.read_text().replace(hash_of(TOKEN), "CHANGE-ME")
    made.file.write_text(text)
    try:
        engine("kube", "play", str(made.file))
        wait(lambda: "http.tokens.shop" in engine("logs", made.main), what="a reason")
    finally:
        made.remove()


@pytest.mark.parametrize("way", ["kustomize", "helm"])
def test_a_replica_without_a_volume(engine: Engine, tmp_path: Path, way: str) -> None:
    ways = {"kustomize": manifests.FOLDER / "overlays" / "stateless",
            "helm": manifests.VALUES / "stateless.yaml"}  # fmt: skip
    made = Replica(engine, ways[way], f"stateless-{way}-0", tmp_path)
    try:
        made.start()
        assert made.post(b'{"n":1}\n{"n":2}\n') == 2
        assert made.until_settled()["processed"] == 2
        assert made.stop() == 0
    finally:
        made.remove()
