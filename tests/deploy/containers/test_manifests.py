"""What the manifests for Kubernetes say, rendered as they are applied."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import ingestd
from ingestd.config.units import parse_seconds
from ingestd.settings import Settings
from tests.deploy.base import ROOT
from tests.deploy.containers import manifests
from tests.deploy.containers.engine import run, tool
from tests.deploy.containers.manifests import (
    BASE,
    CHART,
    FOLDER,
    OVERLAYS,
    VALUES,
    container,
    objects,
    one,
)

if TYPE_CHECKING:
    from pathlib import Path

# That which reads from NATS has no clients, and tests of its own.
CHARTS = [CHART, *(path for path in sorted(VALUES.iterdir()) if path.stem != "nats")]
ALL = [BASE, *OVERLAYS, *CHARTS]
EACH = [BASE, *OVERLAYS, *(pytest.param(chart, marks=pytest.mark.slow) for chart in CHARTS)]

# What checkov would like, and why it is otherwise here.
NOT_ASKED = {
    "CKV_K8S_11": "no limit of CPU: throttling makes the event loop late",
    "CKV_K8S_15": "a tag that does not change need not be pulled again",
    "CKV_K8S_21": "the namespace is the operator's",
    "CKV_K8S_43": "the image, and so its digest, is the operator's",
}


def each(folder: Path) -> str:
    return f"helm-{folder.stem}" if folder in CHARTS else folder.name


def variable(of: dict[str, Any], name: str) -> str | None:
    return next((e.get("value") for e in of.get("env", []) if e["name"] == name), None)


def settings_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    (config,) = (o["data"]["ingestd.toml"] for o in found if "ingestd.toml" in o.get("data", {}))
    return tomllib.loads(config)


@pytest.mark.parametrize("folder", EACH, ids=each)
def test_the_pod_is_restricted(folder: Path) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    found = objects(folder)
    pod = manifests.workload(found)["spec"]["template"]["spec"]
    context, own = pod["securityContext"], container(found)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"]) == (10001, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    kinds = {"name", "configMap", "secret", "emptyDir"}
    assert {key for volume in pod["volumes"] for key in volume} <= kinds
    assert pod["automountServiceAccountToken"] is False
    assert one(found, "ServiceAccount")["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == one(found, "ServiceAccount")["metadata"]["name"]
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("folder", EACH, ids=each)
def test_kubernetes_waits_longer_than_the_daemon_takes_to_leave(folder: Path) -> None:
    found = objects(folder)
    drain = settings_of(found)["drain"]
    timeout = variable(container(found), "INGESTD_DRAIN__TIMEOUT") or drain["timeout"]
    pod = manifests.workload(found)["spec"]["template"]["spec"]
    grace = pod["terminationGracePeriodSeconds"]
    assert grace >= parse_seconds(drain["delay"]) + parse_seconds(timeout) + 10
    # Endpoints hear of it before it stops taking records.
    ready = container(found)["readinessProbe"]
    assert parse_seconds(drain["delay"]) > ready["periodSeconds"] * ready["failureThreshold"]


@pytest.mark.parametrize("folder", EACH, ids=each)
def test_only_a_loop_that_hangs_is_killed(folder: Path) -> None:
    own = container(objects(folder))
    pages = {
        probe: own[f"{probe}Probe"]["httpGet"] for probe in ("startup", "readiness", "liveness")
    }
    assert pages == {
        "startup": {"path": "/livez", "port": "admin"},
        "readiness": {"path": "/readyz", "port": "admin"},
        "liveness": {"path": "/livez", "port": "admin"},
    }


@pytest.mark.parametrize("folder", EACH, ids=each)
def test_the_settings_are_settings(folder: Path) -> None:
    found = objects(folder)
    Settings(**settings_of(found))
    named = {e["name"] for e in container(found)["env"]}
    # POD_NAME is what another one is made of.
    assert all(name.startswith("INGESTD_") for name in named - {"POD_NAME"})
    # The token's file is where the secret is mounted.
    mounts = {m["name"]: m["mountPath"] for m in container(found)["volumeMounts"]}
    for name, token in settings_of(found)["http"]["tokens"].items():
        assert token["file"] == f"{mounts['tokens']}/{name}"
        assert name in one(found, "Secret", "ingestd-tokens")["data"]
    # An ingestd.toml beside the handler, as `ingestd init` makes one, would come before it.
    file = f"{mounts['settings']}/ingestd.toml"
    assert variable(container(found), "INGESTD_CONFIG") == file
    assert variable(container(found), "INGESTD_DATA_DIR") == f"{mounts['data']}/data"


@pytest.mark.parametrize("folder", EACH, ids=each)
def test_selectors_meet_what_they_select(folder: Path) -> None:
    found = objects(folder)
    labels = manifests.workload(found)["spec"]["template"]["metadata"]["labels"]
    ports = {p["name"]: p["containerPort"] for p in container(found)["ports"]}
    assert ports == {"http": 8080, "admin": 8081}
    selectors = [o["spec"]["selector"] for o in found if o["kind"] == "Service"]
    selectors += [
        one(found, kind)["spec"][key]["matchLabels"]
        for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"))
    ]
    selectors.append(manifests.workload(found)["spec"]["selector"]["matchLabels"])
    assert len(selectors) == 5
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    for service in (o for o in found if o["kind"] == "Service"):
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    image = "ingestd-postgres" if folder.stem == "postgres" else "ingestd"
    assert container(found)["image"] == f"{image}:{ingestd.__version__}"


def test_strangers_reach_neither_records_nor_numbers() -> None:
    policy = one(objects(BASE), "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    by_port = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    assert by_port == {
        "http": [{"namespaceSelector": {},
                  "podSelector": {"matchLabels": {"ingestd-client": "true"}}}],
        "admin": [{"namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    }  # fmt: skip


def test_the_journal_is_on_a_volume_that_stays() -> None:
    spec = one(objects(BASE), "StatefulSet")["spec"]
    assert spec["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain",
        "whenScaled": "Retain",
    }
    (claim,) = spec["volumeClaimTemplates"]
    bounds = Settings()
    room = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) << 30
    assert room > bounds.journal.bytes_max + bounds.dead.bytes_max
    assert spec["serviceName"] == one(objects(BASE), "Service", "ingestd-pods")["metadata"]["name"]


def test_the_token_that_comes_with_it_is_good_for_nobody() -> None:
    secret = (BASE / "kustomization.yaml").read_text()
    assert "shop=CHANGE-ME" in secret


def test_without_a_volume_it_is_the_same_pod_but_for_the_journal() -> None:
    base, other = objects(BASE), objects(FOLDER / "overlays" / "stateless")
    assert not [o for o in other if o["kind"] in {"StatefulSet", "PersistentVolumeClaim"}]
    ours = manifests.workload(other)["spec"]["template"]
    theirs = manifests.workload(base)["spec"]["template"]
    environ = ours["spec"]["containers"][0]["env"]
    added = {e["name"]: e["value"] for e in environ if "JOURNAL" in e["name"]}
    assert added["INGESTD_JOURNAL__KIND"] == "memory"
    ours["spec"]["containers"][0]["env"] = [e for e in environ if e["name"] not in added]
    volumes = ours["spec"]["volumes"]
    ours["spec"]["volumes"] = [v for v in volumes if v["name"] != "data"]
    assert next(v for v in volumes if v["name"] == "data").keys() == {"name", "emptyDir"}
    assert ours == theirs


def test_the_sink_gets_its_connection_from_a_secret() -> None:
    found = objects(FOLDER / "overlays" / "postgres")
    pod = manifests.workload(found)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["run", "postgres"]
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/run/secrets"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    secret = one(found, "Secret", volume["secret"]["secretName"])
    assert list(secret["data"]) == ["ingestd_handler__options__dsn"]


@pytest.mark.parametrize(
    "folder",
    [*(FOLDER / "overlays" / name for name in ("autoscale", "autoscale-keda")),
     VALUES / "autoscale.yaml"],
    ids=each,
)  # fmt: skip
def test_who_scales_decides_how_many(folder: Path) -> None:
    found = objects(folder)
    stateful = one(found, "StatefulSet")
    assert "replicas" not in stateful["spec"]
    scaler = next(o for o in found if o["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"})
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", stateful["metadata"]["name"])
    # One replica has drained before the next one is asked to go.
    spec = scaler["spec"]
    behavior = spec.get("behavior") or spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    (policy,) = behavior["scaleDown"]["policies"]
    pod = stateful["spec"]["template"]["spec"]
    assert policy["value"] == 1
    assert policy["periodSeconds"] >= pod["terminationGracePeriodSeconds"]


def test_both_ways_to_scale_ask_for_the_same() -> None:
    hpa = one(objects(FOLDER / "overlays" / "autoscale"), "HorizontalPodAutoscaler")["spec"]
    keda = one(objects(FOLDER / "overlays" / "autoscale-keda"), "ScaledObject")["spec"]
    (metric,), (trigger,) = hpa["metrics"], keda["triggers"]
    assert metric["pods"]["metric"]["name"] in trigger["metadata"]["query"]
    assert metric["pods"]["target"]["averageValue"] == trigger["metadata"]["threshold"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (
        keda["minReplicaCount"], keda["maxReplicaCount"],
    )  # fmt: skip
    advanced = keda["advanced"]["horizontalPodAutoscalerConfig"]
    assert hpa["behavior"] == advanced["behavior"]


def test_what_is_scraped_is_a_port_of_the_service_of_all_pods() -> None:
    found = objects(FOLDER / "overlays" / "monitoring")
    monitor = one(found, "ServiceMonitor")["spec"]
    service = one(found, "Service", "ingestd-pods")
    wanted = monitor["selector"]["matchLabels"]
    matching = [
        o["metadata"]["name"]
        for o in found
        if o["kind"] == "Service" and wanted.items() <= o["metadata"]["labels"].items()
    ]
    assert matching == [service["metadata"]["name"]]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    # A pod that is not ready is watched all the same.
    assert service["spec"]["publishNotReadyAddresses"] is True
    dashboard = one(found, "ConfigMap", "ingestd-dashboard")
    shipped = (ROOT / "deploy" / "monitoring" / "dashboard.json").read_text()
    assert dashboard["data"] == {"ingestd.json": shipped}


def test_the_alerts_are_those_of_prometheus_itself() -> None:
    shipped = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yaml").read_text())
    path = FOLDER / "overlays" / "monitoring" / "prometheusrule.yaml"
    assert yaml.safe_load(path.read_text())["spec"] == {"groups": shipped["groups"]}


@pytest.mark.slow
@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=each)
def test_kubernetes_own_schemas_fit(folder: Path, tmp_path: Path) -> None:
    manifests.assert_valid(objects(folder), tmp_path / "all.yaml")


@pytest.mark.slow
def test_kubernetes_own_schemas_fit_the_chart(tmp_path: Path) -> None:
    nats = objects(VALUES / "nats.yaml")
    found = [o for values in CHARTS for o in objects(values)]
    manifests.assert_valid([*found, *nats], tmp_path / "all.yaml")


@pytest.mark.slow
def test_checkov_finds_nothing(tmp_path: Path) -> None:
    checkov = tool("checkov")
    if not checkov:
        pytest.skip("needs checkov")
    for folder in ALL if tool("helm") else [BASE, *OVERLAYS]:
        (tmp_path / f"{each(folder)}.yaml").write_text(manifests.rendered(folder))
    done = run(
        checkov, "--quiet", "--compact", "--skip-download", "--framework", "kubernetes",
        "--skip-check", ",".join(NOT_ASKED), "--directory", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
