"""Makes the decoder of a handler from its annotation, such as `list[Click]`.

By format of the pipeline, with `T` from `list[T]`, `Sequence[T]` or `Batch[T]`:

* `json`: nothing or `Any` for plain objects, `bytes` for each record as it came, otherwise
  whatever msgspec can decode and check, or pydantic for its own types.
* `text`: nothing, `Any` or `str` for strict UTF-8; `bytes` as it came.
* `bytes`: nothing, `Any` or `bytes`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import msgspec
import msgspec.inspect

from ingestd.base.record import Layout, Records
from ingestd.handlers.outcome import Rejection
from ingestd.handlers.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ERROR_CHARS_MAX = 300
_ANYTHING = (Any, object)
# msgspec quotes the offending value in these two messages and in no others.
_QUOTES_VALUE = re.compile(r"Invalid (?:enum )?value ")
_PATH = re.compile(r" - at (?:`key` in )?`\$[\w.\[\]]*`$")


class CannotDecode(Exception):  # noqa: N818  the message is the whole of it
    """The annotation and the pipeline's format do not go together."""


class Decoder(NamedTuple):
    """Decodes a run of records.

    Attributes:
        one: one record to one value; raises on what does not fit. `None`: the bytes themselves.
        many: all records of a `LINES` payload at once, where there is a faster way.
        record: the `T`; `Any` where every record of the format fits.
    """

    one: Callable[[bytes], Any] | None
    many: Callable[[bytes], list[Any]] | None = None
    record: Any = Any

    def decode(self, records: Records) -> tuple[list[Any], list[Rejection]]:
        """Every record is either in the list, in order, or has a rejection with its place.

        Raises:
            ValueError: the run does not hold as many records as it says.
            MemoryError: as it says; not the record's fault.
        """
        if self.many is not None and records.layout is Layout.LINES:
            try:
                values = self.many(records.payload)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001  which record it is, is found out below
                values = []
            # A line that is no JSON value could pass as none or as two; the source checked.
            if len(values) == records.count:
                return values, []
        items = records.items()
        if len(items) != records.count:
            raise ValueError(f"a run said to hold {records.count} records holds {len(items)}")
        return (items, []) if self.one is None else _each(self.one, items)


def _each(one: Callable[[bytes], Any], items: list[bytes]) -> tuple[list[Any], list[Rejection]]:
    values: list[Any] = []
    rejections: list[Rejection] = []
    for index, item in enumerate(items):
        try:
            values.append(one(item))
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001  a validator of the user's may raise anything
            rejections.append(Rejection(index, "undecodable", _problem(exc)))
    return values, rejections


def _problem(exc: Exception) -> str:
    """One line that says what does not fit and where, without the value that does not."""
    if isinstance(exc, UnicodeDecodeError):
        return "not valid UTF-8"
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    if isinstance(exc, msgspec.DecodeError):
        message = str(exc)
        if quotes := _QUOTES_VALUE.match(message):
            path = _PATH.search(message)
            message = quotes.group().rstrip() + (path.group() if path else "")
        return one_line(message, _ERROR_CHARS_MAX)
    if hasattr(exc, "errors") and type(exc).__module__.startswith("pydantic"):
        first, *more = exc.errors(include_url=False, include_context=False, include_input=False)
        where = ".".join(map(str, first["loc"]))
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return one_line(message, _ERROR_CHARS_MAX) + (f" (and {len(more)} more)" if more else "")
    return f"{type(exc).__name__} while it was decoded"


def decoder_for(record: Any, record_format: str) -> Decoder:
    """The decoder of a `T`.

    Args:
        record: `T` itself, resolved; `Any` where nothing was annotated.
        record_format: `json`, `text` or `bytes`.

    Raises:
        CannotDecode: one line that says why not, and what would do.
    """
    if record is bytes:
        return Decoder(None)
    if record_format == "bytes":
        if record in _ANYTHING:
            return Decoder(None)
        raise CannotDecode(f"records of format bytes are list[bytes], not {_name(record)}")
    if record_format == "text":
        if record is str or record in _ANYTHING:
            return Decoder(_text, _text_lines, str)
        raise CannotDecode(
            f"records of format text are list[str] or list[bytes], not {_name(record)};"
            ' for JSON set format = "json"'
        )
    return _json_decoder(Any if record in _ANYTHING else record)


