"""Text of foreign objects: short, printable, valid UTF-8, and never an error.

An exception may be one whose `__str__` raises, one whose class lies about its name, one with a
message of a hundred megabytes or with half a surrogate pair in it. Text is bounded before it is put
together, as far as Python lets us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_CHARS_MAX = 1000
NAME_CHARS_MAX = 200
_UNREADABLE = "<its message can't be read: __str__ raised>"

# Straight from the interpreter: a class, or its metaclass, may say something else, or raise.
_MRO = type.__dict__["__mro__"].__get__
_VARS = type.__dict__["__dict__"].__get__
_QUALNAME = type.__dict__["__qualname__"].__get__
_MODULE = type.__dict__["__module__"].__get__
_ARGS = BaseException.__dict__["args"].__get__


def clip(text: str, limit: int) -> str:
    """A plain `str` of at most `limit` characters; whatever subclass the text is of."""
    if str.__len__(text) > limit:
        return str.__getitem__(text, slice(limit - 1)) + "…"
    return str.__getitem__(text, slice(limit))


def one_line(text: str, limit: int = LINE_CHARS_MAX) -> str:
    """The text in one printable line of at most `limit` characters."""
    line = " ".join(str.__getitem__(text, slice(4 * limit)).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def plain(value: object, limit: int = LINE_CHARS_MAX) -> str:
    """Any object's text in one line of at most `limit` characters; never raises."""
    try:
        return one_line(str(value), limit)
    except BaseException:  # noqa: BLE001  any code can be behind __str__
        return f"<a {name_of(type(value))} that can't be read: __str__ raised>"


def name_of(kind: type) -> str:
    """`module.Type`, or `Type` of what needs no module; never raises."""
    try:
        name, module = _QUALNAME(kind), _MODULE(kind)
        name = one_line(name, NAME_CHARS_MAX)
        if not issubclass(type(module), str) or module in {"builtins", "__main__"}:
            return name
        return f"{one_line(module, NAME_CHARS_MAX)}.{name}"
    except BaseException:  # noqa: BLE001  a module's name may be an object with code of its own
        return "<a class without a readable name>"


def definer_of(kind: type, name: str) -> type | None:
    """The class that defines an attribute of instances of `kind`, without asking any of them."""
    return next((base for base in _MRO(kind) if name in _VARS(base)), None)


def message_of(exc: BaseException, limit: int) -> str:
    """`str(exc)`, at most `limit` characters of it; never raises."""
    try:
        args = _ARGS(exc)
        if not _has_plain_message(type(exc)):
            return clip(str(exc), limit)
        if len(args) == 1:
            (only,) = args
            return clip(only if type(only) is str else str(only), limit)
        return clip("".join(_pieces(args, limit)), limit) if args else ""
    except BaseException:  # noqa: BLE001  any code can be behind __str__
        return _UNREADABLE


def describe(exc: BaseException, limit: int = LINE_CHARS_MAX) -> str:
    """`module.Type: message` in one line, as the last line of a traceback has it. Never raises."""
    name = name_of(type(exc))
    message = message_of(exc, 4 * limit)
    return one_line(f"{name}: {message}" if message else name, limit)


def _has_plain_message(kind: type) -> bool:
    """Returns True if `BaseException.__str__` alone makes the message, from its arguments."""
    return definer_of(kind, "__str__") is BaseException


def _pieces(value: Any, limit: int) -> Iterator[str]:
    """The `repr` of a value in pieces, and no more of them than `limit` characters need.

    A container, a string or bytes of a hundred megabytes is not put together first.
    """
    left = limit
    for piece in _parts(value, limit, 20):
        yield piece
        left -= len(piece)
        if left < 0:
            return


def _parts(value: Any, limit: int, depth: int) -> Iterator[str]:
    kind = type(value)
    if kind is str or kind is bytes:
        yield repr(value[: limit + 1])
    elif kind in _BRACKETS and depth and value:
        opening, closing = _BRACKETS[kind]
        yield opening
        for number, one in enumerate(value):
            if number:
                yield ", "
            yield from _parts(one, limit, depth - 1)
            if kind is dict:
                yield ": "
                yield from _parts(value[one], limit, depth - 1)
        yield ",)" if kind is tuple and len(value) == 1 else closing
    elif kind is bytearray:
        yield f"bytearray({bytes(value[: limit + 1])!r})"
    else:
        yield repr(value)


_BRACKETS: dict[type, tuple[str, str]] = {
    tuple: ("(", ")"),
    list: ("[", "]"),
    set: ("{", "}"),
    dict: ("{", "}"),
}
