"""How far a source has read something, as it rides with the records that were read up to there."""

from __future__ import annotations

from typing import NamedTuple

STATE_BYTES_MAX = 8192
"""What a source may keep of one input."""


class Bookmark(NamedTuple):
    """A place in one input; put down in the commit of its records, in place of the one before.

    Attributes:
        key: names the input; holds nothing that is secret.
        state: what its source needs to go on from there, at most `STATE_BYTES_MAX` bytes.
    """

    key: str
    state: bytes
