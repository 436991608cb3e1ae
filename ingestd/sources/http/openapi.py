"""`/openapi.json`: what this daemon takes and answers, exactly, as OpenAPI 3.1.

What is the same in every daemon is written by hand in `openapi.json`. Filled in here: the version,
a path for each pipeline with the bodies of its format, and the types of the problems of each
status, from `problem.py`.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.sources.http.problem import FORBIDDEN, FOREIGN_ORIGIN, KINDS, Kind
from ingestd.sources.http.routes import RECORDS, WEBHOOKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingestd.base.record import Format

PROBLEM_TYPE = "application/problem+json"


def describe(
    version: str,
    pipelines: Mapping[str, Format],
    *,
    default: str,
    public_names: bool,
    webhooks: bool = False,
) -> bytes:
    """The document.

    Args:
        version: of ingestd.
        pipelines: their formats by name.
        default: the one that `/v1/records` means.
        public_names: whether everybody may know the pipelines, and send; else there is one path
            with a parameter, a pipeline takes any body, and a token is needed.
        webhooks: whether there are any; their names are not told.
    """
    text = files(__package__).joinpath("openapi.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    document["info"]["version"] = version
    parts = document["components"]
    # Where nobody is asked who they are, pages are asked where they are from.
    _fill_problems(parts["responses"], without=FORBIDDEN if public_names else FOREIGN_ORIGIN)
    bodies = parts["requestBodies"]
    bodies["any"] = _any_of({name: body for name, body in bodies.items() if name != "delivery"})
    paths, send = document["paths"], document["paths"][RECORDS]["post"]
    send["requestBody"] = _body(pipelines[default] if public_names else "any")
    if webhooks:
        path = {"parameters": [_ref("parameters/Webhook")], "post": _deliver(send)}
        paths[f"{WEBHOOKS}/{{webhook}}"] = path
    else:
        del parts["parameters"]["Webhook"], bodies["delivery"]
    if not public_names:
        send["security"] = [{"bearer": []}, {"basic": []}, {"key": []}]
        path = {"parameters": [_ref("parameters/Pipeline")], "post": _send_to(send, "any")}
        paths[f"{RECORDS}/{{pipeline}}"] = path
        return msgspec.json.encode(document)
    del bodies["any"], parts["parameters"]["Pipeline"], parts["securitySchemes"]
    del send["responses"]["401"]
    if webhooks:
        del paths[f"{WEBHOOKS}/{{webhook}}"]["post"]["responses"]["403"]
    else:
        del parts["responses"]["Problem401"]
    for name, form in pipelines.items():
        paths[f"{RECORDS}/{name}"] = {"post": _send_to(send, form, name)}
    return msgspec.json.encode(document)


def _fill_problems(responses: dict[str, Any], *, without: Kind) -> None:
    """What a problem of each status looks like; `openapi.json` says what it means."""
    kinds = [kind for kind in KINDS if kind is not without]
    for status in sorted({kind.status for kind in kinds}):
        types = [f"urn:ingestd:problem:{kind.slug}" for kind in kinds if kind.status == status]
        schema = {
            "allOf": [_ref("schemas/Problem")],
            "properties": {"type": {"enum": types}, "status": {"const": status}},
        }
        responses[f"Problem{status}"]["content"] = {PROBLEM_TYPE: {"schema": schema}}


def _any_of(bodies: Mapping[str, Any]) -> dict[str, Any]:
    """A body for a pipeline of which nothing is said."""
    content = {kind: what for body in bodies.values() for kind, what in body["content"].items()}
    text = "JSON or JSON lines, text lines, or bytes, as the pipeline takes them; others are 415."
    return {"description": text, "required": True, "content": content}


def _send_to(send: Mapping[str, Any], form: str, name: str = "") -> dict[str, Any]:
    """The operation of `/v1/records`, for one pipeline by its name."""
    there = copy.deepcopy(dict(send))
    there["operationId"] = f"send_records_to_{name}" if name else "send_records_to"
    there["summary"] = f"Send records to the pipeline {name}" if name else "Send records by name"
    there["requestBody"] = _body(form)
    if not name:
        there["responses"]["404"] = _ref("responses/Problem404")
    return there


def _deliver(send: Mapping[str, Any]) -> dict[str, Any]:
    """The operation of a webhook: a delivery is signed, and its id is its idempotency key."""
    there = copy.deepcopy(dict(send))
    there["operationId"], there["summary"] = "deliver", "Deliver to a webhook by name"
    there["description"] = (
        "A signed delivery (Standard Webhooks, GitHub or Stripe) is one record. The signature is"
        " checked on the body as it comes; one that does not fit is 401. A delivery that comes"
        " again is accepted once and gets the first one's answer."
    )
    left_out = (_ref("parameters/IdempotencyKey"), _ref("parameters/Prefer"))
    there["parameters"] = [one for one in there["parameters"] if one not in left_out]
    there["requestBody"] = _body("delivery")
    there["responses"]["401"] = _ref("responses/Problem401")
    there["responses"]["404"] = _ref("responses/Problem404")
    return there


def _body(form: str) -> dict[str, str]:
    return _ref(f"requestBodies/{form}")


def _ref(what: str) -> dict[str, str]:
    return {"$ref": f"#/components/{what}"}
