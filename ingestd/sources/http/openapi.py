"""`/openapi.json`, this daemon as OpenAPI 3.1, and the page at `/`; made from the endpoints.

`openapi.json` beside this file has what is the same in every daemon: `x-operation` is the start of
each operation. Filled in here: the version, the paths of each endpoint, and the types of the
problems of each status, from `problem.py`.
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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd import __version__
from ingestd.config.network import is_loopback
from ingestd.http.credentials import IN_BODY, TokenScheme
from ingestd.http.problem import FORBIDDEN, FOREIGN_ORIGIN, KINDS, ProblemType
from ingestd.http.response import HTML, JSON, StaticResponse, make_document
from ingestd.sources.http.endpoints.base import ANY, PIPELINE, SIGNATURE, Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import RouteSpec

PROBLEM_TYPE = "application/problem+json"
_REFERENCE = re.compile(r'"\$ref":"([^"]*)"')


def describe(
    version: str,
    endpoints: Mapping[str, Endpoint],
    formats: Mapping[str, Format],
    *,
    public_names: bool,
    schemas: Mapping[str, bytes] = MappingProxyType({}),
) -> bytes:
    """Returns the document.

    Args:
        version: of ingestd.
        endpoints: by name.
        formats: of the records of each pipeline.
        public_names: everybody may know the pipelines, and send; else there is one path with a
            parameter, a pipeline takes any body, and a token is needed.
        schemas: of the records of pipelines that validate them, as `ScreenedIntake.schema` has it.
    """
    text = files(__package__).joinpath("openapi.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    document["info"]["version"] = version
    parts = document["components"]
    # Where no credentials are needed, the origin of pages is checked.
    _fill_problems(parts["responses"], without=FORBIDDEN if public_names else FOREIGN_ORIGIN)
    parts["requestBodies"]["any"] = _any_of(parts["requestBodies"])
    for pipeline, schema in schemas.items():
        _add_records(parts, pipeline, *msgspec.json.decode(schema))
    common = document.pop("x-operation")
    for name, endpoint in endpoints.items():
        for path, route, value, form in _described(endpoint, formats, public_names=public_names):
            item = document["paths"].setdefault(path, {})
            if route.variable in path and route.variable:
                item["parameters"] = [_variable(route.variable.strip("{}"), route)]
            ways = {way.name: way for way in route.auth if isinstance(way, TokenScheme)}
            parts["securitySchemes"] |= {way: dict(one.security) for way, one in ways.items()}
            for method in route.probes:
                item[method.lower()] = _probe(common, name, f"{path} {method}")
            for method in route.methods:
                operation = _operation(
                    common, name, f"{path} {method}", route, public_names=public_names
                )
                more = endpoint.describe(route, value, form).operation
                operation |= {key: member for key, member in more.items() if key != "responses"}
                operation["responses"] = _in_its_own_form(endpoint, operation["responses"])
                operation["responses"] |= more.get("responses", {})
                if form == "json" and (to := route.targets[value].pipeline) in schemas:
                    _name_records(operation, to)
                item[method.lower()] = operation
    _drop_unused(document)
    return msgspec.json.encode(document)


def _described(
    endpoint: Endpoint, formats: Mapping[str, Format], *, public_names: bool
) -> Iterator[tuple[str, RouteSpec, str, Format | None]]:
    """Yields each path that may be told, its route, the variable in it, and the format there."""
    for route in endpoint.routes:
        if public_names and route.variable in ("", PIPELINE):
            for value, target in route.targets.items():
                yield route.path_of(value), route, value, formats[target.pipeline]
        else:
            yield route.path, route, "", None


def _operation(
    common: Mapping[str, Any],
    name: str,
    where: str,
    route: RouteSpec,
    *,
    public_names: bool,
) -> dict[str, Any]:
    """Returns what all operations have in common, as far as it holds for this one."""
    operation = copy.deepcopy(dict(common))
    operation |= {"operationId": _id(name, where), "summary": f"Send records as {name}"}
    responses = operation["responses"]
    if route.auth == SIGNATURE:
        del responses["403"]
    elif public_names:
        del responses["401"]
    else:
        names = [way.name if isinstance(way, TokenScheme) else way for way in route.auth]
        operation["security"] = [{} if way == IN_BODY else {way: []} for way in names]
    if route.variable and not (public_names and route.variable == PIPELINE):
        responses["404"] = _ref("responses/Problem404")
    return operation


def _in_its_own_form(endpoint: Endpoint, responses: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the responses of an operation, less those whose form is the endpoint's own."""
    if endpoint.settings is None:
        return dict(responses)
    own = {
        "2": type(endpoint).answer is not Endpoint.answer,
        "45": type(endpoint).error is not Endpoint.error,
    }
    digits = "".join(which for which, is_own in own.items() if is_own)
    kept = {status: what for status, what in responses.items() if status[0] not in digits}
    return kept | {f"{digit}XX": {"description": "As the protocol has it"} for digit in digits}


def _add_records(
    parts: dict[str, Any], pipeline: str, schema: Mapping[str, Any], named: Mapping[str, Any]
) -> None:
    """Adds the schema of a pipeline's records, and the body of such records, under its name."""
    parts["schemas"] |= {**named, pipeline: schema}
    body = copy.deepcopy(parts["requestBodies"]["json"])
    record = _ref(f"schemas/{pipeline}")
    body["description"] += f" Each record is a `{pipeline}`; one that is not is invalid."
    several = {"type": "array", "minItems": 1, "items": record}
    for media in body["content"].values():
        media.pop("examples", None)
    body["content"]["application/json"]["schema"] = {"anyOf": [several, record]}
    parts["requestBodies"][pipeline] = body


