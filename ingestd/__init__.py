"""ingestd turns a Python function into a durable, batched ingestion service.

```
 source ──append──▶ journal ──tail──▶ asyncio.Queue ──▶ batcher ──seal──▶ executor ──▶ handler
 (http, stdin,     (group commit,    (bounded, join-    (count, bytes,   (thread,       (yours, or
  fetch)            one fsync)        able)              age)             process, …)    a sink)
    ▲                   ▲                                                                   │
    └─ 2xx after commit └────────── settle: done · retry (backoff) · dead letter ◀──────────┘
```

A handler is a plain function that gets a batch. Returning means done, raising means again:

```python
import ingestd

def store(batch: ingestd.Batch[dict]) -> None:
    for index, record in enumerate(batch):
        if "id" not in record:
            batch.reject(index, "no id")
```

`raise ingestd.Reject("why")` gives a whole batch up without another try, and `raise
ingestd.Retry("why", after=30)` says "not now": it comes again, and no attempt is spent. The daemon
itself starts with `ingestd run module:name`; read `ingestd/daemon.py` first.

Names are resolved when they are asked for: every worker imports this package and has to start
fast, so nothing is imported here that it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingestd.base.envelope import Envelope
    from ingestd.handlers.batch import Batch, Blocked, Reject, Retry, RetryAfter, Unavailable

    __version__: str

__all__ = [
    "Batch", "Blocked", "Envelope", "Reject", "Retry", "RetryAfter", "Unavailable", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in __all__ and name != "__version__":
        from ingestd.handlers import batch  # noqa: PLC0415

        value: object = getattr(batch, name)
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            value = version("ingestd")
        except PackageNotFoundError:  # run from a checkout that is not installed
            value = "0+unknown"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
