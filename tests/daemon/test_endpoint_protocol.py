"""A protocol of another package with all that one may need: see `HEC`; real daemons."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TOKEN = "token-of-the-tests-0123456789-abcdef"
HEC = '''
"""Events as JSON objects one after the other; own tokens, answers, errors, probes and routing."""
import json
from pydantic import Field
from ingestd.base.record import Records
from ingestd.codecs.lines import Parsed
from ingestd.http import problem
from ingestd.http.credentials import IN_BODY, by_authorization, by_header, by_query
from ingestd.http.problem import Problem
from ingestd.http.response import JSON, Response
from ingestd.sources.http.endpoints.base import (
    ANY, OPEN, BodyCodec, Decoded, Delivery, Description, Endpoint, EndpointSettings, RouteSpec,
    Target,
)

CODES = {401: 2, 404: 404, 405: 405, 413: 27, 429: 9, 503: 9}
TOKENS = (by_authorization("Splunk"), by_header("DD-API-KEY"), by_query("token"))


class HecSettings(EndpointSettings):
    """`[http.endpoints.hec]`."""
    sourcetypes: dict[str, str] = Field(
        default_factory=dict, description="pipeline of the events of a sourcetype")


def said(status, code, text, **more):
    return Response(status, JSON, json.dumps({"text": text, "code": code, **more}).encode())


class Events(BodyCodec):
    routes = True

    def __init__(self, sourcetypes, encoding):
        self.sourcetypes, self.encoding = sourcetypes, encoding

    def decode(self, body, limits):
        text, parts, at = body.decode(), {}, 0
        if 'acks' in text:
            return [Decoded(Parsed(Records.lines([]), []), notes=json.loads(text)["acks"])]
        while at < len(text):
            try:
                event, at = json.JSONDecoder().raw_decode(text, at)
            except ValueError:
                raise Problem(problem.MALFORMED, f"no event at {at}") from None
            to = self.sourcetypes.get(event.get("sourcetype"), "")
            assert limits.by_pipeline[to or "default"].record_bytes_max
            parts.setdefault((to, event.get("token", "")), []).append(event)
        return [
            Decoded(
                Parsed(Records.lines([json.dumps(one["event"]).encode() for one in events]), []),
                to,
                Delivery(events[0]["id"], b"same") if "id" in events[0] else None,
                token,
                notes=len(events),
            )
            for (to, token), events in parts.items()
        ]


class HecEndpoint(Endpoint):
    settings = HecSettings
    formats = ("json",)
    prefix = "/services/collector"

    def __init__(self, context):
        self.own = context.own
        to = {"": Target(context.default)}
        self.routes = [
            RouteSpec("/services/collector", to, auth=TOKENS, probes=("PUT",)),
            RouteSpec("/services/collector/open", to, auth=(IN_BODY, "bearer")),
            RouteSpec("/services/collector/raw/{channel}/", {ANY: Target(context.default)},
                      auth=TOKENS),
            RouteSpec("/services/collector/", to, (), OPEN, ("GET",)),
            RouteSpec("/services/collector/health", to, (), OPEN, ("GET", "HEAD", "OPTIONS")),
        ]

    @classmethod
    def check(cls, own, formats):
        for name, to in own.sourcetypes.items():
            if to not in formats:
                yield f"sourcetypes.{name}", f"there is no pipeline {to!r}"

    def open(self, head):
        encoding = "gzip" if "compression=gzip-js" in head.target else ""
        return Events(self.own.sourcetypes, encoding)

    def answer(self, result, head):
        parts = {
            part.pipeline: part.problem.kind.slug if part.problem else part.accepted
            for part in result.parts
        }
        failed = any(part.problem for part in result.parts)
        return said(207 if failed else 200, 8 if failed else 0, "Success", parts=parts,
                    channel=head.value, notes=[part.notes for part in result.parts])

    def error(self, found, head):
        status = found.kind.status
        if status == 401 and not found.without_credentials:
            return said(403, 4, "Invalid token")
        return said(status, CODES.get(status, 6), found.kind.title)

    def probe(self, head):
        return said(200, 17, f"HEC is healthy for {head.method}")

    def describe(self, route, target, form):
        return Description("events", {"summary": "Send events"})
'''


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a daemon that finds the package, as pip would have left it."""
    site = tmp_path / "site"
    info = site / "hec-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "hec.py").write_text(HEC)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ingestd.endpoints]\nhec = hec:HecEndpoint\ntwin = hec:HecEndpoint\ngone = hec:Nothing\n"
    )
    (tmp_path / "slow.py").write_text("import time\ndef never(batch: list):\n    time.sleep(600)\n")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site), str(tmp_path)])}