def _name_records(operation: dict[str, Any], pipeline: str) -> None:
    """Puts the body of a pipeline's own records in place of that of any JSON."""
    if operation.get("requestBody") == _ref("requestBodies/json"):
        operation["requestBody"] = _ref(f"requestBodies/{pipeline}")


def _id(name: str, where: str) -> str:
    where = where.replace("/ ", "/root ")  # another one than without the slash
    return re.sub(r"[^a-z0-9]+", "_", f"{name} {where}".lower()).strip("_")


def _probe(common: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Returns an operation that has no records."""
    return {
        "operationId": _id(name, where),
        "tags": common["tags"],
        "summary": f"Probe of {name} clients",
        "responses": {"2XX": {"description": "As the protocol has it"}},
    }


def _variable(name: str, route: RouteSpec) -> dict[str, Any]:
    schema = {"type": "string"}
    if ANY not in route.targets:
        schema["pattern"] = "^[a-z][a-z0-9_-]{0,62}$"
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": f"The name of a {name}.",
        "schema": schema,
    }


def _drop_unused(document: dict[str, Any]) -> None:
    """Leaves out the components that nothing refers to, but the answers to other paths."""
    parts = document["components"]
    kept = {"#/components/responses/Problem404", "#/components/responses/Problem405"}
    operations = [one for path in document["paths"].values() for one in path.values()]
    ways = [way for one in operations if "responses" in one for way in one.get("security", ())]
    schemes = {scheme for way in ways for scheme in way}
    kept |= {f"#/components/securitySchemes/{scheme}" for scheme in schemes}
    while True:
        used = kept | set(_REFERENCE.findall(msgspec.json.encode(document).decode()))
        unused = [
            (kind, name)
            for kind, members in parts.items()
            for name in members
            if f"#/components/{kind}/{name}" not in used
        ]
        if not unused:
            break
        for kind, name in unused:
            del parts[kind][name]
    document["components"] = {kind: members for kind, members in parts.items() if members}


def _fill_problems(responses: dict[str, Any], *, without: ProblemType) -> None:
    """Fills in an example of a problem for each status that `openapi.json` describes."""
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


def _ref(what: str) -> dict[str, str]:
    return {"$ref": f"#/components/{what}"}


# -- the page at `/` -------------------------------------------------------------------------------
#
# Nothing of a request is in it.


class Page(NamedTuple):
    """The page, and the headers that go with it."""

    html: bytes
    headers: dict[str, str]


def make_page(
    version: str,
    endpoints: Mapping[str, Endpoint],
    formats: Mapping[str, Format],
    *,
    public_names: bool,
    address: str,
    secure: bool = False,
) -> Page:
    """Returns the page.

    Args:
        version: of ingestd.
        endpoints: by name.
        formats: of the records of each pipeline.
        public_names: everybody may know the pipelines.
        address: where it listens, `HOST:PORT`; shown if it is this machine's own (loopback):
            any other may be nobody's business, and wrong behind a proxy. Or `unix:PATH`.
        secure: it speaks TLS.
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
    examples, rows = [], []
    for endpoint in endpoints.values():
        for path, route, value, form in _described(endpoint, formats, public_names=public_names):
            if not route.methods:
                continue
            told = endpoint.describe(route, value, form)
            examples += [f"# {title}\ncurl {body} {url}{path}" for title, body in told.examples]
            to = route.targets[value].pipeline if form else "-"
            rows.append(_row(path, to, form or "-", told.takes))
    html = Template(template).substitute(
        version=escape(version),
        about_url=about,
        examples=escape("\n\n".join(examples), quote=False),
        paths="".join(rows),
    )
    return Page(html.encode(), _headers(html))


def _row(path: str, pipeline: str, form: str, takes: str) -> str:
    return (
        f'<tr><th scope="row"><code>{escape(path)}</code></th><td>{escape(form)}</td>'
        f"<td>{escape(pipeline)}</td><td>{escape(takes)}</td></tr>\n"
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


# -- documents -------------------------------------------------------------------------------------


PAGE, DESCRIPTION = "/", "/openapi.json"


def make(
    path: str,
    endpoints: Mapping[str, Endpoint],
    formats: Mapping[str, Format],
    *,
    public_names: bool,
    address: str,
    secure: bool,
    schemas: Mapping[str, bytes] = MappingProxyType({}),
) -> StaticResponse:
    """Returns one of the two documents.

    Args:
        path: `PAGE` or `DESCRIPTION`.
        endpoints: by name.
        formats: of the records of each pipeline.
        public_names: everybody may know the pipelines.
        address: where the source listens, `HOST:PORT` or `unix:PATH`.
        secure: it speaks TLS.
        schemas: see `describe`.
    """
    common: Any = {"public_names": public_names}
    if path == DESCRIPTION:
        described = describe(__version__, endpoints, formats, schemas=schemas, **common)
        return make_document(JSON, described, {})
    page = make_page(__version__, endpoints, formats, address=address, secure=secure, **common)
    return make_document(HTML, page.html, page.headers)
