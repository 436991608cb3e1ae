"""What a client of `/openapi.json` has to do that no schema can say; for `test_openapi_fuzz.py`.

Loaded by schemathesis in a process of its own.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from typing import Any

import cramjam
import schemathesis
from hypothesis import strategies as st

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACK = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
    "snappy": lambda body: bytes(cramjam.snappy.compress_raw(body)),
}
LINE_TYPES = ("application/x-ndjson", "application/jsonl")

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_lines = st.lists(_values, min_size=1, max_size=5).map(
    lambda values: b"".join(json.dumps(value).encode() + b"\n" for value in values)
)
# OpenAPI 3.1 has no schema for what is in a line, so JSON lines are made here.
schemathesis.openapi.media_type(LINE_TYPES[0], _lines, aliases=LINE_TYPES[1:])


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Examples of a type with a strategy of its own can't be sent; `test_openapi.py` sends them."""
    for body in raw_schema["components"]["requestBodies"].values():
        for kind in LINE_TYPES:
            body["content"].get(kind, {}).pop("examples", None)


_keys: set[str] = set()


def _keep_its_word(request: Any) -> Any:
    """The body is compressed as its header says."""
    pack = PACK.get(request.headers.get("Content-Encoding", ""))
    if pack is not None and request.body:
        body = request.body.encode() if isinstance(request.body, str) else request.body
        request.body = pack(body)
        request.headers["Content-Length"] = str(len(request.body))
    return request


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """A key is used for one request only; `auth` is where requests lets one change a body that
    is ready for the wire."""
    kwargs["auth"] = _keep_its_word
    key = case.headers.get("Idempotency-Key")
    if key is not None:
        key = key.replace("\\", "").strip(' "')  # in quotes or not, it is the same key
    if key in _keys and case.meta.generation.mode.is_positive:
        del case.headers["Idempotency-Key"]
    elif key is not None:
        _keys.add(key)
