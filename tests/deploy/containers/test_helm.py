"""The chart, rendered by helm and held against what kustomize gives."""

from __future__ import annotations

import base64
import json
import re
import shutil
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import ingestd
from ingestd.settings import Settings
from tests.deploy.base import ROOT
from tests.deploy.containers.manifests import (
    BASE,
    CHART,
    FOLDER,
    HASH,
    VALUES,
    assert_valid,
    chart,
    container,
    helm,
    made_with,
    objects,
    one,
    workload,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.containers.manifests import Object

pytestmark = pytest.mark.slow

STATELESS = FOLDER / "overlays" / "stateless"
POSTGRES = FOLDER / "overlays" / "postgres"
MONITORING = FOLDER / "overlays" / "monitoring"


def settings_of(found: list[Object]) -> Object:
    (text,) = (o["data"]["ingestd.toml"] for o in found if "ingestd.toml" in o.get("data", {}))
    return tomllib.loads(text)


def plain(value: Any) -> Any:
    """A part of an object without labels, checksums and the names that kustomize and helm make."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return re.sub(r"^(ingestd-settings)-\w{10}$", r"\1", value) if type(value) is str else value
    own = {
        "app.kubernetes.io/instance", "app.kubernetes.io/version", "app.kubernetes.io/managed-by",
        "helm.sh/chart", "checksum/settings", "checksum/secrets",
    }  # fmt: skip
    kept = {key: plain(part) for key, part in value.items() if key not in own}
    return {key: part for key, part in kept.items() if (key, part) != ("annotations", {})}


def spec(found: list[Object], kind: str, name: str = "") -> Object:
    return dict(plain(one(found, kind, name)["spec"]))


# -- as kustomize has it -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("StatefulSet", ""), ("Service", "ingestd-pods"), ("PodDisruptionBudget", ""),
     ("NetworkPolicy", "")],
)  # fmt: skip
def test_the_chart_gives_what_the_base_gives(kind: str, name: str) -> None:
    assert spec(objects(CHART), kind, name) == spec(objects(BASE), kind, name)


def test_the_rest_of_the_base_is_there_too() -> None:
    ours, theirs = objects(CHART), objects(BASE)
    assert sorted(o["kind"] for o in ours) == sorted(o["kind"] for o in theirs)
    records = spec(ours, "Service", "ingestd")
    assert records.pop("type") == "ClusterIP"  # the default of a Service
    assert records == spec(theirs, "Service", "ingestd")
    with_kind = settings_of(theirs) | {"journal": {"kind": "sqlite"}}
    assert settings_of(ours) == with_kind
    (hashed,) = (o["data"] for o in ours if o["kind"] == "Secret")
    assert base64.b64decode(hashed["shop"]).decode() == HASH


def test_without_a_volume_it_is_the_stateless_overlay() -> None:
    ours, theirs = objects(VALUES / "stateless.yaml"), objects(STATELESS)
    pod = spec(theirs, "Deployment")
    (own,) = pod["template"]["spec"]["containers"]
    environ = {e["name"]: e["value"] for e in own["env"]}
    own["env"] = [e for e in own["env"] if "JOURNAL" not in e["name"]]
    assert spec(ours, "Deployment") == pod
    assert settings_of(ours)["journal"] == {
        "kind": environ["INGESTD_JOURNAL__KIND"],
        "bytes_max": environ["INGESTD_JOURNAL__BYTES_MAX"],
    }


def test_a_sink_gets_its_connection_from_a_secret() -> None:
    theirs = container(objects(POSTGRES))
    secret = {"values": {"ingestd_handler__options__dsn": "postgresql://ingestd@postgres/ingestd"}}
    for values, named in (
        (secret, "ingestd-secrets"),
        ({"existingSecret": "mine"}, "mine"),
    ):
        found = made_with(VALUES / "postgres.yaml", secretSettings=values)
        own = container(found)
        assert (own["args"], own["image"]) == (theirs["args"], theirs["image"])
        mounts = {m["mountPath"]: m["name"] for m in own["volumeMounts"]}
        assert mounts.keys() == {m["mountPath"] for m in theirs["volumeMounts"]}
        volumes = {v["name"]: v for v in workload(found)["spec"]["template"]["spec"]["volumes"]}
        assert volumes[mounts["/run/secrets"]]["secret"] == {"secretName": named}
        made = [o["data"] for o in found if o["metadata"]["name"] == named]
        assert [list(data) for data in made] == [[*values.get("values", {})]] * len(made)
        assert bool(made) is (named == "ingestd-secrets")
    assert "postgresql" not in str([o for o in found if o["kind"] == "ConfigMap"])


def test_monitoring_is_what_prometheus_and_grafana_have() -> None:
    ours, theirs = objects(VALUES / "monitoring.yaml"), objects(MONITORING)
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert spec(ours, kind) == spec(theirs, kind)
    name = "ingestd-dashboard"
    assert one(ours, "ConfigMap", name)["data"] == one(theirs, "ConfigMap", name)["data"]
    labels = one(ours, "ConfigMap", name)["metadata"]["labels"]
    assert labels["grafana_dashboard"] == "1"
    # It scrapes the service of all pods, and no other.
    wanted = one(ours, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    services = [o for o in ours if o["kind"] == "Service"]
    matching = [o for o in services if wanted <= o["metadata"]["labels"].items()]
    assert [o["metadata"]["name"] for o in matching] == ["ingestd-pods"]
    kinds = {o["kind"] for o in objects(CHART)}
    assert not kinds & {"ServiceMonitor", "PrometheusRule"}


@pytest.mark.parametrize(("kind", "overlay", "scaler"), [
    ("hpa", "autoscale", "HorizontalPodAutoscaler"), ("keda", "autoscale-keda", "ScaledObject"),
])  # fmt: skip
def test_it_scales_as_the_overlays_do(kind: str, overlay: str, scaler: str) -> None:
    ours = spec(made_with(autoscaling={"kind": kind}), scaler)
    theirs = spec(objects(FOLDER / "overlays" / overlay), scaler)

    def pop_period(found: Object) -> int:
        advanced = found.get("advanced", {}).get("horizontalPodAutoscalerConfig", found)
        (policy,) = advanced["behavior"]["scaleDown"]["policies"]
        return int(policy.pop("periodSeconds"))

    # Each is longer than its own grace period.
    assert (pop_period(ours), pop_period(theirs)) == (650, 660)
    if kind == "keda":
        query = ours["triggers"][0]["metadata"]
        query["query"] = query["query"].replace(',namespace="default"', "")
    assert ours == theirs


def test_from_nats_it_is_the_manifests_of_nats() -> None:
    folder = FOLDER / "nats" / "ingestd"
    secret = {"values": {"ingestd_nats__password": "secret"}}
    ours = made_with(VALUES / "nats.yaml", tokens={}, secretSettings=secret)
    theirs = objects(folder)
    settings = settings_of(ours)
    # What the overlay sets by variables, and the bound of dead letters in memory.
    assert settings.pop("journal") == {"kind": "memory", "bytes_max": "256MiB"}
    assert settings.pop("dead") == {"bytes_max": "64MiB"}
    assert settings == settings_of(theirs)
    mounted = {m["mountPath"] for m in container(ours)["volumeMounts"]}
    assert mounted == {m["mountPath"] for m in container(theirs)["volumeMounts"]}
    for part in ("image", "ports"):
        assert container(ours)[part] == container(theirs)[part]
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        assert spec(ours, kind) == spec(theirs, kind)
    assert spec(ours, "ScaledObject")["triggers"] == spec(theirs, "ScaledObject")["triggers"]
    assert [o["metadata"]["name"] for o in ours if o["kind"] == "Service"] == ["ingestd-pods"]


def test_a_journal_in_a_log_needs_no_volume_and_keeps_its_name() -> None:
    found = objects(VALUES / "jetstream.yaml")
    made = one(found, "StatefulSet")["spec"]
    assert "volumeClaimTemplates" not in made
    (data,) = [v for v in made["template"]["spec"]["volumes"] if v["name"] == "data"]
    assert data["emptyDir"] == {"sizeLimit": "512Mi"}
    environ = {e["name"]: e for e in container(found)["env"]}
    assert environ["POD_NAME"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert environ["INGESTD_JOURNAL__JETSTREAM__NAME"]["value"] == "default-$(POD_NAME)"
    journal = Settings(**settings_of(found)).journal
    assert journal.kind == "jetstream"
    limit = 512 << 20
    assert journal.bytes_max + Settings(**settings_of(found)).dead.bytes_max < limit


# -- values --------------------------------------------------------------------------------


def test_values_land_where_they_belong() -> None:
    found = made_with(
        replicas=5,
        image={"repository": "registry.example/shop/ingestd", "digest": HASH,
               "pullSecrets": ["registry"]},
        args=["run", "store:store"],
        resources={"limits": {"memory": "2Gi"}},
        env=[{"name": "PGHOST", "value": "postgres"}],
        ports=[{"name": "syslog", "containerPort": 5514}],
        podLabels={"team": "shop"},
        startupSeconds=600,
        drain={"timeout": 90},
        volume={"size": "50Gi", "storageClass": "fast"},
        serviceAccount={"name": "mine"},
        volumes=[{"name": "code", "configMap": {"name": "code"}}],
        volumeMounts=[{"name": "code", "mountPath": "/app"}],
        networkPolicy={"egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}]},
    )  # fmt: skip
    made, own = workload(found)["spec"], container(found)
    pod = made["template"]["spec"]
    assert made["replicas"] == 5
    # Replicas that come again find their volumes again.
    assert made["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain", "whenScaled": "Retain",
    }  # fmt: skip
    (claim,) = made["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
    assert own["image"] == f"registry.example/shop/ingestd@{HASH}"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert own["args"] == ["run", "store:store"]
    assert own["resources"]["limits"] == {"memory": "2Gi", "ephemeral-storage": "1Gi"}
    assert own["env"][-1] == {"name": "PGHOST", "value": "postgres"}
    assert own["startupProbe"]["failureThreshold"] == 300
    assert pod["terminationGracePeriodSeconds"] == 5 + 90 + 15
    assert settings_of(found)["drain"] == {"delay": "5s", "timeout": "90s"}
    assert made["template"]["metadata"]["labels"]["team"] == "shop"
    assert "team" not in made["selector"]["matchLabels"]
    assert pod["serviceAccountName"] == "mine"
    assert not [o for o in found if o["kind"] == "ServiceAccount"]
    assert own["volumeMounts"][-1]["mountPath"] == "/app"
    assert pod["volumes"][-1]["name"] == "code"
    policy = one(found, "NetworkPolicy")["spec"]
    assert {"port": "syslog", "protocol": "TCP"} in policy["ingress"][0]["ports"]
    assert policy["egress"][-1]["to"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    ports = one(found, "Service", "ingestd")["spec"]["ports"]
    assert {p["name"]: p["port"] for p in ports} == {"http": 8080, "syslog": 5514}


def test_containers_of_ones_own_stand_beside_the_daemon(tmp_path: Path) -> None:
    """A proxy that outlives the drain, one that ends with the pod, and a step before both."""
    proxy = {"name": "proxy", "image": "registry.example/proxy:1", "restartPolicy": "Always"}
    step = {"name": "wait", "image": "busybox:1", "command": ["true"]}
    shipper = {
        "name": "shipper", "image": "registry.example/shipper:1",
        "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
    }  # fmt: skip
    for file in (None, VALUES / "stateless.yaml"):
        found = made_with(file, initContainers=[proxy, step], sidecars=[shipper])
        assert_valid(found, tmp_path / "objects.yaml")
        pod = workload(found)["spec"]["template"]["spec"]
        assert pod["initContainers"] == [proxy, step]
        # The daemon is the first: it is the one that kubectl logs and exec mean.
        own, beside = pod["containers"]
        assert (own, beside) == (container(made_with(file)), shipper)


def test_fields_that_the_chart_has_no_value_for(tmp_path: Path) -> None:
    aliases = [{"ip": "192.0.2.1", "hostnames": ["db"]}]
    ranges = ["192.0.2.0/24"]
    relabelings = [{"action": "labeldrop", "regex": "pod"}]
    found = made_with(
        podSpec={"hostAliases": aliases, "runtimeClassName": "gvisor"},
        service={"type": "LoadBalancer", "spec": {"loadBalancerSourceRanges": ranges}},
        monitoring={"serviceMonitor": {"enabled": True, "endpoint": {"relabelings": relabelings}}},
        updateStrategy={"rollingUpdate": {"partition": 1}},
        serviceAccount={"automountToken": True},
        probes={"liveness": {"timeoutSeconds": 20}, "readiness": {"periodSeconds": 3}},
    )
    assert_valid(found, tmp_path / "objects.yaml")
    pod = workload(found)["spec"]["template"]["spec"]
    assert (pod["hostAliases"], pod["runtimeClassName"]) == (aliases, "gvisor")
    assert pod["automountServiceAccountToken"] is True
    assert one(found, "ServiceAccount")["automountServiceAccountToken"] is True
    assert one(found, "Service", "ingestd")["spec"]["loadBalancerSourceRanges"] == ranges
    assert workload(found)["spec"]["updateStrategy"] == {"rollingUpdate": {"partition": 1}}
    (endpoint,) = one(found, "ServiceMonitor")["spec"]["endpoints"]
    assert (endpoint["relabelings"], endpoint["port"]) == (relabelings, "admin")
    own = container(found)
    assert (own["livenessProbe"]["timeoutSeconds"], own["livenessProbe"]["periodSeconds"]) == (
        20,
        10,
    )
    assert (own["readinessProbe"]["timeoutSeconds"], own["readinessProbe"]["periodSeconds"]) == (
        2,
        3,
    )


def test_a_cluster_may_choose_the_user() -> None:
    """OpenShift gives each namespace a range of users, and refuses pods that name another one."""
    chosen = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"))
    found = made_with(podSecurityContext=chosen, securityContext={"readOnlyRootFilesystem": False})
    pod = workload(found)["spec"]["template"]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    own = container(found)["securityContext"]
    assert own["readOnlyRootFilesystem"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}


def test_an_ingress_leads_to_the_service_and_is_let_in() -> None:
    tls = [{"secretName": "tls", "hosts": ["in.example"]}]
    found = made_with(
        ingress={"enabled": True, "className": "nginx", "hosts": ["in.example"], "tls": tls}
    )
    made = one(found, "Ingress")["spec"]
    assert (made["ingressClassName"], made["tls"]) == ("nginx", tls)
    ((rule,), (service,)) = made["rules"], [
        o for o in found if o["kind"] == "Service" and o["spec"].get("clusterIP") != "None"
    ]  # fmt: skip
    assert rule["host"] == "in.example"
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {
        "name": service["metadata"]["name"], "port": {"name": service["spec"]["ports"][0]["name"]},
    }  # fmt: skip
    records = one(found, "NetworkPolicy")["spec"]["ingress"][0]
    assert records["from"][-1] == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}
    }
    assert not [o for o in objects(CHART) if o["kind"] == "Ingress"]


SETTINGS: Object = {
    "format": "json",
    "batch": {"records_max": 5000, "bytes_max": "8MiB", "key": "/user_id"},
    "http": {"keep_headers": ["X-Shop"], "client_share": 0.25, "idempotency_keys_max": 20_000_000},
    "handler": {"target": "jsonl", "options": {"rotate_bytes": 1048576}},
    "pipelines": {"web-1": {"batch": {"age_max": "2s"}, "handler": {"target": 'a "<é>"'}}},
}  # fmt: skip


def test_settings_arrive_as_they_were_written() -> None:
    found = settings_of(made_with(settings=SETTINGS))
    assert found["http"].pop("tokens") == {"shop": {"file": "/etc/ingestd-tokens/shop"}}
    assert {table: found[table] for table in SETTINGS} == SETTINGS
    assert type(found["batch"]["records_max"]) is int


def test_a_setting_that_is_null_is_none() -> None:
    batch = {"records_max": None, "age_max": "2s"}
    found = settings_of(made_with(settings={"log": None, "batch": batch, "format": None}))
    assert found["batch"] == {"age_max": "2s"}
    assert not {"log", "format"} & found.keys()
    assert settings_of(made_with(settings=None)) == settings_of(made_with())


def test_names_that_yaml_reads_otherwise_are_names() -> None:
    names = ["on", "null", "0123", "1e3"]
    found = made_with(
        tokens={"hashes": dict.fromkeys(names, HASH)},
        ports=[{"name": "y", "containerPort": 5514, "protocol": "UDP"}],
    )
    assert one(found, "Secret")["data"].keys() == {*names}
    assert one(found, "Service", "ingestd")["spec"]["ports"][1]["targetPort"] == "y"
    assert one(found, "NetworkPolicy")["spec"]["ingress"][0]["ports"][1]["port"] == "y"


def test_daemons_that_adopt_have_room_for_two_journals() -> None:
    file = VALUES / "jetstream.yaml"
    found = made_with(file, settings={"journal": {"jetstream": {"adopt": True}}})
    made = Settings(**settings_of(found))
    assert made.journal.jetstream.adopt  # type: ignore[attr-defined]
    assert 2 * (made.journal.bytes_max + made.dead.bytes_max) < 512 << 20


def test_two_of_it_in_one_chart_do_not_share_pods(tmp_path: Path) -> None:
    charts = tmp_path / "charts"
    shutil.copytree(CHART, charts / "ingestd")
    aliases = ("clicks", "orders")
    of = {"name": "ingestd", "version": ingestd.__version__, "repository": ""}
    facts = {"apiVersion": "v2", "name": "shop", "version": "1.0.0",
             "dependencies": [{**of, "alias": alias} for alias in aliases]}  # fmt: skip
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(facts))
    values = {
        alias: {"fullnameOverride": f"{alias}-ingestd", "tokens": {"hashes": {"a": HASH}}}
        for alias in aliases
    }
    done = helm("template", "shop", str(tmp_path), values=values)
    assert done.returncode == 0, done.stderr
    found = [o for o in yaml.safe_load_all(done.stdout) if o]
    pods = {
        o["metadata"]["name"]: o["spec"]["template"]["metadata"]["labels"].items()
        for o in found
        if o["kind"] == "StatefulSet"
    }
    for service in (o for o in found if o["kind"] == "Service"):
        wanted = service["spec"]["selector"].items()
        (name,) = (name for name, labels in pods.items() if wanted <= labels)
        assert service["metadata"]["name"].startswith(name)


def test_a_change_of_settings_is_a_rollout_and_one_of_tokens_is_none() -> None:
    def pod(**values: Any) -> Object:
        return dict(workload(made_with(**values))["spec"]["template"])

    before = pod()
    assert pod(settings={"batch": {"records_max": 500}}) != before
    assert pod(tokens={"hashes": {"shop": f"sha256:{'1' * 64}"}}) == before
    secret = "ingestd_handler__options__dsn"
    first, second = (pod(secretSettings={"values": {secret: one}}) for one in ("a", "b"))
    assert first != second


def test_tokens_of_a_secret_of_ones_own() -> None:
    found = made_with(tokens={"existingSecret": "mine", "names": ["shop", "web"]})
    assert settings_of(found)["http"]["tokens"] == {
        name: {"file": f"/etc/ingestd-tokens/{name}"} for name in ("shop", "web")
    }
    volumes = workload(found)["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tokens", "secret": {"secretName": "mine"}} in volumes
    assert not [o for o in found if o["kind"] == "Secret"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "two"}, "/replicas"),
        ({"replicas": -1}, "/replicas"),
        ({"settings": {"drain": {"timeout": "1m"}}}, "/settings/drain"),
        ({"settings": {"journal": {"kind": "memory"}}}, "/settings/journal/kind"),
        ({"journal": {"kind": "disk"}}, "/journal/kind"),
        ({"drain": {"delay": 1}}, "/drain/delay"),
        ({"volume": {"size": "many"}}, "/volume/size"),
        ({"fullnameOverride": "shop"}, "/fullnameOverride"),
        ({"tokens": {"hashes": {"shop": "a token in clear text"}}}, "/tokens/hashes/shop"),
        ({"secretSettings": {"values": {"DSN": "x"}}}, "DSN"),
        ({"ingress": {"enabled": True}}, "/ingress/hosts"),
        ({"ingress": {"enabled": True, "hosts": ["a"]}, "service": {"enabled": False}}, "/service"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"autoscaling": {"kind": "keda", "drainTimeout": 3600}}, "/autoscaling/drainTimeout"),
        ({"monitoring": {"rules": True}}, "/monitoring/rules"),
        (
            {"tokens": {"hashes": {"shop": HASH}}, "journal": {"kind": "jetstream"}},
            "set settings.journal.jetstream.servers",
        ),
        (
            {"tokens": {"hashes": {"shop": HASH}}, "autoscaling": {"kind": "hpa", "min": 9}},
            "autoscaling.min is 9, and should be autoscaling.max (8) or less",
        ),
        ({"settings": {"pipelines": {"web": {"drain": {"timeout": "1m"}}}}}, "drain"),
        ({"settings": {"pipelines": {"web": {"journal": {"kind": "memory"}}}}}, "kind"),
        ({"env": [{"name": "INGESTD_DRAIN__TIMEOUT", "value": "1h"}]}, "/env/0/name"),
        ({"ports": [{"name": "514", "containerPort": 514}]}, "/ports/0/name"),
        ({"ports": [{"name": "admin", "containerPort": 514}]}, "/ports/0/name"),
        ({"ports": [{"name": "a", "containerPort": 1}], "service": {"enabled": False}}, "/service"),
        ({"podLabels": {"app.kubernetes.io/name": "shop"}}, "app.kubernetes.io/name"),
        ({"podAnnotations": {"checksum/settings": "1"}}, "checksum/settings"),
        ({"fullnameOverride": "1-ingestd"}, "/fullnameOverride"),
        ({"sidecars": [{"name": "ingestd", "image": "a"}]}, "/sidecars/0/name"),
        ({"sidecars": [{"name": "shipper"}]}, "/sidecars/0"),
        ({"initContainers": [{"image": "a"}]}, "/initContainers/0"),
        ({"podSpec": {"containers": []}}, "containers"),
        ({"service": {"spec": {"ports": []}}}, "ports"),
        ({"probes": {"liveness": {"httpGet": {}}}}, "httpGet"),
        ({}, "Nothing says which clients may send records"),
    ],
)
def test_values_that_are_wrong_are_refused(values: Object, said: str) -> None:
    done = helm("template", "ingestd", str(CHART), values=values)
    assert done.returncode != 0
    assert said in done.stderr


# -- the chart itself ----------------------------------------------------------------------


def leaves(values: Object, path: str = "") -> dict[str, Any]:
    """All values by their paths; an empty table is one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        below = leaves(value, f"{path}/{key}") if isinstance(value, dict) and value else {}
        found |= below or {f"{path}/{key}": value}
    return found


def test_the_schema_names_each_value_and_no_other() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def named(table: Object) -> set[str]:
        found = set()
        for key, part in table["properties"].items():
            closed = part.get("additionalProperties") is False
            found |= {f"/{key}{path}" for path in named(part)} if closed else {f"/{key}"}
        return found

    # Free tables are one value, whatever their defaults have in them.
    free = r"^(/resources|/podSecurityContext|/securityContext|/monitoring/dashboard/labels)/.*"
    given = {re.sub(free, r"\1", path) for path in leaves(values)}
    assert given == named(schema) - {"/global"}
    assert schema["additionalProperties"] is False


def test_each_value_says_what_it_is() -> None:
    for line in (CHART / "values.yaml").read_text().splitlines():
        if re.match(r" {0,4}\w+: +\S", line):
            assert "  # " in line, line


def test_the_chart_is_of_this_version() -> None:
    facts = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {facts["version"], facts["appVersion"]} == {ingestd.__version__}


def test_alerts_and_dashboard_are_the_shipped_ones() -> None:
    for name in ("alerts.yaml", "dashboard.json"):
        link = CHART / "files" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / "deploy" / "monitoring" / name


def test_helm_finds_nothing_wrong() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout
    assert "0 chart(s) failed" in done.stdout


def test_a_packaged_chart_is_whole(tmp_path: Path) -> None:
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    values = yaml.safe_load((VALUES / "monitoring.yaml").read_text())
    values["tokens"] = {"hashes": {"shop": HASH}}
    done = helm("template", "ingestd", str(archive), values=values)
    assert done.stdout == chart(VALUES / "monitoring.yaml")


@pytest.mark.parametrize("name", ["shop", "ingestd", "1", "2-ingestd", "a.b", "x" * 53])
def test_each_release_has_names_and_selectors_of_its_own(name: str) -> None:
    values = {"tokens": {"hashes": {"shop": HASH}}}
    done = helm("template", name, str(CHART), values=values)
    found = [o for o in yaml.safe_load_all(done.stdout) if o]
    made = one(found, "StatefulSet")
    assert "ingestd" in made["metadata"]["name"]
    names = [o["metadata"]["name"] for o in found]
    assert all(re.fullmatch("[a-z][a-z0-9-]{0,61}[a-z0-9]", one) for one in names)
    assert made["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == name


def test_the_notes_say_where_records_go() -> None:
    values = {"tokens": {"hashes": {"shop": HASH}}}
    done = helm("install", "ingestd", str(CHART), "--namespace", "shop", "--dry-run=client",
                values=values)  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.partition("NOTES:")
    assert "http://ingestd.shop:8080/v1/records" in notes
    assert "data-ingestd-N" in notes
