"""Layers into settings: who wins, what is wrong, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ingestd.base.anchoring import absolute
from ingestd.base.contradictions import ContradictionError
from ingestd.base.errors import ConfigError
from ingestd.base.keys import PIPELINES, dotted, field_at, shown, values_of
from ingestd.base.layers import (
    CONFIG_VARIABLE,
    Entry,
    Flag,
    from_environment,
    from_file,
    from_flags,
    from_secrets,
)
from ingestd.base.settings import Settings
from ingestd.base.units import NotUnderstoodError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

DEFAULT = "default"
SECRETS = Path("/run/secrets")
SYSTEM_CONFIG = Path("/etc/ingestd/ingestd.toml")
LOCAL_CONFIG = "ingestd.toml"

_Origins = dict[tuple[str, ...], str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each value came from.

    Attributes:
        settings: checked, pipelines filled in.
        origins: dotted key of everything in effect to `default`, `flag --x`, `env X`, `secret F`,
            `file F`, or `as KEY` for what a pipeline takes from the top level.
        file: the configuration file that was read, if there was one.
    """

    settings: Settings
    origins: Mapping[str, str]
    file: Path | None = None


def load(
    flags: Sequence[Flag] = (),
    *,
    environ: Mapping[str, str],
    cwd: Path,
    config: str | None = None,
    secrets: Path = SECRETS,
    system_config: Path = SYSTEM_CONFIG,
    before: Loaded | None = None,
) -> Loaded:
    """Flags over environment over secrets files over the TOML file over defaults.

    Args:
        flags: settings from the command line; what comes later wins.
        environ: the environment; `CREDENTIALS_DIRECTORY` names a first folder of secrets.
        cwd: where `ingestd.toml` is looked for and `config` starts from.
        config: the file that `--config` names; it has to be there.
        secrets: the second folder of secrets.
        system_config: the file that is read when there is no other.
        before: what was loaded earlier in this life: its file has to be there again, not empty if
            it was not, and secrets where there were some. Without them everything that they say
            would silently be undone.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    problems: list[str] = []
    if before is not None:
        config = str(before.file) if before.file else config
        problems.extend(_lost_secrets(before))
    written, origins = _gather(
        flags,
        problems,
        environ=environ,
        cwd=cwd,
        config=config,
        secrets=secrets,
        system_config=system_config,
        at_start=before is None,
        may_be_empty=before is None or not _said_something(before),
    )
    try:
        settings = Settings(**written)
    except ValidationError as error:
        problems.extend(_explain(error, origins))
    if problems:
        raise ConfigError(problem="\n".join(dict.fromkeys(problems)))
    named = config if config is not None else environ.get(CONFIG_VARIABLE) or None
    return Loaded(settings, _all_origins(settings, origins), find_config(named, cwd, system_config))


def _said_something(before: Loaded) -> bool:
    return any(origin.startswith("file ") for origin in before.origins.values())


def _lost_secrets(before: Loaded) -> Iterator[str]:
    """Folders of secrets that had some and have none of them any more."""
    folders: dict[Path, list[Path]] = {}
    for origin in before.origins.values():
        if origin.startswith("secret "):
            file = Path(origin.removeprefix("secret "))
            folders.setdefault(file.parent, []).append(file)
    for folder, files in folders.items():
        if not any(_is_there(file) for file in files):
            yield f"the secrets in {folder} are gone"


def glance(
    path: Sequence[str],
    flags: Sequence[Flag] = (),
    *,
    environ: Mapping[str, str],
    cwd: Path,
    config: str | None = None,
) -> object:
    """One value as it is written, `None` if it is not; whatever may be wrong with the rest.

    Args:
        path: of the setting.
        flags: as for `load`, like everything after it.
        environ: the environment.
        cwd: where a file is looked for.
        config: the file that `--config` names.
    """
    value: object
    value, _ = _gather(
        flags,
        [],
        environ=environ,
        cwd=cwd,
        config=config,
        secrets=SECRETS,
        system_config=SYSTEM_CONFIG,
    )
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _gather(
    flags: Sequence[Flag],
    problems: list[str],
    *,
    environ: Mapping[str, str],
    cwd: Path,
    config: str | None,
    secrets: Path,
    system_config: Path,
    at_start: bool = False,
    may_be_empty: bool = True,
) -> tuple[dict[str, Any], _Origins]:
    """What is written, the least important place first; see `merge`."""
    layers: list[list[Entry]] = []
    named = config if config is not None else environ.get(CONFIG_VARIABLE) or None
    file = find_config(named, cwd, system_config)
    if file is not None:
        layers.append(list(from_file(file, problems, may_wait=at_start, may_be_empty=may_be_empty)))
    layers.append(list(from_secrets(secrets, problems)))
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials and Path(credentials) != secrets:
        layers.append(list(from_secrets(Path(credentials), problems)))
    layers.append(list(from_environment(environ, problems)))
    layers.append(list(from_flags(flags, problems)))
    return merge(entry for layer in layers for entry in layer)


def find_config(named: str | None, cwd: Path, system_config: Path) -> Path | None:
    """The one file that is read: a named one, else `./ingestd.toml`, else the system's."""
    if named is not None:
        return absolute(named, cwd, "--config")
    return next((file for file in (cwd / LOCAL_CONFIG, system_config) if _is_there(file)), None)


