"""Flags of the command line: every setting by its dotted name, common ones by short names too.

Only names are checked here: values are settings, and settings are checked in one place. The parser
of a start knows the flags that are in use; for `--help`, and to explain a wrong one, it knows all.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin

from ingestd.config.keys import KeyKind, dotted, settings_of, shown, tables_of, unit_of
from ingestd.config.layers import Flag
from ingestd.config.sections import Choice
from ingestd.handlers.options import options_of
from ingestd.handlers.target import own_sink
from ingestd.registry import SINKS
from ingestd.settings import SCHEMA, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

    from ingestd.cli.output import Parser

# setting, its short flag, the name of its value
COMMON = (
    ("source.kind", "--source", ""),
    ("http.listen", "--listen", "HOST:PORT"),
    ("data_dir", "--data-dir", "DIR"),
    ("format", "--format", "json|text|bytes"),
)
_OFTEN = (
    "batch.records_max", "batch.age_max", "executor.workers", "executor.timeout",
    "retry.attempts_max", "journal.bytes_max", "drain.timeout", "log.level",
)  # fmt: skip
"""Settings that are changed most often: help shows them before the hundreds of others."""
_KIND = "source.kind"
_SHORT = {flag: key for key, flag, _ in COMMON}
_MEANT = {"--port": "--listen", "--host": "--listen", "--bind": "--listen"}
"""Flags of other servers, and ours for the same."""
_WITHOUT_HELP = ("--config", "--version", "--")
_KEYS_SHOWN = 5
_METAVARS = {"bytes": "SIZE", "seconds": "TIME", "": "NUMBER", "words": "WORD,…"}


class _Arguments(Protocol):
    """A parser, or a group of its arguments."""

    def add_argument(self, *names: str, **options: Any) -> Any: ...


class _Keep(argparse.Action):
    """Stores a setting's flag with its text, in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        flag = Flag(self.dest, str(values), option_string or self.dest)
        kinds = [one.value for one in namespace.flags if one.key == self.dest == _KIND]
        if kinds and kinds[-1] != flag.value:
            parser.error(
                f"{flag.written} {kinds[-1]} and {flag.value}: it chooses one source. A daemon with"
                " several has a table [sources.NAME] with a kind for each"
            )
        namespace.flags = [*namespace.flags, flag]


