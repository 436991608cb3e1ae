"""Idempotency keys: which requests were accepted already, and what they were answered.

A key is put down in the same commit as the records that came with it, so neither is ever there
without the other. Before that it is claimed (`Keys.begin`), so two requests with one key can't both
be accepted; the claim ends when its append resolves, or when its holder gives it up (`forget`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.errors import KeyInFlight, KeyReused, Overloaded
from ingestd.base.once import Claim
from ingestd.base.rate import STALLED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ingestd.base.clock import Clock

RECENT_MAX = 4096
RECENT_BYTES = 512
"""So many keys are found without asking the disk; only those with answers up to this size."""
ROW_BYTES = 64
"""What a key takes beside its own bytes and its answer's, about."""
SWEEP_SECONDS = 1.0
SWEEP_ROWS = 200
"""Expired keys go this many at a time, and twice as many as came since the last time."""


class KeyRule(NamedTuple):
    """`http.idempotency_ttl` (seconds) and `http.idempotency_keys_max` (keys)."""

    ttl: float = 86400.0
    keys_max: int = 1_000_000


class Kept(NamedTuple):
    """A key whose request was accepted.

    Attributes:
        fingerprint: of the request.
        answer: what it got.
        at: when it was accepted, seconds since the epoch.
    """

    fingerprint: bytes
    answer: bytes
    at: float


def size_of(claim: Claim | None) -> int:
    """Bytes that a key counts for in the journal's bound."""
    if claim is None:
        return 0
    return len(claim.key) + len(claim.fingerprint) + len(claim.answer) + ROW_BYTES


class Keys:
    """The keys of one journal, on the event loop.

    Args:
        rule: how long, and how many.
        clock: where time comes from.
        find: looks a key up in the store.
        sweep: asks for expired keys to be deleted; may do it at once.

    Attributes:
        count: keys in the store, expired ones that are still there included.
    """

    def __init__(
        self,
        rule: KeyRule,
        clock: Clock,
        *,
        find: Callable[[str], Awaitable[Kept | None]],
        sweep: Callable[[], None],
    ) -> None:
        self.rule = rule
        self.count = 0
        self._clock = clock
        self._find = find
        self._sweep = sweep
        self._claims: dict[str, Claim] = {}
        self._recent: OrderedDict[str, Kept] = OrderedDict()

    async def begin(self, key: str, fingerprint: bytes) -> Claim | bytes:
        """The stored answer if this request was accepted before, else a claim on its key.

        The holder of a claim gives it to an append, and calls `forget` in any case.

        Raises:
            KeyInFlight: the same request is in progress.
            KeyReused: the key belongs to another request.
            Overloaded: no more keys can be remembered.
        """
        other = self._claims.get(key)
        if other is not None:
            raise KeyInFlight() if other.fingerprint == fingerprint else KeyReused()
        kept = self._recent.get(key)
        if kept is not None and self._lives(kept):
            self._recent.move_to_end(key)
            return _same(kept, fingerprint)
        claim = self._claims[key] = Claim(key, fingerprint)
        try:
            kept = await self._find(key)
            if kept is not None and self._lives(kept):
                self._remember(key, kept)
                answer = _same(kept, fingerprint)
            else:
                self._check_room()
                return claim
        except BaseException:
            self.forget(claim)
            raise
        self.forget(claim)
        return answer

    def forget(self, claim: Claim) -> None:
        """Ends a claim that no append carries; with one under way, its end is the journal's."""
        if not claim.submitted:
            self._release(claim)

    def resolved(self, claim: Claim, *, at: float, applied: bool) -> None:
        """The journal's word about the append that carried a claim.

        Args:
            claim: the claim.
            at: when it was accepted.
            applied: whether it was.
        """
        self._release(claim)
        if applied:
            self._remember(claim.key, Kept(claim.fingerprint, claim.answer, at))

    def _release(self, claim: Claim) -> None:
        if self._claims.get(claim.key) is claim:
            del self._claims[claim.key]

    def _lives(self, kept: Kept) -> bool:
        return self._clock.now() < kept.at + self.rule.ttl

    def _remember(self, key: str, kept: Kept) -> None:
        if len(kept.answer) > RECENT_BYTES:
            self._recent.pop(key, None)
            return
        self._recent[key] = kept
        self._recent.move_to_end(key)
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def _check_room(self) -> None:
        if not self._full():
            return
        self._sweep()
        if self._full():
            what = "the table of idempotency keys (http.idempotency_keys_max)"
            raise Overloaded(what=what, retry_after=STALLED)

    def _full(self) -> bool:
        return self.count + len(self._claims) > self.rule.keys_max


def _same(kept: Kept, fingerprint: bytes) -> bytes:
    if kept.fingerprint != fingerprint:
        raise KeyReused
    return kept.answer
