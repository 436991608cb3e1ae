"""Harness for tests of handlers: the real pipeline on a clock that needs no waiting.

```python
from ingestd.testing import Harness

def test_orders() -> None:
    with Harness("orders:store") as harness:
        harness.send([{"total": 5}, {"user": "ann"}])
        harness.run()
        assert harness.processed == [{"total": 5}]
        assert harness.dead[0].error == "no total"
```

What is real and what is not stands in `ingestd/testing/core.py`. Names are resolved when they
are asked for: pytest imports the plug-in in every run, also where no test uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingestd.testing.harness import AsyncHarness, Harness
    from ingestd.testing.values import HarnessError
    from ingestd.testing.workers import BatchCall, DeadRecord

__all__ = ["AsyncHarness", "BatchCall", "DeadRecord", "Harness", "HarnessError"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ingestd.testing import harness, values, workers  # noqa: PLC0415

    homes = (harness, values, workers)
    return next(getattr(home, name) for home in homes if hasattr(home, name))
