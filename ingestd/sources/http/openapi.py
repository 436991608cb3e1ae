"""`/openapi.json`: what this daemon takes and answers, exactly, as OpenAPI 3.1.

What is the same in every daemon is written by hand in `openapi.json`. Filled in here: the version,
a path for each pipeline with the bodies of its format, and the types of the problems of each
status, from `problem.py`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd import __version__
from ingestd.config.network import is_loopback
from ingestd.http.problem import FORBIDDEN, FOREIGN_ORIGIN, KINDS, ProblemType
from ingestd.http.response import HTML, JSON, StaticResponse, make_document
from ingestd.http.routing import ASK, READ, RECORDS, SERVER, WEBHOOKS, Resource

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


def _fill_problems(responses: dict[str, Any], *, without: ProblemType) -> None:
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


# -- `/`: a page for people who open the address in a browser --------------------------------------
#
# Nothing of a request is in it.

_EXAMPLES: dict[Format, tuple[tuple[str, str], ...]] = {
    "json": (
        ("One record", """-d '{"user": 7}'"""),
        ("A JSON array is one record an element", """--json '[{"user": 7}, {"user": 8}]'"""),
        ("A file, line by line", "--data-binary @events.ndjson"),
    ),
    "text": (
        ("One record", "-d 'a line of text'"),
        ("A file, line by line", "--data-binary @access.log"),
    ),
    "bytes": (("The whole file is one record", "--data-binary @picture.png"),),
}
_TYPES: dict[Format, str] = {
    "json": "application/x-ndjson (one value a line), application/json",
    "text": "text/plain (one record a line)",
    "bytes": "application/octet-stream (the whole body is one record)",
}


class Page(NamedTuple):
    """The page, and the headers that go with it."""

    html: bytes
    headers: dict[str, str]


def make_page(
    version: str,
    pipelines: Mapping[str, Format],
    *,
    default: str,
    public_names: bool,
    address: str,
    secure: bool = False,
) -> Page:
    """The page.

    Args:
        version: of ingestd.
        pipelines: their formats by name.
        default: the one that `/v1/records` means.
        public_names: whether everybody may know the pipelines.
        address: where it listens, `HOST:PORT`; shown if it is this machine's own (loopback):
            any other may be nobody's business, and wrong behind a proxy. Or `unix:PATH`.
        secure: whether it speaks TLS.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    local = not address.startswith("unix:") and is_loopback(address)
    url = f"{'https' if secure else 'http'}://{address}" if local else "$url"
    about = (
        f"With <code>curl</code> on the machine it runs on; from elsewhere put this page&rsquo;s"
        f" address in place of <code>{escape(url)}</code>:"
        if local
        else "With <code>curl</code>, where <code>$url</code> is this page&rsquo;s address without"
        " the slash at its end:"
    )
    form = pipelines[default] if public_names else "json"
    html = Template(template).substitute(
        version=escape(version),
        about_url=about,
        examples=_examples(form, url),
        pipelines=_pipelines(pipelines, default) if public_names else "",
    )
    return Page(html.encode(), _headers(html))


def _examples(form: Format, url: str) -> str:
    lines = [f"# {what}\ncurl {body} {url}{RECORDS}" for what, body in _EXAMPLES[form]]
    return escape("\n\n".join(lines), quote=False)


def _pipelines(pipelines: Mapping[str, Format], default: str) -> str:
    rows = [_row(RECORDS, pipelines[default])]
    rows += [_row(f"{RECORDS}/{name}", form) for name, form in pipelines.items()]
    return (
        '<section aria-labelledby="pipelines">\n<h2 id="pipelines">Pipelines</h2>\n'
        f"<p><code>{RECORDS}</code> means <code>{escape(default)}</code>.</p>\n"
        '<table class="wide">\n<thead><tr><th scope="col">Path</th>'
        '<th scope="col">Format</th><th scope="col">Content-Type</th></tr></thead>\n<tbody>\n'
        + "".join(rows)
        + "</tbody>\n</table>\n</section>\n"
    )


def _row(path: str, form: Format) -> str:
    return (
        f'<tr><th scope="row"><code>{escape(path)}</code></th>'
        f"<td>{escape(form)}</td><td>{escape(_TYPES[form])}</td></tr>\n"
    )


def _headers(html: str) -> dict[str, str]:
    """No script, no form, no frame, nothing from anywhere; the one style sheet by its hash."""
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None  # noqa: S101 - page.html has one
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}


# -- what there is to read at the http source, made once at its start: it does not change ----------


def published(
    pipelines: Mapping[str, Format],
    *,
    default: str,
    public_names: bool,
    address: str,
    secure: bool,
    webhooks: bool,
) -> dict[str, Resource[StaticResponse]]:
    """The documents by path, and what is said of the server as a whole.

    Args:
        pipelines: their formats by name.
        default: the one that `/v1/records` means.
        public_names: whether everybody may know the pipelines.
        address: where the source listens, `HOST:PORT` or `unix:PATH`.
        secure: whether it speaks TLS.
        webhooks: whether there are any.
    """
    described = describe(
        __version__, pipelines, default=default, public_names=public_names, webhooks=webhooks
    )
    page = make_page(
        __version__,
        pipelines,
        default=default,
        public_names=public_names,
        address=address,
        secure=secure,
    )
    return {
        "/": Resource(READ, make_document(HTML, page.html, page.headers)),
        "/openapi.json": Resource(READ, make_document(JSON, described, {})),
        SERVER: Resource(ASK, StaticResponse(204)),
    }
