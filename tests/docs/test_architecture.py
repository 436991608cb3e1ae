"""The architecture page names what there is: each module, and no file or name that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
FILES = sorted((ROOT / "ingestd").rglob("*.py"))
SOURCE = "\n".join(file.read_text() for file in FILES)
CODE = sorted({code for line in PAGE.splitlines() for code in re.findall(r"`([^`]+)`", line)})
FREE = {"sinks", "prove"}
"""Folders whose files the map does not name one by one."""


def folders() -> dict[str, str]:
    """The map: each folder of the package with the text behind it."""
    lines = PAGE[PAGE.index("\ningestd/\n") : PAGE.index("`lint-imports`")].splitlines()[2:]
    found: dict[str, str] = {".": ""}
    path: list[str] = []
    for line in lines:
        text = line.strip()
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, rest = text.partition(" ")
        if name.endswith("/"):
            path = [*path[: depth - 1], name.rstrip("/")]
            found["/".join(path)] = rest
        elif name.endswith(".py"):
            found["."] += f" {name.removesuffix('.py')}"
        elif path:
            found["/".join(path)] += f" {text}"
    return found


def test_each_module_is_in_the_map() -> None:
    told = folders()
    missing = []
    for file in FILES:
        folder = file.relative_to(ROOT / "ingestd").parent.as_posix()
        if file.name != "__init__.py" and folder.split("/")[0] not in FREE:
            missing += [file] if not re.search(rf"\b{file.stem}\b", told[folder]) else []
    assert not missing


def test_no_module_of_the_map_is_gone() -> None:
    told = folders()
    stems = {file.stem for file in FILES} | {folder.split("/")[-1] for folder in told}
    named = {name for text in told.values() for name in re.findall(r"\b[a-z]+_[a-z_]+\b", text)}
    assert named <= stems


def test_each_file_is_there() -> None:
    names = [f"/{file.relative_to(ROOT).as_posix()}" for file in FILES]
    files = [code for code in CODE if code.endswith(".py")]
    assert len(files) > 20
    assert not [code for code in files if not any(name.endswith(f"/{code}") for name in names)]


def test_each_name_is_there() -> None:
    names = [code for code in CODE if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", code)]
    assert len(names) > 50
    known = set(re.findall(r"\w+", SOURCE)) | {file.stem for file in FILES} | {"py"}
    gone = [
        code
        for code in names
        if not code.startswith("ingestd_")  # a metric, whose name is put together
        and not set(code.partition("(")[0].split(".")) <= known
    ]
    assert not gone