def _is_there(file: Path) -> bool:
    """Whether there is something to read or to complain about."""
    try:
        return file.exists()
    except PermissionError:
        return True


def merge(entries: Iterable[Entry]) -> tuple[dict[str, Any], _Origins]:
    """Entries, least important first, as one nested table, and where each value came from."""
    tree: dict[str, Any] = {}
    origins: _Origins = {}
    for path, value, origin in entries:
        *above, last = path
        table = tree
        for depth, name in enumerate(above, start=1):
            if not isinstance(table.get(name), dict):
                _forget(origins, path[:depth])
                table[name] = {}
            table = table[name]
        if value == {} and isinstance(table.get(last), dict):
            continue
        _forget(origins, path)
        table[last] = value
        origins[path] = origin
    return tree, origins


def _forget(origins: _Origins, path: tuple[str, ...]) -> None:
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]


def _all_origins(settings: Settings, origins: _Origins) -> dict[str, str]:
    return {dotted(path): _origin(path, origins) for path, _ in values_of(settings)}


def _origin(path: tuple[str, ...], origins: _Origins) -> str:
    if path in origins:
        return origins[path]
    if path[0] != PIPELINES:
        return DEFAULT
    handler = path[:3]
    own_handler = path[2] == "handler" and _own(handler, origins)
    return DEFAULT if own_handler else f"as {dotted(path[2:])}"


def _whence(path: tuple[str, ...], origins: _Origins) -> str:
    """Where a setting, or something in a table, came from."""
    return _own(path, origins) or _origin(path, origins)


def _own(path: tuple[str, ...], origins: _Origins) -> str | None:
    """Where something at a path, or below it, was written; `None` if it was not."""
    return next((origin for key, origin in origins.items() if key[: len(path)] == path), None)


def _explain(error: ValidationError, origins: _Origins) -> list[str]:
    lines = []
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ContradictionError):
            lines += [
                _contradiction(key, text, _whence(tuple(key.split(".")), origins))
                for key, text in _without_inherited(cause.problems)
            ]
            continue
        path = tuple(str(part) for part in detail["loc"])
        origin = _own(path, origins)
        if origin is None and path[:1] == (PIPELINES,):
            continue  # taken from the top level, where the same is said
        secret = (origin or "").startswith("secret ")
        lines.append(f"{dotted(path)} ({origin or DEFAULT}): {_problem(detail, path, secret)}")
    return lines


def _contradiction(key: str, text: str, origin: str) -> str:
    hidden = origin.startswith("secret ")
    return f"{key} ({origin}): {'does not go with other settings' if hidden else text}"


def _without_inherited(problems: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Without what a pipeline only has because the top level has it."""
    for key, text in problems:
        below = key.split(".", 2)
        if below[0] != PIPELINES or (below[2], text) not in problems:
            yield key, text


def _problem(detail: ErrorDetails, path: tuple[str, ...], secret: bool) -> str:
    """What is wrong with one value; without the value if it is a secret, or may be one."""
    cause, context, kind = detail.get("ctx", {}).get("error"), detail.get("ctx", {}), detail["type"]
    field = field_at(path)
    if isinstance(cause, NotUnderstoodError):
        return f"is not {cause.expected}" if secret else str(cause)
    if cause is not None:
        return "is not understood" if secret else str(cause)
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f"should be {_BOUNDS[kind]} {shown(field, bound)}"
    if kind == "literal_error":
        return f"should be {context['expected']}"
    return _PLAIN.get(kind) or detail["msg"].replace("Input should", "should", 1)


_BOUNDS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
_PLAIN = {
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "path_type": "should be the path of a folder",
    "missing": "is missing",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "list_type": "should be a list",
}