ON = ("--http.endpoints.hec.pipeline", "default", "--http.endpoints.hec.sourcetypes.web", "web")
WEB = ("--pipelines.web.batch.age_max", "0s")
SHOP = ("--http.tokens.shop.token", TOKEN)
PATH = "/services/collector"
SPLUNK = {"Authorization": f"Splunk {TOKEN}"}
BOTH = b'{"event": 1}{"event": 2, "sourcetype": "web"}{"event": 3, "sourcetype": "web"}'


def told(answer: tuple[int, dict[str, str], Any]) -> tuple[int, Any]:
    return answer[0], answer[2]


def test_one_body_goes_into_two_pipelines(tmp_path: Path, installed: dict[str, str]) -> None:
    with daemon(*ON, *WEB, cwd=tmp_path, environ=installed) as one:
        status, answer = told(one.request("POST", PATH, BOTH))
        assert (status, answer["parts"]) == (200, {"default": 1, "web": 2})
        assert answer["notes"] == [1, 2]
        assert one.until_settled("web")["processed"] == 2
        assert one.until_settled()["processed"] == 1
        answer = one.request("POST", f"{PATH}/raw/some-channel/", BOTH)[2]
        assert answer["channel"] == "some-channel"
        assert one.request("POST", PATH, b"")[2]["parts"] == {}  # nothing to accept, and no error
        accepted = one.status()["pipelines"]["default"]["accepted"]
        assert one.request("POST", PATH, b'{"acks": [1, 2]}')[2]["notes"] == [[1, 2]]
        assert one.status()["pipelines"]["default"]["accepted"] == accepted
        status, answer = told(one.request("POST", PATH, b"}"))
        assert (status, answer) == (400, {"text": "Malformed Records", "code": 6})


def test_a_part_that_is_refused_is_told_by_itself(
    tmp_path: Path, installed: dict[str, str]
) -> None:
    full = ("--pipelines.web.handler.target", "slow:never", "--pipelines.web.journal.bytes_max")
    with daemon(*ON, *full, "1KiB", cwd=tmp_path, environ=installed) as one:
        event = json.dumps({"event": "x" * 600, "sourcetype": "web"}).encode()
        assert one.request("POST", PATH, event)[0] == 200
        status, answer = told(one.request("POST", PATH, event + b'{"event": 1, "id": "a"}'))
        assert (status, answer["parts"]) == (207, {"default": 1, "web": "overloaded"})
        status, answer = told(one.request("POST", PATH, event))
        assert (status, answer) == (503, {"text": "Pipeline Overloaded", "code": 9})
        # The client sends all of it again: what was accepted is accepted once.
        answer = one.request("POST", PATH, event + b'{"event": 1, "id": "a"}')[2]
        assert answer["parts"] == {"default": 1, "web": "overloaded"}
        assert one.until_settled()["accepted"] == 1
        keyed = {"Idempotency-Key": "k"}
        for _ in range(2):
            status, answer = told(one.request("POST", PATH, event + b'{"event": 2}', keyed))
            assert answer["parts"] == {"default": 1, "web": "overloaded"}
        assert one.until_settled()["accepted"] == 2
        one.terminate(signal.SIGTERM)
        one.terminate(signal.SIGTERM)


