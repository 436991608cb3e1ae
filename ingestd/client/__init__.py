"""Client of the records endpoint, and a `logging` handler on top of it; standard library alone.

```python
with Client("http://127.0.0.1:8080", token="…") as client:
    client.send({"user": 7, "event": "signup"})
```

`send` encodes a record, puts it into a bounded buffer and returns. One thread of the client's own
takes batches from there (by count, bytes or age), posts each over one connection that it keeps,
and gives the place back when the daemon has answered. `AsyncClient` is the same with coroutines in
front of it: nothing of the network runs on the event loop.

Invariants:

1. **Order.** Records are posted in the order of their `send`, one request at a time, and the halves
   of a request that was too large one after the other.
2. **Once.** A request keeps its bytes and its `Idempotency-Key` through all of its retries, so one
   that was accepted and whose answer was lost is accepted once. It is given up after
   `retry_timeout`, which has to be below the daemon's `http.idempotency_ttl`.
3. **Nothing without a trace.** `sent = accepted + invalid + dropped + pending` at every moment.
   `accepted` counts what a daemon has on its disk. Invalid records go to `on_invalid`, dropped ones
   to `on_dropped`, which runs before a `close` that gave them up returns.
4. **Bounds.** The buffer holds `buffer_bytes`, what is being posted included; at the bound `send`
   blocks, raises or drops. Waits, answers and the time that `close` takes have bounds, too.
5. **No lock is held** while the client logs, posts or calls back.

Losses:

* The process is killed, or left by `os._exit`: what is pending is lost.
* `close`, or the end of the interpreter, reaches its deadline: what is pending is dropped. The last
  request may have been accepted, its answer did not come.
* The daemon refuses a request for `retry_timeout`, or finally: its records are dropped.
* A fork loses nothing: what is pending stays with the parent, and the child begins with an empty
  buffer, with keys and a connection of its own.

Connection errors, a 2xx that no daemon gives, 408, 409, 425, 429, 5xx, and what tokens or paths
can mend (401, 403, 404, 421) are tried again, after `Retry-After` or a backoff. 413 splits a
request. All others are final.
"""

from __future__ import annotations

from ingestd.client.clients import AsyncClient, Client
from ingestd.client.exchange import BufferFull, ClientClosed, Counts
from ingestd.client.log_handler import LogHandler

__all__ = ["AsyncClient", "BufferFull", "Client", "ClientClosed", "Counts", "LogHandler"]
