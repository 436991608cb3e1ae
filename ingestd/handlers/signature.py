"""Reading a callable: what kind it is, and which `T` its one parameter asks for."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections import abc
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

from ingestd.handlers.batch import Batch

_LISTS = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_FORMS = "annotate it list[T], Sequence[T] or Batch[T]"


class NotAHandler(Exception):  # noqa: N818  the message is the whole of it
    """The object can't be called as a handler; the message says why and what would do."""


class Shape(NamedTuple):
    """What a handler looks like from outside.

    Attributes:
        is_class: it is made once a worker, with options.
        is_async: calling it gives a coroutine.
        wants_batch: its parameter is a `Batch`, not a list.
        record: the `T`; `Any` where nothing is annotated.
    """

    is_class: bool
    is_async: bool
    wants_batch: bool
    record: Any


def shape_of(handler: object) -> Shape:
    """Look at a function, a class with `__call__`, or any other callable, without calling it.

    Raises:
        NotAHandler: it can't be one.
    """
    is_class = isinstance(handler, type)
    call = _method(handler) if isinstance(handler, type) else handler
    if not callable(call):
        raise NotAHandler(f"is not callable: it is {_a(type(handler).__name__)}")
    code = _code(call)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise NotAHandler("contains yield: a handler does its work and returns")
    wants_batch, record = _batch_of(_annotation(call))
    return Shape(is_class, inspect.iscoroutinefunction(code), wants_batch, record)


def _method(kind: type) -> object:
    """A class's `__call__`, bound to a stand-in: `kind.__call__` could be its metaclass's."""
    for base in kind.__mro__:
        if "__call__" in vars(base):
            method = vars(base)["__call__"]
            return (
                types.MethodType(method, object())
                if inspect.isfunction(method)
                else (kind.__call__)
            )
    raise NotAHandler(f"class {kind.__name__} has no __call__(self, batch)")


def _code(call: Any) -> Any:
    """What runs: below partials, and behind the `__call__` of an object."""
    while isinstance(call, functools.partial):
        call = call.func
    if inspect.isroutine(call):
        return call
    return getattr(type(call), "__call__", call)  # noqa: B004  its own function is wanted


def _annotation(call: Any) -> Any:
    """The resolved annotation of the parameter that a call with one argument fills."""
    try:
        signature = inspect.signature(call)
    except (ValueError, TypeError):  # written in C, without a signature: take it on trust
        return Any
    try:
        name = next(iter(signature.bind(None).arguments))
    except TypeError:
        raise NotAHandler(
            f"takes {signature}: a handler is called with one argument, the batch"
        ) from None
    except StopIteration:  # pragma: no cover  bind(None) fills something or raises
        return Any
    annotation = signature.parameters[name].annotation
    return Any if annotation is inspect.Parameter.empty else resolve(annotation, call)


def resolve(annotation: Any, owner: Any) -> Any:
    """An annotation with its strings looked up where `owner` was written.

    Raises:
        NotAHandler: a name in it is not there.
    """
    while isinstance(owner, functools.partial):
        owner = owner.func
    if not inspect.isroutine(owner):
        owner = getattr(type(owner), "__call__", owner)  # noqa: B004
    function = inspect.unwrap(getattr(owner, "__func__", owner))
    names = dict(getattr(function, "__globals__", {}))
    try:
        names |= inspect.getclosurevars(function).nonlocals
    except (TypeError, ValueError):  # not written in Python
        pass
    holder = types.SimpleNamespace(__annotations__={"batch": annotation})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["batch"]
    except NameError as exc:
        raise NotAHandler(
            f"annotation {annotation!r} can't be read: {exc}"
            " (is it imported under TYPE_CHECKING only?)"
        ) from exc
    except Exception as exc:
        raise NotAHandler(f"annotation {annotation!r} can't be read: {exc}") from exc


def _batch_of(annotation: Any) -> tuple[bool, Any]:
    """Whether it is a `Batch`, and the `T`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif hasattr(annotation, "__value__"):  # type Clicks = list[Click]
            annotation = annotation.__value__
        else:
            break
    if annotation is Any or annotation is object:
        return False, Any
    origin = get_origin(annotation) or annotation
    if origin is not Batch and origin not in _LISTS:
        name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        raise NotAHandler(f"its parameter is annotated {name}, but a handler gets many: {_FORMS}")
    record = next(iter(get_args(annotation)), Any)
    return origin is Batch, Any if isinstance(record, TypeVar) else record


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
