"""Loads handlers: finds the callable, reads its signature, makes it with its decoder."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections import abc
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

from ingestd.handlers.batch import Batch
from ingestd.handlers.context import Context
from ingestd.handlers.decode import CannotDecode, Decoder, decoder_for
from ingestd.handlers.forked import ParentOnly
from ingestd.handlers.options import Extra, OptionError, Options, options_of, unknown_option
from ingestd.handlers.target import find, refuse, where_raised
from ingestd.handlers.text import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_LISTS = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_FORMS = "annotate it list[T], Sequence[T] or Batch[T]"


class NotAHandler(Exception):  # noqa: N818  the message is the whole of it
    """The object can't be called as a handler; the message says why and what would do."""


class HandlerSignature(NamedTuple):
    """Signature of a handler.

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


def shape_of(handler: object) -> HandlerSignature:
    """Look at a function, a class with `__call__`, or any other callable, without calling it.

    Raises:
        NotAHandler: it can't be one.
    """
    is_class = isinstance(handler, type)
    call = _method(handler) if isinstance(handler, type) else handler
    if not callable(call):
        raise NotAHandler(f"is not callable: it is {_a(type(handler).__name__)}")
    code = code_of(call)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise NotAHandler("contains yield: a handler does its work and returns")
    wants_batch, record = _batch_of(annotation_of(call))
    return HandlerSignature(is_class, inspect.iscoroutinefunction(code), wants_batch, record)


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


def code_of(call: Any) -> Any:
    """The function itself: below partials, and behind the `__call__` of an object."""
    while isinstance(call, functools.partial):
        call = call.func
    if inspect.isroutine(call):
        return call
    return getattr(type(call), "__call__", call)  # noqa: B004  its own function is wanted


def annotation_of(
    call: Any, wanted: str = "a handler is called with one argument, the batch"
) -> Any:
    """The resolved annotation of the parameter that a call with one argument fills.

    Args:
        call: a callable.
        wanted: what is said of one that takes none or needs more.

    Raises:
        NotAHandler: it is such a one, or its annotation can't be read.
    """
    try:
        signature = inspect.signature(call)
    except (ValueError, TypeError):  # written in C, without a signature: take it on trust
        return Any
    try:
        name = next(iter(signature.bind(None).arguments))
    except TypeError:
        raise NotAHandler(f"takes {signature}: {wanted}") from None
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
            " (an import under TYPE_CHECKING is not there at run time)"
        ) from exc
    except Exception as exc:
        raise NotAHandler(f"annotation {annotation!r} can't be read: {exc}") from exc


def _batch_of(annotation: Any) -> tuple[bool, Any]:
    """Tells if an annotation is a `Batch`, and its `T`."""
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
        raise NotAHandler(
            f"its parameter is annotated {name}, but a handler gets a batch of records: {_FORMS}"
        )
    record = next(iter(get_args(annotation)), Any)
    return origin is Batch, Any if isinstance(record, TypeVar) else record


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# -- handlers --------------------------------------------------------------------------------------

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class HandlerSpec(NamedTuple):
    """Facts about a handler before it is made.

    Attributes:
        target: as it was written in the settings.
        found: the function, class or other callable.
        record_format: the pipeline's format.
        is_class: it is made once a worker, with options.
        is_async: calls have to be awaited.
        wants_batch: it gets a `Batch`; otherwise a plain list.
        decoder: from the batch's bytes to what the annotation asks for.
    """

    target: str
    found: Callable[..., Any]
    record_format: str
    is_class: bool
    is_async: bool
    wants_batch: bool
    decoder: Decoder

    @property
    def full_name(self) -> str:
        """`module:name`, as far as the object says it."""
        module = getattr(self.found, "__module__", type(self.found).__module__)
        return f"{module}:{getattr(self.found, '__qualname__', type(self.found).__qualname__)}"

    def check_options(self, options: Mapping[str, object]) -> None:
        """Checks that the handler takes these options, without making it.

        Raises:
            HandlerLoadError: it does not; names the option.
        """
        self._arguments(options, Context())

    def secrets_of(self, options: Mapping[str, object]) -> list[str]:
        """The texts among the options that may be shown nowhere."""
        kind = options_of(self.found)
        return kind.of(**options).secrets() if kind is not None else []

    def create(
        self,
        options: Mapping[str, object],
        *,
        pipeline: str = "default",
        data_dir: str = "ingestd-data",
    ) -> Callable[[Any], Any]:
        """Makes the callable for batches: a function itself, or a new instance of a class.

        Raises:
            HandlerLoadError: the options do not fit, or the constructor raised; what it raised is
                the error's `__cause__`.
        """
        arguments = self._arguments(options, Context(pipeline, self.record_format, data_dir))
        if not self.is_class:
            return self.found
        try:
            with ParentOnly():
                instance: Callable[[Any], Any] = self.found(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001  it is the user's code
            given = f" [options: {', '.join(sorted(options))}]" if options else ""
            refuse(
                self.target,
                f"its constructor raised {describe(exc, 500)}{where_raised(exc)}{given}",
                exc,
            )
        return instance

    def _arguments(self, options: Mapping[str, object], context: Context) -> dict[str, object]:
        if not self.is_class:
            if options:
                names = ", ".join(sorted(options))
                refuse(self.target, f"is no class and takes no options, but got: {names}")
            return {}
        parameters = self._parameters()
        if parameters is None:  # written in C: it will say itself what it does not like
            return dict(options)
        filled = self._parameter_of(lambda kind: kind is Context)
        struct = self._parameter_of(_is_options)
        if filled in options:
            refuse(self.target, f"{filled!r} is filled in by ingestd and can't be an option")
        if struct is not None:
            try:
                arguments: dict[str, object] = {struct: self._resolved(struct).of(**options)}
            except OptionError as error:
                refuse(self.target, str(error))
        else:
            self._refuse_unknown(options, parameters, filled)
            arguments = dict(options)
        if filled is not None:
            arguments[filled] = context
        for parameter in parameters:
            needed = parameter.kind in _NAMED and parameter.default is inspect.Parameter.empty
            if needed and parameter.name not in arguments:
                refuse(
                    self.target,
                    f"needs the option {parameter.name!r}: set handler.options.{parameter.name}",
                )
        return arguments

    def _parameters(self) -> list[inspect.Parameter] | None:
        try:
            return list(inspect.signature(self.found).parameters.values())
        except (ValueError, TypeError):
            return None

    def _parameter_of(self, fits: Callable[[Any], bool]) -> str | None:
        """The parameter whose annotation fits, if the class has one."""
        for parameter in (self._parameters() or ()) if self.is_class else ():
            if parameter.annotation is inspect.Parameter.empty or parameter.kind not in _NAMED:
                continue
            try:
                if fits(resolve(parameter.annotation, getattr(self.found, "__init__", None))):
                    return parameter.name
            except NotAHandler:  # someone else's annotation; not ours to read
                continue
        return None

    def _resolved(self, name: str) -> Any:
        annotation = inspect.signature(self.found).parameters[name].annotation
        return resolve(annotation, getattr(self.found, "__init__", None))

    def _refuse_unknown(
        self,
        options: Mapping[str, object],
        parameters: list[inspect.Parameter],
        filled: str | None,
    ) -> None:
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return
        known = [p.name for p in parameters if p.kind in _NAMED and p.name != filled]
        for name in options:
            if name not in known:
                refuse(self.target, unknown_option(name, known))


def _is_options(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def load(target: str, *, record_format: str, executor: str) -> HandlerSpec:
    """Find a handler and check that it can be called with this pipeline's records.

    Args:
        target: `module:name`, or a registered name like `jsonl`.
        record_format: `json`, `text` or `bytes`.
        executor: `thread`, `process`, `async` or `external`; `auto` takes every handler.

    Raises:
        HandlerLoadError: one line that says what is wrong and what to do.
    """
    found = find(target)
    _check_extra(target, found)
    try:
        shape = shape_of(found)
        decoder = decoder_for(shape.record, record_format)
    except (NotAHandler, CannotDecode) as exc:
        refuse(target, str(exc), exc)
    check_executor(target, executor, is_async=shape.is_async)
    assert callable(found)  # noqa: S101  shape_of saw to it; this tells the type checker
    return HandlerSpec(
        target, found, record_format, shape.is_class, shape.is_async, shape.wants_batch, decoder
    )


def _check_extra(target: str, found: object) -> None:
    extra = getattr(found, "EXTRA", None)
    if not isinstance(extra, Extra):
        return
    missing = [name for name in extra.modules if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        refuse(target, f"needs {names}: pip install 'ingestd[{extra.name}]'")


def check_executor(target: str, executor: str, *, is_async: bool) -> None:
    """Refuses an executor that cannot run a handler.

    Raises:
        HandlerLoadError: it cannot; says what to set.
    """
    if executor == "auto":
        return
    if executor == "external" and is_async:
        refuse(target, "is async, which an executor of executor.factory can't run: make it def")
    if is_async and executor != "async":
        refuse(target, f'is async; set executor.kind = "auto" or "async" (it is "{executor}")')
    if executor == "async" and not is_async:
        refuse(
            target,
            'is not async; set executor.kind = "auto", "process" or "thread", or make it async def',
        )
