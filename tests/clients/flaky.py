"""`ingestd` whose pipelines refuse every twentieth append, as at a bound: 503 over HTTP.

Run as `python -m tests.clients.flaky run …`. The second append is the first that is refused, so
that a client with few requests meets one as well.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ingestd.__main__ import main
from ingestd.base.errors import Overloaded
from ingestd.pipeline import Pipeline

if TYPE_CHECKING:
    from ingestd.base.append import Append

accept = Pipeline.accept
numbers = itertools.count(1)


async def refuse_some(self: Pipeline, append: Append) -> None:
    if next(numbers) % 20 == 2:
        raise Overloaded(what="the journal", retry_after=0.1)
    await accept(self, append)


if __name__ == "__main__":
    Pipeline.accept = refuse_some  # type: ignore[method-assign]
    main()
