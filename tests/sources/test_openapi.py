"""`/openapi.json`: valid, whole, and in step with the code; `test_openapi_fuzz.py` tries it out."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import schemathesis

from ingestd import __version__
from ingestd.http import problem
from ingestd.http.settings import HttpSettings
from ingestd.registry import ENDPOINTS
from ingestd.sources.http.endpoints.base import EndpointContext
from ingestd.sources.http.endpoints.records import codec_of
from ingestd.sources.http.openapi import describe
from tests.sources.source_tools import MemoryIntake, ask, connected, serving

FORMATS = {"default": "json", "logs": "text", "blobs": "bytes"}


def described(*, public_names: bool = True, **more: Any) -> dict[str, Any]:
    return json.loads(describe("1.2", built(**more), FORMATS, public_names=public_names))  # type: ignore[arg-type]


def built(
    default: str = "default", *, webhooks: bool = False, every: bool = False
) -> dict[str, Any]:
    """The endpoints that are always there, or all that there are."""
    hooks = {"hub": {"kind": "github", "secret": "x" * 16}} if webhooks else {}
    context = EndpointContext(HttpSettings(webhooks=hooks), FORMATS, default, [])  # type: ignore[arg-type]
    kinds = {name: ENDPOINTS.load(name) for name in ENDPOINTS.own}
    return {
        name: kind(context._replace(own=kind.settings and kind.settings(pipeline=default)))
        for name, kind in kinds.items()
        if every or kind.settings is None
    }


def references(value: Any):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def follow(document: dict[str, Any], value: Any) -> Any:
    while "$ref" in value:
        part = document
        for name in value["$ref"].removeprefix("#/").split("/"):
            part = part[name]
        value = part
    return value


def operations(document: dict[str, Any]):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method, operation


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("public_names", [True, False])
def test_it_is_valid_openapi_3_1(public_names: bool, every: bool) -> None:
    document = described(public_names=public_names, every=every)
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["version"] == "1.2"
    schemathesis.openapi.from_dict(document).validate()
    for reference in references(document):
        assert follow(document, {"$ref": reference})
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


def test_a_document_that_is_not_valid_is_found_out() -> None:
    document = described()
    document["paths"]["/"]["get"]["responses"]["200"].pop("description")
    with pytest.raises(ValueError, match="description"):
        schemathesis.openapi.from_dict(document).validate()


def test_there_is_a_path_for_each_pipeline_with_the_bodies_of_its_format() -> None:
    document = described()
    paths = {path for path, _, _ in operations(document)}
    named = {f"/v1/records/{name}": form for name, form in FORMATS.items()}
    assert paths == {"/", "/openapi.json", "/v1/records", *named}
    for path, form in {**named, "/v1/records": "json"}.items():
        body = follow(document, document["paths"][path]["post"]["requestBody"])
        for kind in body["content"]:
            codec_of(kind, form)  # type: ignore[arg-type]  # raises for a type it does not take
        # What is read without being asked for stands in the words, every other type in the table.
        said = {*body["content"], *re.findall(r"`(application/[a-z-]+)`", body["description"])}
        for kind in ("application/json", "application/ndjson", "text/plain", *said):
            try:
                codec_of(kind, form)  # type: ignore[arg-type]
            except problem.Problem:
                assert kind not in said
            else:
                assert kind in said


def test_the_default_path_takes_what_the_default_pipeline_takes() -> None:
    document = described(default="logs")
    body = follow(document, document["paths"]["/v1/records"]["post"]["requestBody"])
    assert list(body["content"]) == ["text/plain"]


@pytest.mark.parametrize("public_names", [True, False])
def test_webhooks_are_described_where_there_are_any(public_names: bool) -> None:
    document = described(public_names=public_names, webhooks=True)
    schemathesis.openapi.from_dict(document).validate()
    deliver = document["paths"]["/v1/webhooks/{webhook}"]["post"]
    assert list(follow(document, deliver["requestBody"])["content"]) == ["application/json"]
    assert {"202", "401", "404", "422"} <= set(deliver["responses"])
    assert "security" not in deliver
    assert "/v1/webhooks" not in json.dumps(described(public_names=public_names))


def test_names_are_nobodys_business_where_they_are_not_public() -> None:
    document = described(public_names=False)
    assert set(document["paths"]) == {"/", "/openapi.json", "/v1/records", "/v1/records/{pipeline}"}
    assert not re.search("logs|blobs", json.dumps(document))
    for path in ("/v1/records", "/v1/records/{pipeline}"):
        body = follow(document, document["paths"][path]["post"]["requestBody"])
        assert {"application/json", "text/plain", "application/octet-stream"} <= set(
            body["content"]
        )
    assert "404" in document["paths"]["/v1/records/{pipeline}"]["post"]["responses"]


@pytest.mark.parametrize("public_names", [True, False])
def test_every_problem_is_described_with_its_status(public_names: bool) -> None:
    document = described(public_names=public_names)
    # Where everybody may send, nobody is asked who he is, but pages are asked where they are from.
    never = {problem.UNAUTHORIZED, problem.SIGNATURE_INVALID, problem.FORBIDDEN}
    if not public_names:
        never = {problem.FOREIGN_ORIGIN}
    kinds = [kind for kind in problem.KINDS if kind not in never]
    types: dict[str, int] = {}
    for name, response in document["components"]["responses"].items():
        if name.startswith("Problem"):
            schema = response["content"]["application/problem+json"]["schema"]["properties"]
            assert name == f"Problem{schema['status']['const']}"
            types |= dict.fromkeys(schema["type"]["enum"], schema["status"]["const"])
    assert types == {f"urn:ingestd:problem:{kind.slug}": kind.status for kind in kinds}
    # 404 and 405 are the answers to other paths and methods than those that are described.
    answers = document["paths"]["/v1/records"]["post"]["responses"]
    statuses = {str(kind.status) for kind in kinds} - {"404", "405"}
    assert set(answers) == statuses | {"200", "202"}


def test_every_problem_that_says_when_to_come_again_is_described_with_it() -> None:
    responses = described()["components"]["responses"]
    with_after = {
        name for name, one in responses.items() if "Retry-After" in one.get("headers", {})
    }
    assert with_after == {"Problem409", "Problem429", "Problem503"}


async def test_every_example_is_accepted() -> None:
    intakes = [MemoryIntake(form, name) for name, form in FORMATS.items()]  # type: ignore[arg-type]
    tried = []
    async with serving(*intakes) as source:
        document = await read(source)
        assert document["info"]["version"] == __version__
        for path, method, operation in operations(document):
            if method != "post":
                continue
            content = follow(document, operation["requestBody"])["content"]
            for kind, what in content.items():
                for example in what.get("examples", {}).values():
                    value = follow(document, example)["value"]
                    body = json.dumps(value) if kind == "application/json" else value
                    reply = await ask(source, body.encode(), path, Content_Type=kind)
                    assert (reply.status, reply.json["invalid"]) == (202, 0), (path, kind)
                    tried.append((path, kind))
        headers = {
            one["name"].replace("-", "_"): one["example"]
            for one in document["components"]["parameters"].values()
            if "example" in one and one["name"] != "Idempotency-Key"  # the intake here has no keys
        }
        assert set(headers) == {"X_Request_Id", "traceparent", "Prefer"}
        assert (await ask(source, b"1", **headers)).status == 202
    assert len(tried) == 9


async def read(source) -> dict[str, Any]:
    async with connected(source) as client:
        client.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = await client.reply()
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"
    return reply.json
