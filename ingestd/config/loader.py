"""Loads settings, and plans their reload.

Flags come over environment over secrets files over a TOML file over defaults.

Every path is made absolute once, because a handler that runs in the daemon's process may change
the current folder in good faith.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, time
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from ingestd.base.errors import ConfigError
from ingestd.config.keys import PIPELINES, SOURCES, Schema, dotted, shown
from ingestd.config.layers import CONFIG_VARIABLE, Entry, Flag, LayerReader
from ingestd.config.sections import AFile, Reloadable, Section, ValidationProblems
from ingestd.config.units import NotUnderstoodError, UnquotedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


S = TypeVar("S", bound=BaseModel)

DEFAULT = "default"
SECRETS = Path("/run/secrets")
SYSTEM_CONFIG = Path("/etc/ingestd/ingestd.toml")
LOCAL_CONFIG = "ingestd.toml"

_Origins = dict[tuple[str, ...], str]
_NO_PATHS = ("", "-")  # nothing, and standard input


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Settings, and where each value came from.

    Attributes:
        settings: checked, pipelines filled in.
        written: path of each setting that is written, to `flag --x`, `env X`, `secret F`, `file F`.
        file: the configuration file that was read, if there was one.
    """

    settings: S
    written: _Origins
    file: Path | None = None

    @cached_property
    def origins(self) -> dict[str, str]:
        """The origin of each setting that is in effect, by its dotted key.

        `default`, `flag --x`, `env X`, `secret F`, `file F`, or `as KEY` for what a pipeline takes
        from the top level.
        """
        paths = Schema(type(self.settings)).values_of(self.settings)
        return {dotted(path): _origin(path, self.written) for path, _ in paths}


def load(
    model: type[S],
    flags: Sequence[Flag] = (),
    *,
    environ: Mapping[str, str],
    cwd: Path,
    config: str | None = None,
    secrets: Path = SECRETS,
    system_config: Path = SYSTEM_CONFIG,
    before: Loaded[S] | None = None,
) -> Loaded[S]:
    """Flags over environment over secrets files over the TOML file over defaults.

    Args:
        model: of all settings.
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
    schema = Schema(model)
    if before is not None:
        config = str(before.file) if before.file else config
        problems.extend(_lost_secrets(before))
    file = find_config(config, environ, cwd, system_config)
    written, origins = _gather(
        flags,
        LayerReader(schema, problems),
        environ=environ,
        file=file,
        secrets=secrets,
        at_start=before is None,
        may_be_empty=before is None or not _said_something(before),
    )
    try:
        settings = model(**written)
    except ValidationError as error:
        problems.extend(_explain(error, origins, schema))
    if problems:
        raise ConfigError(problem="\n".join(dict.fromkeys(problems)))
    return Loaded(settings, origins, file)


def _said_something(before: Loaded[S]) -> bool:
    return any(origin.startswith("file ") for origin in before.origins.values())


def _lost_secrets(before: Loaded[S]) -> Iterator[str]:
    """Folders of secrets that had some and have none of them any more."""
    folders: dict[Path, list[Path]] = {}
    for origin in before.written.values():
        if origin.startswith("secret "):
            file = Path(origin.removeprefix("secret "))
            folders.setdefault(file.parent, []).append(file)
    for folder, files in folders.items():
        if not any(_is_there(file) for file in files):
            yield f"the secrets in {folder} are gone"


def peek(
    model: type[BaseModel],
    path: Sequence[str],
    flags: Sequence[Flag] = (),
    *,
    environ: Mapping[str, str],
    cwd: Path,
    config: str | None = None,
) -> object:
    """One value as it is written, `None` if it is not; whatever may be wrong with the rest.

    Args:
        model: of all settings.
        path: of the setting.
        flags: as for `load`, like everything after it.
        environ: the environment.
        cwd: where a file is looked for.
        config: the file that `--config` names.
    """
    value: object
    value, _ = _gather(
        flags,
        LayerReader(Schema(model), []),
        environ=environ,
        file=find_config(config, environ, cwd, SYSTEM_CONFIG),
        secrets=SECRETS,
    )
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _gather(
    flags: Sequence[Flag],
    reader: LayerReader,
    *,
    environ: Mapping[str, str],
    file: Path | None,
    secrets: Path,
    at_start: bool = False,
    may_be_empty: bool = True,
) -> tuple[dict[str, Any], _Origins]:
    """Reads all layers, the least important first; see `merge`."""
    layers: list[list[Entry]] = []
    if file is not None:
        layers.append(list(reader.from_file(file, may_wait=at_start, may_be_empty=may_be_empty)))
    layers.append(list(reader.from_secrets(secrets)))
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials and Path(credentials) != secrets:
        layers.append(list(reader.from_secrets(Path(credentials))))
    layers.append(list(reader.from_environment(environ)))
    layers.append(list(reader.from_flags(flags)))
    return merge(entry for layer in layers for entry in layer)


def find_config(
    config: str | None, environ: Mapping[str, str], cwd: Path, system_config: Path
) -> Path | None:
    """The one file that is read: a named one, else `./ingestd.toml`, else the system's."""
    named = config if config is not None else environ.get(CONFIG_VARIABLE) or None
    if named is not None:
        return absolute(named, cwd, "--config")
    return next((file for file in (cwd / LOCAL_CONFIG, system_config) if _is_there(file)), None)


