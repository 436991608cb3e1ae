"""Loads the settings from the flags of a command."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.errors import ConfigError
from ingestd.config.loader import Loaded, anchored, load
from ingestd.settings import Settings

if TYPE_CHECKING:
    import argparse


def configured(arguments: argparse.Namespace) -> Loaded[Settings]:
    """The settings of this process, every path in them absolute.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    return Configuration(arguments).load()


class Configuration:
    """The sources of settings of this process, kept for reloads.

    The current folder and the environment are those of the start: a handler in a thread of the
    daemon may change both.

    Args:
        arguments: of the command line.

    Raises:
        ConfigError: the current folder is gone.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._environ = dict(os.environ)
        self._cwd = here()
        self._before: Loaded[Settings] | None = None

    def load(self) -> Loaded[Settings]:
        """Loads the settings as they are written now, every path in them absolute.

        Raises:
            ConfigError: with one line for everything that is wrong.
        """
        loaded = load(
            Settings,
            self._arguments.flags,
            environ=self._environ,
            cwd=self._cwd,
            config=self._arguments.config,
            before=self._before,
        )
        self._before = loaded
        return replace(loaded, settings=anchored(loaded.settings, self._cwd))


def here() -> Path:
    """The current folder.

    Raises:
        ConfigError: it is gone.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(problem=f"the current folder is gone: {error.strerror}") from error
