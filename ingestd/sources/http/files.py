"""Files with secrets, one a line."""

from __future__ import annotations

from pathlib import Path

from ingestd.base.read_file import read_file

BYTES_MAX = 1024**2


def read_lines(path: str, key: str, problems: list[str]) -> list[tuple[int, str]]:
    """Number and text of every line that is not blank, without white space around it.

    Args:
        path: of the file.
        key: the setting that names it.
        problems: gets a line if it can't be read, or if there is nothing in it.
    """
    try:
        text = read_file(Path(path), BYTES_MAX).decode()
    except OSError as error:
        problems.append(f"{key}: cannot read {path}: {error.strerror}")
        return []
    except UnicodeDecodeError:
        problems.append(f"{key}: {path} is not UTF-8 text")
        return []
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        problems.append(f"{key}: there is nothing in {path}")
    return lines
