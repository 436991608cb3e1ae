"""What `run` and `check` have in common: flags to settings, and a folder to import from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.errors import ConfigError
from ingestd.base.loading import Loaded, load

if TYPE_CHECKING:
    import argparse


def configured(arguments: argparse.Namespace) -> Loaded:
    """The settings of this process.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    return load(arguments.flags, environ=os.environ, cwd=here(), config=arguments.config)


def make_importable() -> None:
    """Puts the current folder first, where `python -m ingestd` has it and the script does not."""
    folder = str(here())
    if sys.path[:1] not in ([folder], [""]):
        sys.path.insert(0, folder)


def here() -> Path:
    """The current folder.

    Raises:
        ConfigError: it is gone.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(problem=f"the current folder is gone: {error.strerror}") from error
