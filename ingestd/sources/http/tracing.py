"""`traceparent`: the trace that a request is part of, for the lines of the log. No I/O.

https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = "traceparent"
_VALUE = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<parent>[0-9a-f]{16})"
    r"-[0-9a-f]{2}(?P<more>-.*)?",
    re.ASCII,
)


def read_trace(values: Sequence[str]) -> dict[str, str]:
    """`trace_id` and `parent_id`, from all the `traceparent`s of a request; nothing if it is none.

    A version that is not known yet may have more behind what is known (4.3 there).
    """
    match = _VALUE.fullmatch(values[0]) if len(values) == 1 else None
    if match is None or (match["more"] and match["version"] == "00"):
        return {}
    return {"trace_id": match["trace"], "parent_id": match["parent"]}