def _is_there(file: Path) -> bool:
    """Returns True if there is a file to read, or an error to report."""
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


def _origin(path: tuple[str, ...], origins: _Origins) -> str:
    if path in origins:
        return origins[path]
    if path[0] != PIPELINES:
        return DEFAULT
    handler = path[:3]
    own_handler = path[2] == "handler" and _own(handler, origins)
    return DEFAULT if own_handler else f"as {dotted(path[2:])}"


def _whence(path: tuple[str, ...], origins: _Origins) -> str:
    """The origin of a setting, or of an entry of a table."""
    return _own(path, origins) or _origin(path, origins)


def _own(path: tuple[str, ...], origins: _Origins) -> str | None:
    """The origin of an entry at a path, or below it; `None` if there is none."""
    return next((origin for key, origin in origins.items() if key[: len(path)] == path), None)


def _explain(error: ValidationError, origins: _Origins, schema: Schema) -> list[str]:
    lines = []
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ValidationProblems):
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
        text = _problem(detail, schema.field_at(path), secret)
        lines.append(f"{dotted(path)} ({origin or DEFAULT}): {text}")
    return lines


def _contradiction(key: str, text: str, origin: str) -> str:
    hidden = origin.startswith("secret ")
    return f"{key} ({origin}): {'is empty, or contradicts other settings' if hidden else text}"