def _text(item: bytes) -> str:
    return item.decode("utf-8")


def _text_lines(payload: bytes) -> list[str]:
    lines = payload.decode("utf-8").split("\n")
    lines.pop()
    return lines


def _json_decoder(record: Any) -> Decoder:
    if _mentions_pydantic(record):
        return _pydantic_decoder(record)
    try:
        customs = [node.cls for node in _nodes(msgspec.inspect.type_info(record), set())]
        if any(map(_is_pydantic, customs)):
            return _pydantic_decoder(record)
        unknown = [cls for cls in customs if cls is not object]
        if not unknown:
            decoder = msgspec.json.Decoder(record)
            return Decoder(decoder.decode, decoder.decode_lines, record)
    except Exception as exc:
        raise CannotDecode(f"can't decode JSON into {_name(record)}: {exc}") from exc
    raise CannotDecode(
        f"can't decode JSON into {_name(unknown[0])}: make it a msgspec.Struct, a dataclass,"
        " a TypedDict or a pydantic model"
    )


def _pydantic_decoder(record: Any) -> Decoder:
    # Only here: a module that annotates with a pydantic type has imported pydantic.
    from pydantic import TypeAdapter  # noqa: PLC0415

    try:
        adapter = TypeAdapter(record)
    except Exception as exc:
        raise CannotDecode(f"pydantic can't decode into {_name(record)}: {exc}") from exc
    return Decoder(adapter.validate_json, None, record)


def json_schema(record: Any, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON Schema of a `T`, and the schemas that it refers to, by name.

    Args:
        record: `T` itself, resolved.
        prefix: of the names, which are those of components of an OpenAPI document.

    Raises:
        Exception: whatever msgspec, pydantic or a type of the user's says instead.
    """
    place = f"#/components/schemas/{prefix}"
    if _needs_pydantic(record):
        from pydantic import TypeAdapter  # noqa: PLC0415  see `_pydantic_decoder`

        schema = TypeAdapter(record).json_schema(ref_template=f"{place}{{model}}")
        named = schema.pop("$defs", {})
    else:
        (schema,), named = msgspec.json.schema_components(
            (record,), ref_template=f"{place}{{name}}"
        )
    return schema, {f"{prefix}{name}": one for name, one in named.items()}


def _needs_pydantic(record: Any) -> bool:
    if _mentions_pydantic(record):
        return True
    return any(_is_pydantic(node.cls) for node in _nodes(msgspec.inspect.type_info(record), set()))


def _is_pydantic(kind: object) -> bool:
    return isinstance(kind, type) and hasattr(kind, "__pydantic_validator__")


def _mentions_pydantic(record: object) -> bool:
    """Returns True if a type, or a part of it, is a model or a pydantic constraint."""
    if _is_pydantic(record) or type(record).__module__.partition(".")[0] == "pydantic":
        return True
    return any(map(_mentions_pydantic, get_args(record)))


def _nodes(node: object, seen: set[int]) -> Iterator[Any]:
    """Every class in msgspec's description of a type that it takes on trust or by its fields."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, (list, tuple)):
        for part in node:
            yield from _nodes(part, seen)
    elif isinstance(node, (msgspec.inspect.Type, msgspec.inspect.Field)):
        if isinstance(node, msgspec.inspect.CustomType) or _is_pydantic(getattr(node, "cls", None)):
            yield node
        for field in node.__struct_fields__:
            if field not in {"cls", "default", "default_factory"}:
                yield from _nodes(getattr(node, field), seen)


def _name(record: object) -> str:
    return record.__qualname__ if isinstance(record, type) and not get_args(record) else str(record)
