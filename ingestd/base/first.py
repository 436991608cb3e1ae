"""What has to be done before anything else is imported: see `path.py`."""

from __future__ import annotations

import os

from ingestd.base.path import put_last

try:
    put_last(os.getcwd())  # noqa: PTH109  pathlib imports a lot
except OSError:  # the current folder is gone; whoever needs it says so
    pass
