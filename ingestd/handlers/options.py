"""Options of a handler class as one checked struct: types, conversion, help, and secrets.

A class whose `__init__` has a parameter annotated with a subclass of `Options` gets its options as
that: known, converted and checked before the class is made. `ingestd check` finds what is wrong,
`--help` and the page of a sink list the fields, and what is a `Secret` is never shown.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from functools import partial
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import unquote, urlsplit

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MASK = "***"
"""What is shown instead of a secret."""
_SECRET_CHARS_MIN = 3  # shorter ones are parts of ordinary words


class Size(int):
    """Bytes, at least 1; written like `"64MiB"`."""


class Seconds(float):
    """Seconds, not negative; written like `"250ms"`."""


class FilePath(str):
    """A path of a file or folder; made absolute at the start."""

    __slots__ = ()


class Secret(str):
    """Text that is shown nowhere."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(MASK)


class OptionError(ValueError):
    """An option is unknown, missing or wrong; the message names it."""


class OptionHelp(NamedTuple):
    """One option, for people.

    Attributes:
        name: of the option.
        kind: `text`, `size`, `none|gzip|zstd`, …
        default: as it is written; `None` if it has to be given.
        text: what it is.
    """

    name: str
    kind: str
    default: str | None
    text: str


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a handler class.

    Fields are `Annotated[T, msgspec.Meta(description=…)]` with `T` one of `str`, `int`, `float`,
    `bool`, a `Literal` of texts, a list or dict of these, `Size`, `Seconds`, `FilePath`, `Secret`.
    `__post_init__` may raise a ValueError that begins with the option's name.

    Attributes:
        LISTED_LAST: names of options that `help` lists behind the others, in their order.
    """

    LISTED_LAST: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def of(cls, **given: object) -> Self:
        """The options of given values, which may be text where a number is meant.

        Raises:
            OptionError: one is unknown, missing or wrong; in one line that names it.
        """
        types = _types_of(cls)
        for name in given:
            if name not in types:
                raise OptionError(unknown_option(name, types))
        for field in msgspec.structs.fields(cls):
            if field.required and field.name not in given:
                raise OptionError(
                    f"needs the option {field.name!r}: set handler.options.{field.name}"
                )
        values = {
            name: _converted(name, value, types[name], cls.read) for name, value in given.items()
        }
        try:
            return cls(**values)
        except ValueError as error:
            raise OptionError(str(error)) from None

    @classmethod
    def help(cls) -> list[OptionHelp]:
        """All options, in the order in which they are written; see `LISTED_LAST`."""
        found = []
        hints = get_type_hints(cls, include_extras=True)
        fields = msgspec.structs.fields(cls)
        for field in sorted(fields, key=lambda one: one.name in cls.LISTED_LAST):
            meta = _meta(hints[field.name])
            default = None if field.required else _shown(_default(field), cls.show)
            text = meta.description if meta else ""
            found.append(
                OptionHelp(field.name, _kind(_plain(hints[field.name])), default, text or "")
            )
        return found

    @classmethod
    def read(cls, kind: type, value: object) -> float:
        """A `Size` in bytes or `Seconds` from what was written.

        Raises:
            ValueError: it is none; may have the attribute `expected`, for people.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"it is no number for {kind.__name__}")  # noqa: TRY004
        return value

    @classmethod
    def show(cls, value: float) -> object:
        """A `Size` or `Seconds` as it is written."""
        return value

    @classmethod
    def named(cls, kind: type) -> list[str]:
        """The options of a kind, such as `Secret` or `FilePath`."""
        return [name for name, hint in _types_of(cls).items() if kind in _alternatives(hint)]

    def secrets(self) -> list[str]:
        """All texts that may be shown nowhere: each secret, and a password in it."""
        found: set[str] = set()
        for name in self.named(Secret):
            value = getattr(self, name)
            if isinstance(value, str):
                found.update(_parts_of(value))
        return sorted(
            (one for one in found if len(one) >= _SECRET_CHARS_MIN), key=len, reverse=True
        )


class Extra(NamedTuple):
    """An extra of the package that a handler class needs, as its class attribute `EXTRA`.

    Attributes:
        name: as in `pip install 'ingestd[NAME]'`.
        modules: that have to be there.
    """

    name: str
    modules: tuple[str, ...]


def options_of(kind: Any) -> type[Options] | None:
    """The struct that a class takes its options as; `None` if it has none, or is no class."""
    try:
        hints = get_type_hints(vars(kind)["__init__"]) if isinstance(kind, type) else {}
    except Exception:  # noqa: BLE001  names that only a type checker knows
        return None
    found = (one for one in hints.values() if isinstance(one, type) and issubclass(one, Options))
    return next(found, None)


