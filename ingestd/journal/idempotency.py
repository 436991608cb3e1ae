"""Idempotency keys: which requests were accepted already, and what they were answered.

A key is put down in the same commit as the records that came with it, so neither is ever there
without the other. Before that it is claimed (`IdempotencyKeys.begin`), so two requests with one key
can't both be accepted; the claim ends when it is accepted, or when its holder gives it up
(`forget`). An append that is refused leaves it to its holder, who may try again.

A key belongs to its principal. Where there are several of them, each may hold at most as many keys
as are free for the others (the dynamic thresholds of A. K. Choudhury and E. L. Hahne, 1998): one
alone gets half of the table, and none can fill it. A key that is remembered is never dropped for
a new one before its time, or a request that is sent again would be accepted twice; so at its share
a principal is refused.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.append import WEBHOOK, IdempotencyClaim, principal_of
from ingestd.base.clock import Ages
from ingestd.base.errors import KeyInFlight, KeyReused, KeysFull
from ingestd.base.rate import STALLED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

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
    """Lifetime and bounds of idempotency keys.

    Attributes:
        ttl: `http.idempotency_ttl`, seconds.
        keys_max: `http.idempotency_keys_max`.
        signed_ttl: ids of signed deliveries are remembered at least as long as their signatures
            are valid, seconds.
        shared: there can be several principals; each has a share of the table.
        ids_max: `http.idempotency_ids_max`, of `RecentIds`.
    """

    ttl: float = 86400.0
    keys_max: int = 1_000_000
    signed_ttl: float = 0.0
    shared: bool = False
    ids_max: int = 200_000

    @property
    def kept(self) -> float:
        """Seconds after which any key goes from the table."""
        return max(self.ttl, self.signed_ttl)


class RememberedKey(NamedTuple):
    """A key whose request was accepted.

    Attributes:
        fingerprint: of the request.
        answer: what it got.
        at: when it was accepted, seconds since the epoch.
        number: of its message, where the daemons of a group share it in an engine; else 0.
    """

    fingerprint: bytes
    answer: bytes
    at: float
    number: int = 0


def size_of(claim: IdempotencyClaim | None) -> int:
    """Bytes that a key counts for in the journal's bound."""
    if claim is None:
        return 0
    return len(claim.key) + len(claim.fingerprint) + len(claim.answer) + ROW_BYTES


