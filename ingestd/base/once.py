"""A request that may be sent again: its key, and what becomes of it (`Idempotency-Key`)."""

from __future__ import annotations


class Claim:
    """A request's hold on its key, until its append has resolved or is given up.

    Attributes:
        key: what the client calls the request.
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
