"""Puts the current folder last on the import path, before anything else is imported."""

from __future__ import annotations

import os

from ingestd.base.path import put_last

try:
    put_last(os.getcwd())  # noqa: PTH109  pathlib imports a lot
except OSError:  # the current folder is gone; its users report that
    pass