def test_its_own_ways_to_authenticate(tmp_path: Path, installed: dict[str, str]) -> None:
    limits = ("--http.tokens.shop.records_per_second", "1", "--log.level", "debug")
    limits += ("--http.request_bytes_max", "64KiB")
    other = ("--http.tokens.web.token", f"{TOKEN}-web", "--http.tokens.web.pipelines", "web")
    arguments = (*ON, *WEB, *SHOP, *limits, *other)
    with daemon(*arguments, cwd=tmp_path, environ=installed) as one:
        assert told(one.request("POST", PATH, BOTH)) == (401, {"text": "Unauthorized", "code": 2})
        assert told(one.request("POST", f"{PATH}/open", BOTH))[1]["code"] == 2
        wrong = {"Authorization": "Splunk nothing-that-is-known-here"}
        assert told(one.request("POST", PATH, BOTH, wrong)) == (
            403,
            {"text": "Invalid token", "code": 4},
        )
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert one.request("POST", PATH, BOTH, bearer)[0] == 403  # not among its ways
        event = b'{"event": 1}'
        for headers, query in (
            (SPLUNK, ""), ({"DD-API-KEY": TOKEN}, ""), ({}, f"?a=b&token={TOKEN}")
        ):  # fmt: skip
            assert one.request("POST", f"{PATH}{query}", event, headers)[0] == 200
        many = "&".join(f"token={n}" for n in range(200))
        assert one.request("POST", f"{PATH}?{many}", event)[0] == 401
        inside = json.dumps({"event": 1, "token": TOKEN}).encode()
        assert one.request("POST", f"{PATH}/open", inside)[0] == 200
        assert one.request("POST", f"{PATH}/open", event, bearer)[0] == 200
        false = json.dumps({"event": 1, "token": TOKEN[::-1]}).encode()
        assert one.request("POST", f"{PATH}/open", false)[0] == 403
        assert one.request("POST", f"{PATH}/open", inside + false)[0] == 401
        limited = {"DD-API-KEY": f"{TOKEN}-web"}
        assert told(one.request("POST", PATH, BOTH, limited)) == (
            403,
            {"text": "Forbidden", "code": 6},
        )
        assert one.request("POST", PATH, b" " * 70_000, SPLUNK)[2]["code"] == 27
        one.request("POST", PATH, event * 50, SPLUNK)
        assert told(one.request("POST", PATH, event, SPLUNK)) == (
            429,
            {"text": "Too Many Requests", "code": 9},
        )
        one.until_settled()
        document = one.request("GET", "/openapi.json")[2]
        assert document["components"]["securitySchemes"]["splunk"] == {
            "type": "http", "scheme": "Splunk",
        }  # fmt: skip
        assert document["paths"][PATH]["post"]["security"] == [
            {"splunk": []}, {"dd-api-key": []}, {"query_token": []},
        ]  # fmt: skip
        assert document["paths"][f"{PATH}/open"]["post"]["security"] == [{}, {"bearer": []}]
        assert list(document["paths"][f"{PATH}/health"]) == ["get", "head", "options"]
        one.terminate()
        assert one.wait() == 0
        assert TOKEN not in json.dumps(one.events) + "".join(one.other)
    kept = [file for file in (tmp_path / "ingestd-data").rglob("*") if file.is_file()]
    assert len(kept) > 2
    assert not [file for file in kept if TOKEN.encode() in file.read_bytes()]


