"""A started http source with endpoints of ingestd before intakes in memory."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from ingestd.base.append import IdempotencyClaim
from ingestd.base.errors import Overloaded
from ingestd.sources.http import HttpSourceKind
from ingestd.sources.http.source import HttpSource
from ingestd.sources.screening import ScreenedIntake
from tests.sources.source_tools import MemoryIntake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from ingestd.base.append import Append


class KeyIntake(MemoryIntake):
    """An intake that remembers keys, at most `keys_max`."""

    keys_max = 1000

    def __init__(self, name: str = "default", **more: Any) -> None:
        super().__init__("json", name, **more)
        self.keys: dict[str, bytes] = {}
        self.claimed: set[str] = set()

    async def begin(self, key: str, _fingerprint: bytes) -> IdempotencyClaim | bytes:
        if key in self.keys:
            return self.keys[key]
        if len(self.keys) >= self.keys_max:
            raise Overloaded(what="keys", retry_after=1)
        self.claimed.add(key)
        return IdempotencyClaim(key, b"")

    async def accept(self, append: Append) -> None:
        await super().accept(append)
        placed = asyncio.get_running_loop().create_future()
        placed.set_result(None)
        await self.recent_ids.follow(append.ids, placed)
        if append.claim is not None:
            self.keys[append.claim.key] = append.claim.answer

    def forget(self, claim: IdempotencyClaim) -> None:
        self.claimed.discard(claim.key)


@contextlib.asynccontextmanager
async def serving_endpoint(
    name: str, *intakes: MemoryIntake, own: Mapping[str, Any] | None = None, **settings: Any
) -> AsyncIterator[HttpSource]:
    """A source whose endpoint `name` sends to the first intake."""
    first = intakes[0].name
    settings.setdefault("listen", "127.0.0.1:0")
    settings["endpoints"] = {name: {"pipeline": first, **(own or {})}}
    source = HttpSource(
        HttpSourceKind.settings(**settings),
        {intake.name: intake for intake in intakes},
        default=first,
        screens={one.name: one for one in intakes if isinstance(one, ScreenedIntake)},
    )
    await source.start()
    try:
        yield source
    finally:
        await source.close()
