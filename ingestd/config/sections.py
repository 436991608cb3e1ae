"""Sections of the settings: their base class, marks on their fields, and types that several use.

A start pays for what is written. A section's validators, which take ten times as long to build as
the section itself, are built with the first value that is to be checked, so a section that lies in
another one is an `Own` field: its own model checks what is written in it, and one that nothing is
written in is its defaults, unchecked as all defaults are. Tables of components that may not be in
use are `LateTables`: a component is imported when its table is written, or when all tables are
listed, as `--help` and `check` do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, create_model
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import (
    CoreSchema,
    no_info_after_validator_function,
    no_info_plain_validator_function,
    plain_serializer_function_ser_schema,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from pydantic import GetCoreSchemaHandler, SerializationInfo

MASK = "***"
"""What is shown instead of a secret."""

OWN_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}", re.ASCII)


class Section(BaseModel):
    """A table of settings: frozen, and nothing unknown gets in.

    Attributes:
        EXAMPLE: of a section that the user names: a name, and the path of a setting in it.
        FAULT: why the component of this table cannot be used, so that its settings are not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    EXAMPLE: ClassVar[tuple[str, tuple[str, ...]]] = ("", ())
    FAULT: ClassVar[str] = ""

    def path_options(self) -> Collection[tuple[str, ...]]:
        """The keys of paths in this section's table of options, each from the table on."""
        return ()


S = TypeVar("S", bound=Section)
T = TypeVar("T", bound=BaseModel)


class _ByItself:
    """Marks a field, or the values of a table of names, that a model of their own checks."""

    def __get_pydantic_core_schema__(
        self,
        source: type[BaseModel],
        handler: GetCoreSchemaHandler,
    ) -> CoreSchema:
        return _checked_by(source.model_validate)


def _checked_by(check: Callable[[Any], BaseModel]) -> CoreSchema:
    return no_info_plain_validator_function(
        check, serialization=plain_serializer_function_ser_schema(_dumped, info_arg=True)
    )


def _dumped(value: BaseModel, info: SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode, exclude_unset=info.exclude_unset)


Own = Annotated[T, _ByItself()]
"""A section in another one, see the module."""


def defaults_of(section: type[T]) -> T:
    """Returns the default of an `Own` field, as a class body wants it; made when it is used."""
    field: Any = Field(default_factory=section.model_construct)
    made: T = field
    return made


class LateTables:
    """Marks a dictionary of tables of components by name: those that are not as by default.

    Args:
        names: gives the names of all components that have a table.
        model: gives the model of one of these tables; may import its component.
    """

    def __init__(
        self, names: Callable[[], Sequence[str]], model: Callable[[str], type[Section]]
    ) -> None:
        self.names = names
        self.model = model

    def __get_pydantic_core_schema__(
        self,
        source: object,
        handler: GetCoreSchemaHandler,
    ) -> CoreSchema:
        return no_info_plain_validator_function(
            self._check, serialization=plain_serializer_function_ser_schema(_all_dumped)
        )

    def _check(self, value: object) -> dict[str, Section]:
        if not isinstance(value, dict):
            raise PydanticCustomError("dict_type", "should be a table")
        names = self.names()
        # A model of exactly these tables gives errors their places.
        models = {name: self.model(name) for name in value if name in names}
        checked = with_tables(Section, models).model_validate(value)
        tables = {name: getattr(checked, name) for name in value}
        return {
            name: one
            for name, one in tables.items()
            # An empty table is kept: it does nothing, and `check` says so.
            if value[name] == {} or one != models[name].model_construct()
        }

    def filled(self, tables: Mapping[str, Section]) -> Iterator[tuple[str, Section]]:
        """Name and table of all components, with the defaults where nothing is written."""
        for name in self.names():
            yield name, tables[name] if name in tables else self.model(name).model_construct()


def _all_dumped(tables: Mapping[str, Section]) -> dict[str, Any]:
    return {name: table.model_dump() for name, table in tables.items()}


class LateModels(NamedTuple):
    """Marks a dictionary of tables with names of the user's, whose key `kind` says their model.

    Attributes:
        models: gives all of them.
    """

    models: Callable[[], Sequence[type[Section]]]


def table_fault(name: str, table: object, above: type[BaseModel]) -> str:
    """Explains why a component cannot have its table in another one; empty if it can.

    Args:
        name: of the component, and of its table.
        table: the model of its settings.
        above: the model of the table that it lies in.
    """
    if not (isinstance(table, type) and issubclass(table, Section)):
        return f"its settings are {table!r}, which is no Section"
    if not OWN_NAME.fullmatch(name) or name in above.model_fields:
        return f"{name!r} cannot be the name of a table here"
    return ""


def with_tables(model: type[S], tables: Mapping[str, type[Section]]) -> type[S]:
    """Returns a section with tables in it: those of components, by their names."""
    if not tables:
        return model
    make: Any = create_model
    fields = {
        name: (Annotated[table, _ByItself()], defaults_of(table)) for name, table in tables.items()
    }
    made: type[S] = make(model.__name__, __base__=model, **fields)
    made.__doc__ = model.__doc__
    return made


def unusable(base: type[S], fault: str) -> type[S]:
    """Returns the table of a component that cannot be used; see `Section.FAULT`."""
    return type(base.__name__, (base,), {"FAULT": fault, "__module__": base.__module__})


class ValidationProblems(ValueError):  # noqa: N818  several errors in one
    """Settings that are right in their parts and cannot work together.

    Attributes:
        problems: (dotted key, what is wrong with it), at least one.
    """

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {problem}" for key, problem in problems))


class Reloadable:
    """Marks a field that a reload (SIGHUP) changes; without it a change needs a restart."""


class Shown(NamedTuple):
    """Marks a field that is shown in a way of its own, for example without what is secret in it.

    Attributes:
        show: gives what may be shown of a value.
    """

    show: Callable[[Any], object]


class OtherName(NamedTuple):
    """Marks a field by a name that it had, or is looked for under: an error suggests the field.

    Attributes:
        name: the last part of the other key.
    """

    name: str


def masked(value: object) -> object:
    """`***` for a value, and nothing for nothing."""
    return MASK if value else value


class Choice:
    """Marks text that is one of some names, which need not be known before it is checked.

    Args:
        names: gives them.
    """

    def __init__(self, names: Callable[[], Sequence[str]]) -> None:
        self.names = names

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        *others, last = map(repr, self.names())
        if repr(value) not in {*others, last}:
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticCustomError(
                "literal_error", "should be {expected}", {"expected": expected}
            )
        return value


def own_name(value: str, what: str = "it") -> str:
    """A name that the user chose for a table, as it is.

    Args:
        value: the name.
        what: whose it is, for the message.

    Raises:
        ValueError: it is none; the message says why.
    """
    if not OWN_NAME.fullmatch(value):
        raise ValueError(
            f"{what}'s name starts with a-z, goes on with a-z 0-9 _ - and has at most 63"
        )
    return value


def _no_mask(value: SecretStr) -> SecretStr:
    # Somebody may feed what `check` printed back in, and anybody could guess this one.
    if value.get_secret_value() == MASK:
        raise ValueError(f"is {MASK}, which stands for a secret and is none")
    return value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("should be the path of a file")
    return value


Secret = Annotated[SecretStr, AfterValidator(_no_mask)]


class AFile:
    """Rides on a setting's type: its text is a path, which is made absolute at the start."""


FilePath = Annotated[str, AfterValidator(_path), AFile()]