def unknown_option(name: str, known: Mapping[str, object] | list[str]) -> str:
    """The message for an option that a handler does not have."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    has = f" (it has: {', '.join(known)})" if known and not near else ""
    return f"has no option {name!r}{hint}{has}"


def redactor(secrets: list[str]) -> Callable[[str], str]:
    """A function that replaces secrets in a text; `str` if there are none."""
    if not secrets:
        return str
    pattern = re.compile("|".join(map(re.escape, secrets)))
    return lambda text: pattern.sub(MASK, text)


# -- types -----------------------------------------------------------------------------------------


def _types_of(cls: type[Options]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in msgspec.structs.fields(cls)}


def _meta(hint: Any) -> msgspec.Meta | None:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, msgspec.Meta)), None)


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """`T` and, of `T | None`, both."""
    plain = _plain(hint)
    args = get_args(plain)
    return args if type(None) in args else (plain,)


_KINDS: dict[Any, str] = {
    str: "text", int: "number", float: "number", bool: "true or false", Size: "size",
    Seconds: "time", FilePath: "path", Secret: "secret",
}  # fmt: skip


def _kind(plain: Any) -> str:
    if get_origin(plain) is Literal:
        return " | ".join(get_args(plain))
    known = [_KINDS[one] for one in _alternatives(plain) if one in _KINDS]
    if known:
        return known[0]
    for one in _alternatives(plain):
        if get_origin(one) is Literal:
            return " | ".join(get_args(one))
    return "list" if any(get_origin(one) is list for one in _alternatives(plain)) else "table"


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return cast("Any", field.default_factory)()
    return field.default


def _shown(value: Any, show: Callable[[float], object]) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Size | Seconds):
        return str(show(value))
    if isinstance(value, list | dict):
        return json.dumps(value) if value else ""
    return str(value)


# -- values ----------------------------------------------------------------------------------------


def _converted(name: str, value: object, hint: Any, read: Callable[[type, object], float]) -> Any:
    kinds = _alternatives(hint)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        if isinstance(value, str) and not _takes_text(kinds):
            value = _from_json(value)
        return msgspec.convert(value, hint, strict=False, dec_hook=partial(_parsed, read))
    except (msgspec.ValidationError, ValueError) as error:
        shown = MASK if Secret in kinds else repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise OptionError(f"{name}: {shown} is not {_wanted(kinds, hint, error)}") from None


def _takes_text(kinds: tuple[Any, ...]) -> bool:
    """Tells if text is meant as it is; a list or a table is JSON on the command line."""
    return not any(get_origin(kind) in {list, dict, tuple} for kind in kinds)


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _wanted(kinds: tuple[Any, ...], hint: Any, error: Exception) -> str:
    for kind in kinds:
        if get_origin(kind) is Literal:
            *others, last = get_args(kind)
            return f"{', '.join(others)} or {last}" if others else last
    expected = getattr(error.__cause__, "expected", "")
    if expected:
        return str(expected)
    if kind_names := [_WANTED[kind] for kind in kinds if kind in _WANTED]:
        return f"{kind_names[0]}{_bounds(_meta(hint))}"
    return f"right: {error}"


_WANTED: dict[Any, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false",
    Size: "a size of at least 1 byte", Seconds: "a time", FilePath: "a path", Secret: "text",
}  # fmt: skip


def _bounds(meta: msgspec.Meta | None) -> str:
    if meta is None:
        return ""
    low = meta.min_length if meta.ge is None else meta.ge
    high = meta.max_length if meta.le is None else meta.le
    unit = "" if meta.ge is not None or meta.le is not None else " characters"
    ends = [
        f"at least {low}" if low is not None else "",
        f"at most {high}" if high is not None else "",
    ]
    told = " and ".join(end for end in ends if end)
    return f" of {told}{unit}" if told else ""


def _parsed(read: Callable[[type, object], float], kind: type, value: Any) -> Any:
    if kind is Size or kind is Seconds:
        number = read(kind, value)
        if number < (kind is Size):
            raise ValueError("it is too small")
        return Size(number) if kind is Size else Seconds(number)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("it is not text")
    return cast("Any", kind)(value)


def _parts_of(secret: str) -> Iterator[str]:
    """A secret, and the password of one that is a URL or a list of `key=value`."""
    yield secret
    try:
        password = urlsplit(secret).password
    except ValueError:
        password = None
    if password:
        yield password
        yield unquote(password)
    for match in re.finditer(
        r"(?:pass\w*|secret|token)\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", secret, re.IGNORECASE
    ):
        value = match[1]
        yield value
        if value.startswith("'"):
            yield re.sub(r"\\(.)", r"\1", value[1:-1])
