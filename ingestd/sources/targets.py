"""Tables of settings that send records to pipelines by a name in them: index, sourcetype."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TABLE_MAX = 1000
"""Entries of a table."""
NAME_CHARACTERS_MAX = 255
"""Of a name that is looked for; a longer one has no entry."""

Targets = Annotated[dict[str, str], Field(max_length=TABLE_MAX)]
"""Name, in which `*` stands for any characters, to pipeline; the first entry that fits counts."""


class TargetTable:
    """Finds the pipeline of a name.

    Args:
        table: of the settings.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._exact = {name: to for name, to in table.items() if "*" not in name}
        self._patterns = [(_pattern(name), to) for name, to in table.items() if "*" in name]

    def __bool__(self) -> bool:
        return bool(self._exact or self._patterns)

    def find(self, name: str) -> str:
        """Returns the pipeline of a name, an exact entry first; empty if it has none."""
        if to := self._exact.get(name, ""):
            return to
        if len(name) > NAME_CHARACTERS_MAX:
            return ""
        return next((to for fits, to in self._patterns if fits.fullmatch(name)), "")


def _pattern(name: str) -> re.Pattern[str]:
    # An atomic group takes the first place that fits, which is enough: the time stays linear.
    first, *others = (re.escape(part) for part in name.split("*"))
    *middle, last = others
    return re.compile(first + "".join(f"(?>.*?{part})" for part in middle) + f".*{last}", re.DOTALL)


def table_problems(
    key: str, table: Mapping[str, str], formats: Mapping[str, str], form: str
) -> Iterable[tuple[str, str]]:
    """Finds entries that lead nowhere: (key, problem) for each.

    Args:
        key: of the table.
        table: of the settings.
        formats: of the records of each pipeline.
        form: of the endpoint's records.
    """
    for name, to in table.items():
        if to not in formats:
            yield f"{key}.{name}", f"there is no pipeline {to!r}"
        elif formats[to] != form:
            yield f"{key}.{name}", f"{to!r} has the format {formats[to]}, not {form}"
