"""Answers that are ready before anybody asks: a body with an `ETag`, or nothing but headers."""

from __future__ import annotations

import hashlib
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_NONE: Mapping[str, str] = MappingProxyType({})


class Document(NamedTuple):
    """One such answer.

    Attributes:
        status: of the answer.
        content_type: of the body; empty if there is none.
        body: the whole.
        headers: more of them; ASCII without CR and LF.
    """

    status: int
    content_type: bytes = b""
    body: bytes = b""
    headers: Mapping[str, str] = _NONE


def make_document(content_type: bytes, body: bytes, headers: Mapping[str, str]) -> Document:
    """A document that browsers and caches may keep, and ask every time whether it is still so."""
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    common = {"ETag": tag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Document(200, content_type, body, {**common, **headers})


def unless_known(document: Document, if_none_match: str) -> Document:
    """The document, or 304 if the client has it already (RFC 9110, 13.1.2; weak comparison)."""
    if not if_none_match:
        return document
    known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    if known & {document.headers["ETag"], "*"}:
        return Document(304, headers=document.headers)
    return document
