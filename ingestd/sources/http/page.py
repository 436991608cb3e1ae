"""`/`: a page for people who open the address in a browser. Nothing of a request is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from ingestd.config.network import is_loopback
from ingestd.sources.http.routes import RECORDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingestd.base.record import Format

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
