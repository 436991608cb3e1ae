from __future__ import annotations

import itertools
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.outcome import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module of the user's into the current folder; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)

    def write(source: str) -> str:
        name = f"theirs{next(_numbers)}"
        Path(f"{name}.py").write_text(textwrap.dedent(source))
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("theirs"):
            del sys.modules[name]


@pytest.fixture
def job() -> Callable[..., Job]:
    """A job with these records, in one chunk."""

    def job(items: Sequence[bytes], *, sized: bool = False, attempt: int = 1) -> Job:
        records = Records.sized(items) if sized else Records.lines(items)
        return Job("j1-7", attempt, records, [Span(3, 10, len(items))], "j1")

    return job
