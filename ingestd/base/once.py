"""A request that may be sent again: its key, and what becomes of it (`Idempotency-Key`)."""

from __future__ import annotations

WEBHOOK = "webhook"
"""The kind of principal whose keys are the signed ids of deliveries."""


def scoped(principal: str, key: str) -> str:
    """A key as a journal stores it: no principal's key is another one's.

    Args:
        principal: its kind, a space, its name: `token shop`; `anonymous` is one of its own.
        key: what the client calls its request; visible ASCII, no spaces.
    """
    return f"{principal} {key}"


def principal_of(scoped_key: str) -> str:
    """Whose a stored key is; empty for one of a journal that did not tell principals apart."""
    return scoped_key.rpartition(" ")[0]


class Claim:
    """A request's hold on its key, until its append has resolved or is given up.

    Attributes:
        key: what the client calls the request, `scoped`.
        fingerprint: tells whether another request with this key is the same one.
        answer: what is stored beside the key; set before the append.
        submitted: an append carries it; from then on the journal ends it.
    """

    __slots__ = ("answer", "fingerprint", "key", "submitted")

    def __init__(self, key: str, fingerprint: bytes) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.answer = b""
        self.submitted = False
