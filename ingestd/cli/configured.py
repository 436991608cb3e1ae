"""Loads the settings from the flags of a command."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestd.base.errors import ConfigError
from ingestd.config.keys import dotted, shown
from ingestd.config.loader import DEFAULT, Loaded, anchored, load
from ingestd.config.sections import MASK
from ingestd.execution.settings import uncalled
from ingestd.handlers.options import Secret, options_of
from ingestd.handlers.target import own_sink
from ingestd.settings import SCHEMA, Settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence


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
        self._origins: dict[str, str] = {}

    def effective(self, settings: Settings) -> Iterator[tuple[str, object, str]]:
        """Yields key, value and origin of each of the settings in effect; secrets are masked."""
        return effective_values(settings, self._origins_of(settings))

    def _origins_of(self, running: Settings) -> dict[str, str]:
        """The origin of each setting in effect, by its dotted key.

        What was loaded last may need a restart, or have been refused: a value that is not in it has
        the origin that it had before, and is masked if that is a secret.
        """
        last = self._before or self.load()
        written = dict(SCHEMA.values_of(last.settings))
        found = {}
        for path, value in SCHEMA.values_of(running):
            key = dotted(path)
            is_last = path in written and written[path] == value
            origins = self._origins if not is_last and key in self._origins else last.origins
            found[key] = origins.get(key, DEFAULT)
        return found

    def load(self, running: Settings | None = None) -> Loaded[Settings]:
        """Loads the settings as they are written now, every path in them absolute.

        Args:
            running: the settings in effect, at a reload.

        Raises:
            ConfigError: with one line for everything that is wrong.
        """
        if running is not None:
            self._origins = self._origins_of(running)
        loaded = load(
            Settings,
            self._arguments.flags,
            environ=self._environ,
            cwd=self._cwd,
            config=self._arguments.config,
            before=self._before,
        )
        _demand_called(loaded)
        self._before = replace(loaded, settings=anchored(loaded.settings, self._cwd))
        return self._before


def _demand_called(loaded: Loaded[Settings]) -> None:
    """Refuses the default as HANDLER where it would never be called; others have been refused.

    In a file it may stand beside `handler.targets`, as in one that has every default.

    Raises:
        ConfigError: `handler.targets` takes its place.
    """
    origin = loaded.written.get(("handler", "target"), "")
    if origin.startswith(("argument ", "flag ")) and (problem := uncalled(loaded.settings.handler)):
        raise ConfigError(problem=f"handler.target ({origin}): {problem}")


def here() -> Path:
    """The current folder.

    Raises:
        ConfigError: it is gone.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(problem=f"the current folder is gone: {error.strerror}") from error


# -- settings in effect ----------------------------------------------------------------------------

_SECRET_NAME = re.compile(
    r"pass|pwd|token|secret|key|dsn|credential|auth|private|cookie|signature", re.IGNORECASE
)
_PLAIN = re.compile(r"|true|false|-?[0-9]{1,9}(\.[0-9]{1,9})?", re.IGNORECASE)


def effective_values(
    settings: Settings, origins: Mapping[str, str]
) -> Iterator[tuple[str, object, str]]:
    """Yields key, value and origin of each setting; secrets are masked.

    Args:
        settings: checked.
        origins: of each, by its dotted key.
    """
    for path, value in SCHEMA.values_of(settings):
        origin = origins[dotted(path)]
        if origin == DEFAULT and _is_hint(path, value):
            origin = "suits the sink"
        source = origins.get(origin.removeprefix("as "), "") if origin[:3] == "as " else origin
        is_secret = source.startswith("secret ")
        yield dotted(path), MASK if is_secret else _visible(path, value, settings), origin


def _is_hint(path: Sequence[str], value: object) -> bool:
    """Returns True for a bound that is neither written nor the default."""
    field = SCHEMA.field_at(path)
    return path[-2:-1] in [("batch",), ("queue",)] and field is not None and value != field.default


def _visible(path: Sequence[str], value: object, settings: Settings) -> object:
    if "options" in path:
        return _option(path, value, _harmless(path, settings))
    return shown(SCHEMA.field_at(path), value)


def _harmless(path: Sequence[str], settings: Any) -> bool:
    """Returns True for an option of our own sinks that is no secret."""
    handler = settings.handler if path[0] == "handler" else settings.pipelines[path[1]].handler
    names = path[path.index("options") + 1 :]
    target = handler.target if not handler.targets else names[0] if names else ""
    struct = options_of(own_sink(target))
    return struct is not None and not set(names) & set(struct.named(Secret))


def _option(path: Sequence[str], value: object, harmless: bool) -> object:
    """An option as it may be shown: text may be a secret, whatever it is called."""
    names = path[path.index("options") + 1 :]
    if any(_SECRET_NAME.search(name) for name in names):
        return MASK
    if isinstance(value, dict):
        return {key: _option((*path, key), inner, harmless) for key, inner in value.items()}
    if isinstance(value, list):
        return [_option(path, inner, harmless) for inner in value]
    if isinstance(value, str) and not (harmless or _PLAIN.fullmatch(value)):
        return MASK
    return value