def test_probes_and_paths_that_are_not_there(tmp_path: Path, installed: dict[str, str]) -> None:
    arguments = (*ON, *WEB, *SHOP, "--http.cors_origins", "https://app.example")
    with daemon(*arguments, cwd=tmp_path, environ=installed) as one:
        for method in ("GET", "HEAD", "OPTIONS"):
            status, answer = told(one.request(method, f"{PATH}/health"))
            assert status == 200
            assert method == "HEAD" or answer["text"].endswith(method)
        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET"}
        assert one.request("OPTIONS", f"{PATH}/health", headers=preflight)[0] == 204
        assert one.request("POST", f"{PATH}/health")[0] == 405
        assert one.request("PUT", PATH, b"{}")[0] == 401
        assert one.request("PUT", PATH, b"{}", SPLUNK)[2]["code"] == 17
        assert one.request("GET", f"{PATH}/")[2]["code"] == 17
        for path in ("/other", "/raw", "/raw/a/b", "/other/"):
            for method in ("GET", "POST", "DELETE"):
                status, answer = told(one.request(method, PATH + path, headers=SPLUNK))
                assert (status, answer) == (404, {"text": "Not Found", "code": 404})
        metrics = one.request("GET", "/metrics", admin=True)[2].decode()
        assert f'route="{PATH}/health"' in metrics


def ingestd(*args: str, cwd: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ingestd", *args],
        cwd=cwd, capture_output=True, text=True, timeout=60, env={**os.environ, **environ},
    )  # fmt: skip


def test_it_is_off_until_its_table_names_a_pipeline(
    tmp_path: Path, installed: dict[str, str]
) -> None:
    shown = ingestd("run", "--help", cwd=tmp_path, environ=installed).stdout
    assert "--http.endpoints.hec.pipeline TEXT" in shown
    assert "pipeline of the events of a sourcetype" in shown
    told = ingestd("check", *ON, *WEB, cwd=tmp_path, environ=installed)
    assert told.returncode == 0, told.stderr
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    flag = "flag --http.endpoints.hec."
    assert f'http.endpoints.hec.pipeline = "default" # {flag}pipeline' in lines
    assert f'http.endpoints.hec.sourcetypes.web = "web" # {flag}sourcetypes.web' in lines
    assert 'http.endpoints.twin.pipeline = "" # default' in lines
    (tmp_path / "ingestd.toml").write_text("")
    with daemon(cwd=tmp_path, environ=installed) as one:
        assert one.request("POST", PATH, BOTH)[0] == 404
        assert PATH not in one.request("GET", "/openapi.json")[2]["paths"]
        (tmp_path / "ingestd.toml").write_text("http.endpoints.hec.pipeline = 'default'\n")
        one.terminate(signal.SIGHUP)
        assert one.event("reloaded")["changed"] == ["http.endpoints.hec.pipeline"]
        assert one.request("POST", PATH, b'{"event": 1}')[0] == 200
    (tmp_path / "ingestd.toml").unlink()
    on = {"INGESTD_HTTP__ENDPOINTS__HEC__PIPELINE": "default"}
    with daemon(cwd=tmp_path, environ={**installed, **on}) as one:
        assert one.request("POST", PATH, b'{"event": 1}')[0] == 200


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("hec.pipeline", "no"), "hec.pipeline (flag --http.endpoints.hec.pipeline): there is no"),
        (("hec.pipeline", "text"), "'text' has the format text; records of hec are json"),
        ((*ON[:2], "twin.pipeline", "default"), "its path /services/collector is that of hec"),
        (("hec.pipline", "default"), "did you mean --http.endpoints.hec.pipeline?"),
        (("gone.pipeline", "default"), "the endpoint 'gone' cannot be loaded from hec:Nothing"),
        ((*ON[:2], "hec.sourcetypes.a", "b"), "hec.sourcetypes.a"),
        (("gone.more", "1"), "gone.more: the endpoint 'gone' cannot be loaded from hec:Nothing"),
    ],
)
def test_mistakes(
    tmp_path: Path, installed: dict[str, str], flags: tuple[str, ...], problem: str
) -> None:
    flags = tuple(
        f"--http.endpoints.{one}" if "." in one and one[:2] != "--" else one for one in flags
    )
    text = ("--pipelines.text.format", "text")
    told = ingestd("check", *flags, *text, cwd=tmp_path, environ=installed)
    assert told.returncode in {2, 78}
    assert problem in told.stderr
