"""Paths of the settings made absolute, once: what changes the current folder later changes nothing.

A handler that runs in the daemon's process may change it in good faith.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ingestd.base.errors import ConfigError
from ingestd.base.keys import dotted
from ingestd.base.section import AFile
from ingestd.base.settings import HandlerSettings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pydantic.fields import FieldInfo

    from ingestd.base.settings import Settings

_NO_PATHS = ("", "-")  # nothing, and standard input


def anchored(
    settings: Settings, cwd: Path, sink_paths: Mapping[str, Collection[str]] = {}
) -> Settings:
    """The settings with every path absolute, and with the user's folder for a leading `~`.

    Args:
        settings: as they were written.
        cwd: what a relative path starts from.
        sink_paths: the options that are paths, for each handler that is known to have some.

    Raises:
        ConfigError: there is no such user's folder; names the setting.
    """
    return settings.model_copy(update=dict(_changes(settings, cwd, sink_paths, ())))


def absolute(path: str | Path, cwd: Path, key: str) -> Path:
    """One path; `key` is what an error names.

    Raises:
        ConfigError: it starts with `~`, and there is no such user's folder.
    """
    try:
        return cwd / Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            problem=f"{key}: there is no home folder for {str(path)!r}; write the whole path,"
            f" or ./{path} for a folder of that name"
        ) from None


def _changes(
    model: BaseModel,
    cwd: Path,
    sink_paths: Mapping[str, Collection[str]],
    above: tuple[str, ...],
) -> Iterator[tuple[str, Any]]:
    if isinstance(model, HandlerSettings):
        names = sink_paths.get(model.target, ())
        found = {name: model.options[name] for name in names if _is_path(model.options.get(name))}
        made = {
            name: str(absolute(value, cwd, dotted((*above, "options", name))))
            for name, value in found.items()
        }
        yield "options", {**model.options, **made}
        return
    for name, field in type(model).model_fields.items():
        value, path = getattr(model, name), (*above, name)
        if _names_a_file(field, value):
            yield name, type(value)(absolute(value, cwd, dotted(path)))
        elif isinstance(value, BaseModel):
            changed = dict(_changes(value, cwd, sink_paths, path))
            yield name, value.model_copy(update=changed)
        elif isinstance(value, dict) and any(isinstance(one, BaseModel) for one in value.values()):
            yield (
                name,
                {
                    key: one.model_copy(update=dict(_changes(one, cwd, sink_paths, (*path, key))))
                    for key, one in value.items()
                },
            )


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value not in _NO_PATHS


def _names_a_file(field: FieldInfo, value: object) -> bool:
    if isinstance(value, Path):
        return True
    return _is_path(value) and any(isinstance(mark, AFile) for mark in field.metadata)
