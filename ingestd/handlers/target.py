"""Resolves the name of a handler to its object.

A target is `module:name` (the name may be dotted), or the name of a sink or handler that
`ingestd/registry.py` finds. Whatever goes wrong becomes a `HandlerLoadError` of one line that says
what to do about it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ingestd.base.errors import ConfigError, HandlerLoadError
from ingestd.base.path import put_behind_library
from ingestd.handlers.text import describe, one_line
from ingestd.registry import HANDLERS, SINKS

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARY_FILES = {f"{name}.py" for name in sys.stdlib_module_names}
_INSTALLED = tuple(
    path + os.sep for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
)


def is_ours(target: str) -> bool:
    """Tells if a target is a sink that comes with ingestd; any other handler is the user's."""
    return target in SINKS.own or target in SINKS.own.values()


def own_sink(target: str) -> Any:
    """The class of a sink that comes with ingestd, imported; `None` for any other target.

    Its module imports nothing that an extra brings, so this works where the extra is missing.
    """
    if not is_ours(target):
        return None
    names = [name for name, place in SINKS.own.items() if target in {name, place}]
    return SINKS.load(names[0])


def find(target: str) -> object:
    """The object a target names; imports its module, with the current folder on the path.

    Raises:
        HandlerLoadError: it can't be had.
    """
    place = target if ":" in target else _registered(target)
    if place is None:
        refuse(target, _neither(target))
    module_name, _, attribute = place.partition(":")
    if not module_name or not attribute:
        refuse(target, "a handler is written module:name, as in store:store")
    return _attribute(target, _module(target, module_name), attribute)


@contextlib.contextmanager
def exits_raised() -> Iterator[None]:
    """Makes `os._exit` an error: a module that calls it would end a check as if all were well.

    A child that the module forks leaves by it.
    """
    leave, process = os._exit, os.getpid()

    def raise_exit(status: int) -> NoReturn:
        if os.getpid() != process:
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = raise_exit
    try:
        yield
    finally:
        os._exit = leave


def refuse(target: str, problem: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the one error of this room, in one line."""
    raise HandlerLoadError(target=target, problem=one_line(problem)) from cause


def _registered(target: str) -> str | None:
    try:
        return SINKS.place(target) or HANDLERS.place(target)
    except ConfigError as error:
        refuse(target, str(error))


def _neither(target: str) -> str:
    """Explains a target that has no colon and is not registered."""
    if target.endswith(".py") or "/" in target:
        stem = target.removesuffix(".py").strip("./").replace("/", ".")
        return f"is a file; write its module and a name in it: {stem}:NAME"
    if target and (_file(target).is_file() or Path(target).is_dir()):
        return f"is a module; write a name in it as well: {target}:NAME"
    known = [*SINKS.names(), *HANDLERS.names()]
    # From 0.7 on a misspelt sink is alike; below it a function's bare name is, like `store`.
    if near := difflib.get_close_matches(target, known, n=1, cutoff=0.7):
        return f"there is no handler of this name; did you mean {near[0]!r}?"
    return (
        f"is neither a function, which is written MODULE:NAME like app:store,"
        f" nor a sink ({', '.join(SINKS.names())})"
    )


def _module(target: str, name: str) -> object:
    if "/" in name or name.startswith("."):
        refuse(target, _no_module(name))
    here = Path.cwd()
    top = name.partition(".")[0]
    put_behind_library(str(here))
    if top in sys.stdlib_module_names and (own := _own_file(here, top)):
        refuse(target, f"{own} has the name of a module of Python's own, which hides it: rename it")
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
            where = where_raised(exc) + _hidden(here)
            refuse(target, f"module {name!r} imports {exc.name!r}, which is not there{where}", exc)
        refuse(target, _no_module(name), exc)
    except SyntaxError as exc:
        place = f" ({_short(exc.filename)}:{exc.lineno})" if exc.filename else ""
        refuse(target, f"{type(exc).__name__}: {exc.msg}{place}", exc)
    except BaseException as exc:  # noqa: BLE001  a module may do anything, sys.exit() too
        where = where_raised(exc)
        if isinstance(exc, ImportError | AttributeError):
            where += _hidden(here)
        refuse(target, f"importing {name!r} raised {describe(exc, 500)}{where}", exc)


def _own_file(here: Path, top: str) -> Path | None:
    """The user's file of a module, or its folder."""
    places = (here / f"{top}.py", here / top / "__init__.py")
    return next((place for place in places if place.is_file()), None)


def _hidden(here: Path) -> str:
    """The user's files that were probably meant, and that Python's own modules hide."""
    names = sorted({path.name for path in here.glob("*.py")} & _LIBRARY_FILES)
    return f"; Python's own modules hide {', '.join(names[:5])}: rename it" if names else ""


def _file(name: str) -> Path:
    """The file that a module of the current folder would have."""
    return Path(name.replace(".", "/") + ".py")


def _no_module(name: str) -> str:
    if "/" in name or name.startswith(".") or name.endswith(".py"):
        stem = name.removesuffix(".py").strip("./").replace("/", ".")
        return f"no module named {name!r}; modules are written without .py and slashes: {stem}:NAME"
    near = difflib.get_close_matches(name, [path.stem for path in Path().glob("*.py")], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no module named {name!r}: there is no {_file(name)} in {Path.cwd()}{hint}"


def _attribute(target: str, module: object, dotted: str) -> object:
    found = module
    owner = getattr(module, "__name__", "?")
    for name in dotted.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as exc:
            names = [known for known in dir(found) if not known.startswith("_")]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            refuse(target, f"{owner!r} has no {name!r}{hint}", exc)
        except Exception as exc:  # noqa: BLE001  a module's __getattr__ may do anything
            refuse(target, f"getting {name!r} of {owner!r} raised {describe(exc, 500)}", exc)
        owner = f"{owner}.{name}"
    return found


def where_raised(exc: BaseException) -> str:
    """` (file:line)` of the user's own code that an exception came out of, or nothing."""
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith("<")
        and Path(__file__).parent != Path(frame.filename).parent
    ]
    # The user's code, not the library it called; but a library's if there is nothing else.
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)] or frames
    return f" ({_short(own[-1].filename)}:{own[-1].lineno})" if own else ""


def _short(filename: str) -> str:
    """The path as seen from here, if it is below here."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
