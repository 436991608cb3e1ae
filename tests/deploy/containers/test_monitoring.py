"""Alerts, dashboard and what reads them, held against what a daemon really exports."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ingestd.prove.servers import free_port
from tests.daemon.harness import Daemon, daemon
from tests.deploy.base import ROOT
from tests.deploy.containers.engine import run, tool, wait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = ROOT / "deploy" / "monitoring"
DOCKER = ROOT / "deploy" / "docker"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES += [one["expr"] for one in DASHBOARD["annotations"]["list"]]

# What has no series while nothing goes wrong.
QUIET = {
    "ingestd_requests_refused_total",
    "ingestd_worker_restarts_total",
    "ingestd_dead_letters_total",
    "ingestd_endpoint_refused_total",
    "ingestd_sink_errors_total",
    "ingestd_worker_resident_memory_bytes",  # of processes: the sink jsonl has threads
    # Of sources that download, and of those with TLS.
    "ingestd_source_urls_failed_total",
    "ingestd_source_retries_total",
    "ingestd_source_urls",
    "ingestd_source_urls_done",
    "ingestd_source_left_bytes",
    "ingestd_source_certificate_expiry_seconds",
    # Of sources that read from a broker.
    "ingestd_source_connected",
    "ingestd_source_backlog_messages",
    "ingestd_source_unsettled_messages",
    "ingestd_source_messages_total",
    "ingestd_source_acknowledged_total",
    # Of sources over TCP and UDP.
    "ingestd_source_connections",
    "ingestd_source_connections_refused_total",
    "ingestd_source_connections_cut_total",
    "ingestd_source_received_bytes_total",
    "ingestd_source_framing_faults_total",
    "ingestd_source_datagrams_total",
    "ingestd_source_datagrams_dropped_total",
    "ingestd_appends_refused_total",
    "ingestd_invalid_bytes_total",
}
# What no panel shows, and why.
UNSHOWN = {
    "process_virtual_memory_bytes": "address space is no memory; the resident part is shown",
}
# Of Prometheus itself.
OWN = {"up"}


def metrics_in(expression: str) -> set[str]:
    """The names of series in an expression: all words of ours or of a process."""
    return set(re.findall(r"\b(?:ingestd_\w+|process_\w+|up)\b", expression))


def filled_in(expression: str) -> str:
    """As Grafana sends it, with everything chosen."""
    text = expression.replace("$__rate_interval", "30s")
    return re.sub(r"\$(?:job|instance|pipeline)\b", ".*", text)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, set[str]]]:
    """A daemon that has processed something, and given something up: every kind of series."""
    folder = tmp_path_factory.mktemp("exported")
    with daemon(cwd=folder) as one:
        one.post(b'{"a":1}\n{"a":2}\nnot JSON\n')
        one.until_settled()
        _, _, page = one.request("GET", "/metrics", admin=True)
        names = set(re.findall(r"^(\w+)(?:\{| )", page.decode(), re.MULTILINE))
        declared = set(re.findall(r"^# TYPE (\w+)", page.decode(), re.MULTILINE))
        yield one, names | declared


def test_all_that_is_asked_for_is_exported(exported: tuple[Daemon, set[str]]) -> None:
    _, names = exported
    asked = {name for text in [*QUERIES, *(rule["expr"] for rule in RULES)]
             for name in metrics_in(text)}  # fmt: skip
    assert len(asked) > 25
    assert asked - names - OWN == set()
    variables = {v["name"]: v["definition"] for v in DASHBOARD["templating"]["list"]
                 if v["type"] == "query"}  # fmt: skip
    for text in variables.values():
        assert metrics_in(text) <= names
    used = {name for text in QUERIES for name in re.findall(r"\$(\w+)", text)}
    assert used - {"__rate_interval"} == set(variables)


def test_each_metric_has_a_panel(exported: tuple[Daemon, set[str]]) -> None:
    one, _ = exported
    _, _, page = one.request("GET", "/metrics", admin=True)
    declared = set(re.findall(r"^# TYPE (\w+)", page.decode(), re.MULTILINE))
    asked = {name for panel in PANELS for target in panel["targets"]
             for name in metrics_in(target["expr"])}  # fmt: skip
    # Histograms are asked for by the names of their series.
    shown = {name if name in declared else re.sub(r"_(bucket|sum|count)$", "", name)
             for name in asked}  # fmt: skip
    assert declared - shown == UNSHOWN.keys()
    assert shown <= declared


def test_the_page_is_as_promtool_wants_it(exported: tuple[Daemon, set[str]]) -> None:
    promtool = tool("promtool")
    if not promtool:
        pytest.skip("needs promtool (prometheus)")
    one, _ = exported
    _, _, page = one.request("GET", "/metrics", admin=True)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_alerts_say_what_is_wrong_and_how_bad() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert {"summary", "description", "runbook_url"} == set(rule["annotations"])


def test_each_alert_is_tested() -> None:
    tests = (FOLDER / "alerts.test.yaml").read_text()
    assert {rule["alert"] for rule in RULES} == set(re.findall(r"Ingestd[A-Z]\w+", tests))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", str(FOLDER / "alerts.yaml")),
        ("test", "rules", str(FOLDER / "alerts.test.yaml")),
    ],
    ids=["check", "test"],
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool = tool("promtool")
    if not promtool:
        pytest.skip("needs promtool (prometheus)")
    done = run(promtool, *arguments)
    assert done.returncode == 0, done.stdout


def test_prometheus_of_compose_reads_its_configuration(tmp_path: Path) -> None:
    promtool = tool("promtool")
    if not promtool:
        pytest.skip("needs promtool (prometheus)")
    # As compose.yaml mounts them.
    (tmp_path / "prometheus.yaml").write_text((DOCKER / "prometheus.yaml").read_text())
    (tmp_path / "alerts.yaml").write_text((FOLDER / "alerts.yaml").read_text())
    done = run(promtool, "check", "config", str(tmp_path / "prometheus.yaml"))
    assert done.returncode == 0, done.stdout
    assert f"{len(RULES)} rules found" in done.stdout


def test_panels_lie_in_the_grid_and_on_nobody() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
                taken[x, y] = panel["title"]
    bottom = max(y for _, y in taken) + 1
    assert len(taken) == 24 * bottom  # and there are no holes
    assert sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in DASHBOARD["panels"]) == len(taken)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_dashboard_shows_the_way_of_a_record_from_left_to_right() -> None:
    first = [p for p in PANELS if p["gridPos"]["y"] == 1]
    assert [p["title"] for p in sorted(first, key=lambda p: p["gridPos"]["x"])] == [
        "1 · Accepted", "2 · Journal", "3 · Queue", "4 · Batches", "5 · Executor", "6 · Done",
    ]  # fmt: skip


def test_what_an_alert_is_about_can_be_looked_at() -> None:
    shown = {name for text in QUERIES for name in metrics_in(text)}
    assert {name for rule in RULES for name in metrics_in(rule["expr"])} - OWN <= shown


def test_grafana_is_told_where_everything_is() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    mounts = dict(part.split(":")[:2] for part in compose["services"]["grafana"]["volumes"])
    source = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text())
    (datasource,) = source["datasources"]
    host = urllib.parse.urlsplit(datasource["url"])
    assert host.hostname in compose["services"]
    (provider,) = yaml.safe_load((DOCKER / "grafana" / "dashboards.yaml").read_text())["providers"]
    shown = mounts["../monitoring/dashboard.json"]
    assert shown.startswith(provider["options"]["path"])
    environ = compose["services"]["grafana"]["environment"]
    assert environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown


class Prometheus:
    """A real one, for as long as it takes to ask everything once."""

    def __init__(self, folder: Path, target: str) -> None:
        self.port = free_port()
        (folder / "alerts.yaml").write_text((FOLDER / "alerts.yaml").read_text())
        shipped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
        shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        shipped["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(shipped))
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [tool("prometheus"), f"--config.file={folder / 'prometheus.yaml'}",
             f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{self.port}"],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def ask(self, page: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        url = f"http://127.0.0.1:{self.port}/api/v1/{page}?{query}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def series(self, expression: str) -> list[Any]:
        return list(self.ask("query", query=filled_in(expression))["result"])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.mark.slow
def test_prometheus_answers_every_question(tmp_path: Path) -> None:
    if not tool("prometheus"):
        pytest.skip("needs prometheus")
    (tmp_path / "prometheus").mkdir()
    with daemon(cwd=tmp_path) as one, contextlib.ExitStack() as stack:
        prometheus = Prometheus(tmp_path / "prometheus", f"127.0.0.1:{one.admin_port}")
        stack.callback(prometheus.close)

        def scraped() -> bool:
            one.post(b'{"a":1}\n')  # rates of something
            seen = prometheus.series("count_over_time(ingestd_records_accepted_total[1m])")
            time.sleep(0.2)
            return bool(seen) and int(seen[0]["value"][1]) >= 4

        wait(scraped, what="four scrapes")
        for expression in QUERIES:
            if metrics_in(expression) & QUIET or " > 0" in expression:
                prometheus.series(expression)  # it need not have any
            else:
                wait(lambda: prometheus.series(expression), what=expression)  # noqa: B023
        (group,) = prometheus.ask("rules")["groups"]
        wait(lambda: all(r["health"] == "ok" for g in prometheus.ask("rules")["groups"]
                         for r in g["rules"]), what="rules evaluated")  # fmt: skip
        assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in RULES]
        # One scrape that was late is an alert that is pending for a moment.
        wait(lambda: prometheus.ask("alerts")["alerts"] == [], what="no alert")
