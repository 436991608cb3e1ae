"""What all sections of the settings have in common, and types that several of them use."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr

MASK = "***"
"""What is shown instead of a secret."""

OWN_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}", re.ASCII)


class Section(BaseModel):
    """Frozen, and nothing unknown gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