class IdempotencyKeys:
    """The keys of one journal, on the event loop.

    Args:
        rule: how long, and how many.
        clock: where time comes from.
        find: looks a key up in the store.
        sweep: asks for expired keys to be deleted; may do it at once.

    Attributes:
        rule: may be replaced.
        count: keys in the store, expired ones that are still there included.
        owners: how many of them each principal has.
    """

    def __init__(
        self,
        rule: KeyRule,
        clock: Clock,
        *,
        find: Callable[[str], Awaitable[RememberedKey | None]],
        sweep: Callable[[], None],
    ) -> None:
        self.rule = rule
        self.count = 0
        self.owners: Counter[str] = Counter()
        self._claimed: Counter[str] = Counter()
        self.ages = Ages(clock)
        self._find = find
        self._sweep = sweep
        self._claims: dict[str, IdempotencyClaim] = {}
        self._recent: OrderedDict[str, RememberedKey] = OrderedDict()

    async def begin(self, key: str, fingerprint: bytes) -> IdempotencyClaim | bytes:
        """The stored answer if this request was accepted before, else a claim on its key.

        The holder of a claim gives it to an append, and calls `forget` in any case.

        Raises:
            KeyInFlight: the same request is in progress.
            KeyReused: the key belongs to another request.
            KeysFull: no more keys can be remembered.
            Overloaded: it cannot be told now.
        """
        other = self._claims.get(key)
        if other is not None:
            same = other.fingerprint == fingerprint
            raise KeyInFlight() if same else KeyReused(in_progress=True)
        kept = self._recent.get(key)
        if kept is not None and self.lives(key, kept):
            self._recent.move_to_end(key)
            return _same(kept, fingerprint)
        claim = self._claims[key] = IdempotencyClaim(key, fingerprint)
        self._claimed[principal_of(key)] += 1
        try:
            kept = await self._find(key)
            if kept is None or not self.lives(key, kept):
                claim.replaces = 0 if kept is None else kept.number
                kept = await self._find_unscoped(key, fingerprint)
            if kept is not None:
                self.remember(key, kept)
                answer = _same(kept, fingerprint)
            else:
                self._check_room(principal_of(key))
                return claim
        except BaseException:
            self.forget(claim)
            raise
        self.forget(claim)
        return answer

    async def _find_unscoped(self, key: str, fingerprint: bytes) -> RememberedKey | None:
        """Finds a key of a journal that did not tell principals apart.

        Only the very same request is answered from it.
        """
        principal, _, bare = key.rpartition(" ")
        if not principal or not self.owners[""] or principal.startswith(WEBHOOK):
            return None
        kept = await self._find(bare)
        if kept is None or kept.fingerprint != fingerprint or not self.lives(bare, kept):
            return None
        return kept

    def forget(self, claim: IdempotencyClaim) -> None:
        """Ends a claim that no append carries; with one under way, its end is the journal's."""
        claim.forgotten = True
        if not claim.submitted:
            self._release(claim)

    def resolved(
        self, claim: IdempotencyClaim, *, at: float, applied: bool, taken: bool = False
    ) -> None:
        """The journal's word about the append that carried a claim.

        Args:
            claim: the claim.
            at: when it was accepted.
            applied: whether it was.
            taken: another daemon has its key.
        """
        claim.submitted = False
        if applied or taken or claim.forgotten:
            self._release(claim)
        if applied:
            self.count += 1
            self.owners[principal_of(claim.key)] += 1
            self.remember(claim.key, RememberedKey(claim.fingerprint, claim.answer, at))

    def opened(self, owners: Mapping[str, int]) -> None:
        """The store has these keys, by principal."""
        self.owners = Counter(owners)
        self.count = self.owners.total()

    def gone(self, owners: Mapping[str, int]) -> None:
        """So many keys went from the store, by principal."""
        for principal, number in owners.items():
            self.count -= number
            self.owners[principal] -= number
            if self.owners[principal] <= 0:
                del self.owners[principal]

    def _release(self, claim: IdempotencyClaim) -> None:
        if self._claims.get(claim.key) is claim:
            del self._claims[claim.key]
            principal = principal_of(claim.key)
            self._claimed[principal] -= 1
            if not self._claimed[principal]:
                del self._claimed[principal]

    def lifetime(self, key: str) -> float:
        """Seconds for which a key is remembered."""
        return self.rule.kept if key.startswith(f"{WEBHOOK} ") else self.rule.ttl

    def lives(self, key: str, kept: RememberedKey) -> bool:
        """Tells if a key has not expired."""
        return kept.at > self.ages.before(self.lifetime(key))

    def remember(self, key: str, kept: RememberedKey) -> None:
        """Has a key be found without asking the store, as long as it is one of the last ones."""
        if len(kept.answer) > RECENT_BYTES:
            self._recent.pop(key, None)
            return
        self._recent[key] = kept
        self._recent.move_to_end(key)
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def _check_room(self, principal: str) -> None:
        if not self._bound(principal):
            return
        self._sweep()
        if what := self._bound(principal):
            raise KeysFull(
                what=f"{what} idempotency keys (http.idempotency_keys_max)", retry_after=STALLED
            )

    def _bound(self, principal: str) -> str:
        """The bound that a principal exceeds with one more key; empty if none."""
        free = self.rule.keys_max - self.count - len(self._claims)
        if free < 0:
            return "the table of"
        mine = self.owners[principal] + self._claimed[principal]
        return "this client's share of the table of" if self.rule.shared and mine > free + 1 else ""


def _same(kept: RememberedKey, fingerprint: bytes) -> bytes:
    if kept.fingerprint != fingerprint:
        raise KeyReused
    return kept.answer