def add_settings(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the flags of `run` and `check`: those in `argv`, or all where that may be asked for."""
    parser.set_defaults(flags=[])
    used = {word.split("=", 1)[0] for word in argv if word.startswith("-")}
    settings = {flag: _SHORT.get(flag, flag.removeprefix("--")) for flag in used}
    if not all(flag in _WITHOUT_HELP or _is_setting(key) for flag, key in settings.items()):
        _add_all(parser, argv)
        return
    _add_config(parser)
    for flag in sorted(used.difference(_WITHOUT_HELP)):
        _add(parser, flag, settings[flag], "VALUE", argparse.SUPPRESS)


def _is_setting(key: str) -> bool:
    kind = SCHEMA.locate(key.split("."))
    return kind in {KeyKind.VALUE, KeyKind.FREE, KeyKind.INSIDE}


def _add_all(parser: Parser, argv: Sequence[str]) -> None:
    """Adds all flags, with their help; those with the user's own names are read in `argv`."""
    own_names = {dotted(path): (field, keys) for path, field, keys in tables_of(Settings)}
    free = [key for key, (_, keys) in own_names.items() if not keys]
    with_own_names = tuple(f"--{key}." for key in own_names)
    parser.nearest_setting = partial(_nearest, with_own_names)
    parser.fault_of = lambda flag: SCHEMA.fault_at(flag.lstrip("-").split("."))
    fields = {dotted(path): field for path, field in settings_of(Settings)}
    group = parser.add_argument_group("common flags")
    _add_config(group)
    for key, flag, metavar in COMMON:
        field = fields.pop(key)
        _add(group, flag, key, metavar or _metavar(field), _help(field))
        if flag != f"--{key}":
            _add(group, f"--{key}", key, metavar, argparse.SUPPRESS)
            parser.hidden.append(f"--{key}")
    for key in _OFTEN:
        field = fields.pop(key)
        _add(group, f"--{key}", key, _metavar(field), _help(field))
    group = parser.add_argument_group(
        "settings",
        "each as a flag (--batch.records_max 500), as a variable (INGESTD_BATCH__RECORDS_MAX=500)\n"
        "or in the file; sizes like 64MiB, times like 250ms",
    )
    for key, field in fields.items():
        if key in free:
            _add(group, f"--{key}.NAME", f"{key}.NAME", "TEXT", _help(field))
            _add(group, f"--{key}", key, "JSON", argparse.SUPPRESS)
        else:
            _add(group, f"--{key}", key, _metavar(field), _help(field))
    for table, (field, keys) in own_names.items():
        if keys:
            more = ", …" if len(keys) > _KEYS_SHOWN else ""
            text = f"{field.description}: {', '.join(keys[:_KEYS_SHOWN])}{more}"
            _add(group, f"--{table}.NAME.KEY", f"{table}.NAME.KEY", "VALUE", text)
    parser.epilog = f"sinks: {', '.join(SINKS.names())}; with one, the flags of its options follow"
    taken: set[str] = set()
    for target in [word for word in SINKS.own if {word, f"--handler.target={word}"} & set(argv)]:
        taken |= _add_options(parser, target)
    for flag in _own_names(argv, with_own_names):
        if flag not in taken:
            _add(group, flag, flag.removeprefix("--"), "VALUE", argparse.SUPPRESS)


def _add_options(parser: argparse.ArgumentParser, sink: str) -> set[str]:
    """Adds the flags of a sink's options, and returns them."""
    struct = options_of(own_sink(sink))
    if struct is None:
        return set()
    flags = set()
    group = parser.add_argument_group(f"options of {sink}")
    for one in struct.help():
        known = f" [{one.default}]" if one.default else ""
        flag = f"--handler.options.{one.name}"
        text = f"{one.text}{known if one.default is not None else ' (required)'}"
        _add(group, flag, flag[2:], one.kind.upper(), text.replace("%", "%%"))
        flags.add(flag)
    return flags


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that locate the daemon's data directory, as `run` would find it."""
    parser.set_defaults(flags=[])
    _add_config(parser)
    group = parser.add_argument_group("location")
    _add(group, "--data-dir", "data_dir", "DIR", "the daemon's data directory, as for run")
    _add(group, "--data_dir", "data_dir", "DIR", argparse.SUPPRESS)


def add_admin(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that locate the daemon's admin server, as `run` would find it."""
    parser.set_defaults(flags=[])
    _add_config(parser)
    text = "the daemon's admin address, as for run"
    _add(parser, "--admin.listen", "admin.listen", "HOST:PORT", text)


def add_where(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that chooses records by values in them; see `ingestd.codecs.pointer.Where`."""
    parser.add_argument(
        "--where", action="append", default=[], type=_condition, metavar="KEY=VALUE",
        help="only JSON records with this value; KEY is a member or a JSON Pointer (/user/id);"
        " repeatable, all have to hold",
    )  # fmt: skip


def _condition(written: str) -> str:
    from ingestd.codecs.pointer import Where  # noqa: PLC0415  a daemon's start has no conditions

    try:
        Where([written])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return written


def positive(written: str) -> int:
    """A count from 1 to `sys.maxsize`.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        number = int(written)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{written!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError("should be at least 1")
    if number > sys.maxsize:
        raise argparse.ArgumentTypeError(f"should be at most {sys.maxsize}")
    return number


def _add_config(group: _Arguments) -> None:
    group.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file [./ingestd.toml, else /etc/ingestd/ingestd.toml]",
    )


def _add(
    group: _Arguments,
    flag: str,
    key: str,
    metavar: str,
    text: str,
) -> None:
    group.add_argument(
        flag, dest=key, metavar=metavar, help=text, action=_Keep, default=argparse.SUPPRESS
    )


def _own_names(argv: Sequence[str], tables: tuple[str, ...]) -> list[str]:
    flags = {word.split("=", 1)[0] for word in argv if word.startswith(tables)}
    flags -= {f"{table}{rest}" for table in tables for rest in ("NAME", "NAME.KEY")}
    return sorted(flag for flag in flags if SCHEMA.locate(flag.removeprefix("--").split(".")))


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    if choice := next((mark for mark in field.metadata if isinstance(mark, Choice)), None):
        return "|".join(choice.names())
    if field.annotation is bool:
        return "true|false"
    unit = unit_of(field)
    if unit is None and get_origin(field.annotation) is tuple:
        return "URLS"
    return _METAVARS[unit.name] if unit else "TEXT"


def _help(field: FieldInfo) -> str:
    default = shown(field, field.get_default(call_default_factory=True, validated_data={}))
    if isinstance(default, bool):
        default = str(default).lower()
    if isinstance(default, list) and default:
        default = ", ".join(map(str, default))
    known = "" if default in ({}, []) else f" [{default}]" if default != "" else ' [""]'
    return f"{field.description}{known}".replace("%", "%%")


def _nearest(with_own_names: tuple[str, ...], flag: str, close: str | None) -> str | None:
    """A slip of the finger first, then the setting that was meant, then any flag that is near."""
    if flag in _MEANT:
        return _MEANT[flag]
    is_slip = close is not None and get_close_matches(flag, [close], cutoff=0.85)
    if is_slip and not flag.startswith(with_own_names):
        return close
    key = SCHEMA.nearest(flag.lstrip("-").split("."))
    return "--" + ".".join(key) if key else close