def _without_inherited(problems: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Without what a pipeline only has because the top level has it."""
    for key, text in problems:
        below = key.split(".", 2)
        if below[0] != PIPELINES or (below[2], text) not in problems:
            yield key, text


def _problem(detail: ErrorDetails, field: FieldInfo | None, secret: bool) -> str:
    """Explains a wrong value, without the value if it is a secret, or may be one."""
    cause, context, kind = detail.get("ctx", {}).get("error"), detail.get("ctx", {}), detail["type"]
    if isinstance(cause, NotUnderstoodError):
        return f"is not {cause.expected}" if secret else str(cause)
    if cause is not None:
        public = not secret or isinstance(cause, UnquotedError)
        return str(cause) if public else f"is not valid{_meant(field)}"
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f"should be {_BOUNDS[kind]} {shown(field, bound)}"
    if kind == "literal_error":
        close = "" if secret else _nearest(detail["input"], context["expected"])
        return f"should be {context['expected']}{close}"
    if (
        kind == "string_type"
        and not secret
        and isinstance(detail["input"], int | float | date | time)
    ):
        return "should be text: put it in quotes"
    if kind == "union_tag_invalid":
        return f"{context['tag']!r} is not one of the kinds {context['expected_tags']}"
    return _PLAIN.get(kind) or detail["msg"].replace("Input should", "should", 1)


def _meant(field: FieldInfo | None) -> str:
    """The description of a setting, in place of an error that may quote a secret."""
    return f": should be the {field.description}" if field and field.description else ""


def _nearest(written: object, expected: str) -> str:
    """Suggests the word in quotes of `expected` that is most like what was written; else empty."""
    close = get_close_matches(str(written), re.findall(r"'([^']*)'", expected), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
    "extra_forbidden": "is not a setting of this kind",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "list_type": "should be a list",
}


def anchored(settings: S, cwd: Path) -> S:
    """The settings with every path absolute, and with the user's folder for a leading `~`.

    Args:
        settings: as they were written.
        cwd: what a relative path starts from.

    Raises:
        ConfigError: there is no such user's folder; names the setting.
    """
    return settings.model_copy(update=dict(_changes(settings, cwd, ())))


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


def _changes(model: BaseModel, cwd: Path, above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    options = model.path_options() if isinstance(model, Section) else ()
    for name, field in type(model).model_fields.items():
        value, path = getattr(model, name), (*above, name)
        if _names_a_file(field, value):
            yield name, type(value)(absolute(value, cwd, dotted(path)))
        elif isinstance(value, BaseModel):
            yield name, value.model_copy(update=dict(_changes(value, cwd, path)))
        elif isinstance(value, dict) and any(isinstance(one, BaseModel) for one in value.values()):
            yield (
                name,
                {
                    key: one.model_copy(update=dict(_changes(one, cwd, (*path, key))))
                    for key, one in value.items()
                },
            )
        elif isinstance(value, dict) and options:
            for keys in options:
                value = _with_absolute(value, keys, cwd, path)
            yield name, value


def _with_absolute(
    table: dict[str, Any], keys: tuple[str, ...], cwd: Path, above: tuple[str, ...]
) -> dict[str, Any]:
    """A table of options with the path at some keys absolute, if there is one."""
    first, *rest = keys
    value, path = table.get(first), (*above, first)
    if rest and isinstance(value, dict):
        return {**table, first: _with_absolute(value, tuple(rest), cwd, path)}
    if rest or not _is_path(value):
        return table
    return {**table, first: str(absolute(table[first], cwd, dotted(path)))}


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value not in _NO_PATHS


def _names_a_file(field: FieldInfo, value: object) -> bool:
    if isinstance(value, Path):
        return True
    return _is_path(value) and any(isinstance(mark, AFile) for mark in field.metadata)


# -- reload ----------------------------------------------------------------------------------------
#
# A change takes effect in a running daemon if its field, or the section that it is in, is marked
# `Reloadable`. Pure.


class Change(NamedTuple, Generic[S]):
    """The effect of new settings.

    Attributes:
        settings: those of the running daemon with everything that can change put in.
        changed: keys whose value changed, dotted.
        needs_restart: keys that are set to another value and stay as they were, dotted.
    """

    settings: S
    changed: list[str]
    needs_restart: list[str]


def plan(running: S, new: S, check: Callable[[S], list[tuple[str, str]]]) -> Change[S]:
    """Compares the settings in effect with those that are configured now.

    Args:
        running: the settings that are in effect.
        new: what is configured now.
        check: finds what does not go together: (dotted key, what is wrong with it) for each.

    Raises:
        ConfigError: what can change does not go with what can't; one line for each problem.
    """
    changed: list[str] = []
    needs_restart: list[str] = []
    schema = Schema(type(running))
    for path in _different(schema, running, new):
        (changed if _is_reloadable(schema, path) else needs_restart).append(dotted(path))
    settings = _merge(running, new)
    problems = [
        f"{key}: {text}; what needs a restart is as it was" for key, text in check(settings)
    ]
    if problems:
        raise ConfigError(problem="\n".join(problems))
    return Change(settings, changed, needs_restart)


def _different(schema: Schema, running: BaseModel, new: BaseModel) -> Iterator[tuple[str, ...]]:
    before, after = dict(schema.values_of(running)), dict(schema.values_of(new))
    # A pipeline or source that came, went or is of another kind is one change, not one for each of
    # its settings.
    whole = [
        (table, name)
        for table in (PIPELINES, SOURCES)
        for name in _came_or_went(getattr(running, table), getattr(new, table))
    ]
    yield from whole
    for path in dict.fromkeys((*before, *after)):
        if path[:2] not in whole and before.get(path) != after.get(path):
            yield path


def _came_or_went(running: dict[str, BaseModel], new: dict[str, BaseModel]) -> list[str]:
    names = sorted(running.keys() | new.keys())
    return [name for name in names if type(running.get(name)) is not type(new.get(name))]


def _is_reloadable(schema: Schema, path: tuple[str, ...]) -> bool:
    fields = (schema.field_at(path[:end]) for end in range(1, len(path) + 1))
    return any(field is not None and _marked(field.metadata) for field in fields)


def _marked(metadata: list[object]) -> bool:
    return any(isinstance(mark, Reloadable) for mark in metadata)


def _merge(running: S, new: S) -> S:
    """The running settings with what is reloadable taken from the new ones."""
    update: dict[str, object] = {}
    for name, field in type(running).model_fields.items():
        old, value = getattr(running, name), getattr(new, name)
        if _marked(field.metadata):
            update[name] = value
        elif isinstance(old, BaseModel):
            update[name] = _merge(old, value)
        elif isinstance(old, dict) and any(isinstance(one, BaseModel) for one in old.values()):
            update[name] = {
                key: _merge(one, value[key]) if type(value.get(key)) is type(one) else one
                for key, one in old.items()
            }
    return running.model_copy(update=update)
