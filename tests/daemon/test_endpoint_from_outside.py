"""A package that is not ours registers an endpoint: one entry point, nothing in ingestd."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT, Daemon

if TYPE_CHECKING:
    from pathlib import Path

ENDPOINT = '''
"""One record a semicolon; the answer and the errors are the protocol's own."""
from ingestd.base.record import Records
from ingestd.codecs.lines import Parsed
from ingestd.http import problem
from ingestd.http.response import Response
from ingestd.sources.http.endpoints.base import (
    BodyCodec, Decoded, Description, Endpoint, RouteSpec, Target,
)


KEY = ("key",)


class Semicolons(BodyCodec):
    def decode(self, body, limits):
        parts = [part for part in body.split(b";") if part]
        if not parts:
            raise problem.Problem(problem.EMPTY, "nothing")
        return [Decoded(Parsed(Records.lines(parts), []))]


class SemicolonEndpoint(Endpoint):
    request_headers = ("X-Semi",)
    response_headers = ("X-Taken",)

    def __init__(self, context):
        self.routes = [
            RouteSpec("/semi/{pipeline}/push", {n: Target(n) for n in context.formats}, auth=KEY)
        ]

    def open(self, head):
        if head.headers.get("Content-Type") != "text/x-semi":
            raise problem.Problem(problem.MEDIA_TYPE, "semicolons only")
        return Semicolons()

    def answer(self, result, head):
        return Response(200, b"text/plain", b"took %d" % result.accepted, {"X-Taken": "yes"})

    def error(self, found, head):
        return Response(found.kind.status, b"text/plain", b"no: " + found.kind.slug.encode())

    def describe(self, route, target, form):
        body = {"required": True, "content": {"text/x-semi": {"schema": {"type": "string"}}}}
        return Description("text/x-semi", {"requestBody": body}, [("Semicolons", "-d '1;2'")])
'''


ON = ("--http.endpoints.semi.pipeline", "default")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a daemon that finds the package, as pip would have left it."""
    site = tmp_path / "site"
    info = site / "semi-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "semi.py").write_text(textwrap.dedent(ENDPOINT))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: semi\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ingestd.endpoints]\nsemi = semi:SemicolonEndpoint\n")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}


def test_an_endpoint_of_another_package(tmp_path: Path, installed: dict[str, str]) -> None:
    arguments = (*ON, "--http.cors_origins", "https://app.example")
    with Daemon(*arguments, cwd=tmp_path, environ=installed) as one:
        path, kind = "/semi/default/push", {"Content-Type": "text/x-semi"}
        status, headers, answer = one.request("POST", path, b'1;{"a":2};3', kind)
        assert (status, answer, headers["x-taken"]) == (200, b"took 3", "yes")
        assert headers["x-request-id"]
        one.until_settled()

        status, headers, answer = one.request("POST", path, b"1", {"Content-Type": "text/csv"})
        assert (status, answer) == (415, b"no: unsupported-media-type")
        assert one.request("POST", "/semi/other/push", b"1", kind)[2] == b"no: unknown-pipeline"
        assert one.request("GET", path)[0] == 405

        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        headers = one.request("OPTIONS", path, None, preflight)[1]
        assert "X-Semi" in headers["access-control-allow-headers"].split(", ")
        assert "X-Taken" in headers["access-control-expose-headers"].split(", ")

        document = one.request("GET", "/openapi.json")[2]
        operation = document["paths"][path]["post"]
        assert list(operation["requestBody"]["content"]) == ["text/x-semi"]
        page = one.request("GET", "/")[2].decode()
        assert f"<code>{path}</code>" in page
        assert "# Semicolons" in page

        metrics = one.request("GET", "/metrics", admin=True)[2].decode().splitlines()
        template = 'route="/semi/{pipeline}/push"'
        assert f'ingestd_http_requests_total{{code="2xx",{template}}} 1.0' in metrics
        assert f'ingestd_http_requests_total{{code="4xx",{template}}} 3.0' in metrics
        assert 'ingestd_records_processed_total{pipeline="default"} 3.0' in metrics


def test_only_its_own_ways_to_authenticate_count(tmp_path: Path, installed: dict[str, str]) -> None:
    token = "token-of-the-tests-0123456789-abcdef"
    with Daemon(*ON, "--http.tokens.shop.token", token, cwd=tmp_path, environ=installed) as one:
        path, kind = "/semi/default/push", {"Content-Type": "text/x-semi"}
        assert one.request("POST", path, b"1", kind)[0] == 401
        assert one.request("POST", path, b"1", {**kind, "X-API-Key": token})[0] == 200
        bearer = {"Authorization": f"Bearer {token}"}
        assert one.request("POST", path, b"1", {**kind, **bearer})[0] == 401
        assert one.post(b"1", **bearer)[0] == 202
        document = one.request("GET", "/openapi.json")[2]
        assert document["paths"]["/semi/{pipeline}/push"]["post"]["security"] == [{"key": []}]
