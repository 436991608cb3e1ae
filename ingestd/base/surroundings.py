"""The surroundings of the start: what a worker gets, whenever it is started.

A handler in a thread may change the daemon's own folder, environment, umask and search path in good
faith; a worker that is started later, for another pipeline, gets none of that.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple


class Surroundings(NamedTuple):
    """What a program finds at its start.

    Attributes:
        folder: the current folder, absolute.
        environ: the environment.
        umask: permissions that new files do not get.
        path: where modules are looked for; every entry is absolute.
    """

    folder: str
    environ: dict[str, str]
    umask: int
    path: list[str]

    @classmethod
    def now(cls) -> Surroundings:
        """Those of this moment; before a handler is imported they are those of the start.

        Raises:
            OSError: the current folder is gone.
        """
        folder = os.getcwd()  # noqa: PTH109  text, also if it is not UTF-8
        umask = os.umask(0o077)  # which can only be read by setting it
        os.umask(umask)
        return cls(folder, dict(os.environ), umask, absolute(sys.path, folder))


def absolute(path: list[str], folder: str) -> list[str]:
    """The entries of a search path, each relative one as seen from a folder."""
    return [os.path.join(folder, os.fspath(entry)) if entry else folder for entry in list(path)]  # noqa: PTH118
