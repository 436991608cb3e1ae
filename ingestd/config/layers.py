"""Sources of settings: flags, environment, secrets files, a TOML file.

Each yields entries and collects problems, so that one start names everything that is wrong.
The sources that come with pydantic-settings let unknown names, misspelt variables and lost files
pass, and cannot say where a value came from; hence these.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.files import read_file
from ingestd.config.keys import KeyKind, dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from ingestd.config.keys import Schema

PREFIX = "INGESTD_"
CONFIG_VARIABLE = "INGESTD_CONFIG"
SECRET_PREFIX = "ingestd_"  # noqa: S105  the name of a file
SECRET_BYTES_MAX = 1024**2

# Kubernetes tells every pod of the services beside it, and Docker of linked containers. What it
# says of one called "ingestd" or "ingestd-admin" would look like misspelt settings. Values tell
# them apart: INGESTD_PORT=8080 is a mistake, INGESTD_PORT=tcp://10.0.0.1:8080 is a service's.
_PORT_OF_A_SERVICE = re.compile(r"(tcp|udp|sctp)://\S+", re.IGNORECASE)
_LINK = (
    "{}_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    "|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


class Entry(NamedTuple):
    """One thing that was written somewhere.

    Attributes:
        path: its keys, from the top.
        value: as it was written; an empty table for a table that is there and says nothing.
        origin: where, for people: `flag --listen`, `env INGESTD_HTTP__LISTEN`, `file x.toml`.
    """

    path: tuple[str, ...]
    value: object
    origin: str


class Flag(NamedTuple):
    """A setting from the command line: `http.listen`, its text, and the flag as it was written."""

    key: str
    value: str
    written: str


class LayerReader:
    """Reads settings from where they are written, and collects everything that is wrong with them.

    Args:
        schema: the settings that exist.
        problems: gets one line for everything that is wrong.
    """

    def __init__(self, schema: Schema, problems: list[str]) -> None:
        self._schema = schema
        self._problems = problems

    def from_flags(self, flags: Iterable[Flag]) -> Iterator[Entry]:
        """Yields the flags of the command line; later ones win."""
        for flag in flags:
            path = tuple(flag.key.split("."))
            if flag.written.startswith("argument"):  # of a call in a test
                yield from self._from_text(path, flag.value, flag.written, dotted)
            else:
                yield from self._from_text(path, flag.value, f"flag {flag.written}", _flag_name)

    def from_environment(self, environ: Mapping[str, str]) -> Iterator[Entry]:
        """`INGESTD_BATCH__RECORDS_MAX`; case does not matter behind the prefix."""
        links = _links(environ)
        for name in sorted(environ):
            if not name.startswith(PREFIX) or name == CONFIG_VARIABLE:
                continue
            if any(link.fullmatch(name) for link in links):
                continue
            path = tuple(name.removeprefix(PREFIX).lower().split("__"))
            yield from self._from_text(path, environ[name], f"env {name}", _variable_name)

    def from_secrets(self, folder: Path) -> Iterator[Entry]:
        """Files named `ingestd_handler__options__dsn`; one line end at their end is not theirs."""
        try:
            files = sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._problems.append(f"cannot read the secrets in {folder}: {error.strerror}")
            return
        for file in files:
            if not file.name.startswith(SECRET_PREFIX) or file.is_dir():
                continue
            path = tuple(file.name.removeprefix(SECRET_PREFIX).lower().split("__"))
            text = self._read_secret(file)
            if text is not None:
                yield from self._from_text(path, text, f"secret {file}", _secret_name)

    def from_file(
        self, file: Path, *, may_wait: bool = False, may_be_empty: bool = True
    ) -> Iterator[Entry]:
        """A TOML file that has to be there.

        Args:
            file: its path.
            may_wait: it may be a pipe, which can be read once.
            may_be_empty: there may be nothing in it, as there is while it is written anew.
        """
        import tomllib  # noqa: PLC0415  many a start has no file

        try:
            content = read_file(file, may_wait=may_wait)
            if not (content or may_be_empty):
                self._problems.append(
                    f"configuration file {file} is empty; a comment in it takes back all that it"
                    " said"
                )
            table = tomllib.loads(content.decode("utf-8-sig"))  # editors put a BOM there
        except FileNotFoundError:
            self._problems.append(f"there is no configuration file {file}")
        except OSError as error:
            self._problems.append(f"cannot read configuration file {file}: {error.strerror}")
        except UnicodeDecodeError:
            self._problems.append(f"configuration file {file} is not UTF-8 text")
        except (ValueError, RecursionError) as error:  # ValueError: a number of 5000 digits, too
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deep"
            self._problems.append(f"configuration file {file} is not TOML: {reason}")
        else:
            yield from self._from_table(table, (), f"file {file}")

    def _read_secret(self, file: Path) -> str | None:
        try:
            content = read_file(file, SECRET_BYTES_MAX)
            return content.decode().removesuffix("\n").removesuffix("\r")
        except OSError as error:
            self._problems.append(f"cannot read secrets file {file}: {error.strerror}")
        except UnicodeDecodeError:
            self._problems.append(f"secrets file {file} is not UTF-8 text")
        return None

    def _from_table(
        self, table: Mapping[str, object], above: tuple[str, ...], origin: str
    ) -> Iterator[Entry]:
        if not table and above:
            yield Entry(above, {}, origin)
        for name, value in table.items():
            path = (*above, name)
            kind, is_table = self._schema.locate(path), isinstance(value, dict)
            if wrong := self._schema.wrong_name(path):
                self._problems.append(f"{dotted(path)} ({origin}): {wrong}")
            elif kind is None:
                self._problems.append(self._unknown(f"key {dotted(path)} ({origin})", path, dotted))
            elif kind is KeyKind.VALUE and is_table:
                self._problems.append(f"{dotted(path)} ({origin}): is one value, not a table")
            elif kind in {KeyKind.TABLE, KeyKind.NAMED, KeyKind.FREE} and not is_table:
                self._problems.append(
                    f"{dotted(path)} ({origin}): {self._is_a_table(path, kind, dotted)}"
                )
            elif isinstance(value, dict):
                yield from self._from_table(value, path, origin)
            else:
                yield Entry(path, value, origin)

    def _from_text(
        self,
        path: tuple[str, ...],
        text: str,
        origin: str,
        name: Callable[[tuple[str, ...]], str],
    ) -> Iterator[Entry]:
        kind = self._schema.locate(path)
        if wrong := self._schema.wrong_name(path):
            self._problems.append(f"{dotted(path)} ({origin}): {wrong}")
        elif kind is None:
            self._problems.append(self._unknown(origin.replace("env ", "variable ", 1), path, name))
        elif kind is KeyKind.FREE:
            table = _json_table(text)
            if table is None:
                self._problems.append(
                    f"{dotted(path)} ({origin}): {self._is_a_table(path, kind, name)}"
                )
            else:
                yield from self._from_table(table, path, origin)
        elif kind in {KeyKind.TABLE, KeyKind.NAMED}:
            self._problems.append(
                f"{dotted(path)} ({origin}): {self._is_a_table(path, kind, name)}"
            )
        else:
            yield Entry(path, text, origin)

    def _unknown(
        self, what: str, path: tuple[str, ...], name: Callable[[tuple[str, ...]], str]
    ) -> str:
        if fault := self._schema.fault_at(path):
            return f"unknown {what}: {fault}"
        meant = self._schema.nearest(path)
        return f"unknown {what}" + (f", did you mean {name(meant)}?" if meant else "")

    def _is_a_table(
        self, path: tuple[str, ...], kind: KeyKind, name: Callable[[tuple[str, ...]], str]
    ) -> str:
        if kind is KeyKind.FREE:
            return f"is a table: write a JSON object, or one key like {name((*path, 'table'))}"
        return f"is a table: set a key in it, like {name(self._schema.example_in(path))}"


def _links(environ: Mapping[str, str]) -> list[re.Pattern[str]]:
    """The variables of each service whose address is in the environment."""
    services = set()
    for name, value in environ.items():
        if not name.startswith(PREFIX):
            continue
        if name.endswith("_SERVICE_HOST") and _is_ip(value):
            services.add(name.removesuffix("_SERVICE_HOST"))
        elif name.endswith("_PORT") and _PORT_OF_A_SERVICE.fullmatch(value):
            services.add(name.removesuffix("_PORT"))
    return [re.compile(_LINK.format(re.escape(service))) for service in services]


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _json_table(text: str) -> dict[str, object] | None:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


def _flag_name(path: tuple[str, ...]) -> str:
    return "--" + ".".join(path)


def _variable_name(path: tuple[str, ...]) -> str:
    return PREFIX + "__".join(path).upper()


def _secret_name(path: tuple[str, ...]) -> str:
    return SECRET_PREFIX + "__".join(path)
