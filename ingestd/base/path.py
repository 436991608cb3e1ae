"""Orders the import path so that the user's folder never hides Python's modules or ours.

A file `queue.py` or `token.py` beside the handler would be taken for the standard library's, by us
or by a library, if its folder came first; Python puts it there with `-m`, and so may `PYTHONPATH`.
Nothing is imported here that Python has not imported already.
"""

from __future__ import annotations

import _thread
import os
import sys

_FOLDER = os.path.dirname(os.__file__)  # noqa: PTH120
_PREFIX = os.path.dirname(_FOLDER)  # noqa: PTH120
_changing = _thread.allocate_lock()
_put: set[str] = set()


def put_last(folder: str) -> None:
    """Moves a folder to the end of the path, if it is on it, while we import our own modules."""
    others = _without(folder)
    if len(others) < len(sys.path):
        sys.path[:] = [*others, folder]


def put_behind_library(folder: str) -> None:
    """Puts a folder behind the standard library and before everything that is installed.

    Once: each thread that loads a handler calls this, and meanwhile the handler's module, which the
    first of them imports, may add places of its own.
    """
    with _changing:
        if folder in _put and folder in sys.path:
            return
        _put.add(folder)
        others = _without(folder)
        behind = [place for place, entry in enumerate(others, 1) if _is_library(entry)]
        others.insert(max(behind, default=0), folder)
        sys.path[:] = others


def _without(folder: str) -> list[str]:
    real = os.path.realpath(folder)
    return [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != real]


def _is_library(entry: str) -> bool:
    return entry == _FOLDER or (
        entry.startswith(_PREFIX) and entry.endswith(("lib-dynload", ".zip"))
    )
