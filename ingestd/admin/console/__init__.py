"""The console: a page of static files beside this module, made of the API of the admin address.

The files hold nothing of a daemon, so they are open to every request; what they show comes through
the API, with the reader's rights. The policy allows nothing but these files and that API, and a
text of a record is only ever set as text (`app.js`), so no record can become part of the page.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from ingestd.admin.access import Need
from ingestd.admin.connection import AdminPage
from ingestd.http.response import HTML, Response, StaticResponse, make_document, unless_known
from ingestd.http.routing import Resource

if TYPE_CHECKING:
    from ingestd.admin.connection import AdminRequest

FILES = {
    "index.html": HTML,
    "app.js": b"text/javascript; charset=utf-8",
    "style.css": b"text/css; charset=utf-8",
    "icon.svg": b"image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}
PLACE = "/console/"
_READ = ("GET", "HEAD")


def pages() -> dict[str, Resource[AdminPage]]:
    """The pages of the console by path, and the way to it from `/`."""
    found = {
        "/": Resource(_READ, AdminPage(Need.PROBE, _root), alone=True),
        PLACE[:-1]: Resource(_READ, AdminPage(Need.PROBE, _to_console)),
    }
    for name, kind in FILES.items():
        document = make_document(kind, files(__package__).joinpath(name).read_bytes(), _HEADERS)
        page = Resource(_READ, AdminPage(Need.PROBE, _Page(document).answer), alone=True)
        found[PLACE if name == "index.html" else PLACE + name] = page
    return found


class _Page:
    """One file.

    Args:
        document: made of it.
    """

    def __init__(self, document: StaticResponse) -> None:
        self._document = document

    def answer(self, request: AdminRequest) -> Response:
        """Gives the file, or 304 to a browser that has it."""
        one = unless_known(self._document, request.headers.get("if-none-match", ""))
        return Response(one.status, one.content_type, one.body, one.headers)


def _root(request: AdminRequest) -> Response:
    """Answers `/`: browsers go to the console, and everything else gets a list of the paths."""
    if "text/html" not in request.headers.get("accept", ""):
        return Response(200, b"text/plain; charset=utf-8", _paths())
    return _to_console(request)


def _paths() -> bytes:
    """A line for each operation."""
    from ingestd.admin.operations import OPERATIONS  # noqa: PLC0415  the API has imported it

    rows = [(f"{one.method} {one.path}", one.summary) for one in OPERATIONS.values()]
    rows.append((f"GET {PLACE}", "The console, for browsers"))
    width = max(len(request) for request, _ in rows)
    lines = [f"{request:<{width}}  {summary}" for request, summary in rows]
    return "\n".join(["ingestd: the admin address", "", *lines, ""]).encode()


def _to_console(_: AdminRequest) -> Response:
    # Relative, for a proxy that has it below a path of its own; as seen from `/` and `/console`.
    return Response(302, b"text/plain; charset=utf-8", b"see console/\n", {"Location": "console/"})
