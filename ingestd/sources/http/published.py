"""What there is to read at the http source, made once at its start: it does not change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd import __version__
from ingestd.sources.http.answer import HTML, JSON
from ingestd.sources.http.document import Document, make_document
from ingestd.sources.http.openapi import describe
from ingestd.sources.http.page import make_page
from ingestd.sources.http.routes import ASK, READ, SERVER, Resource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingestd.base.record import Format


def published(
    pipelines: Mapping[str, Format],
    *,
    default: str,
    public_names: bool,
    address: str,
    secure: bool,
    webhooks: bool,
) -> dict[str, Resource[Document]]:
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
        SERVER: Resource(ASK, Document(204)),
    }
