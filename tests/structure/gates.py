"""Counts what keeps the package's structure simple, and prints it.

`python -m tests.structure.gates` prints one line a gate; `test_gates.py` holds each to its bound.
Only the source text is read, nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "ingestd"
PUBLIC = {
    "__future__": "the language's own",
    "_exit": "`os._exit` is in the library reference, with its underscore",
    "_run_exitfuncs": "`atexit` has no other way to run the hooks beside a thread that hangs",
}
"""Names with an underscore that may be used, and why."""
PRIVATE_OF_AN_OBJECT = "SLF001"
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One source file of the package."""

    name: str
    path: Path
    tree: ast.Module
    lines: int


class House(NamedTuple):
    """The whole package, parsed.

    Attributes:
        modules: by dotted name.
        imports: for each module the project modules that it imports, at any depth of its text.
        at_start: of these, those that are imported when the module is.
    """

    modules: dict[str, Module]
    imports: dict[str, set[str]]
    at_start: dict[str, set[str]]


@lru_cache(1)
def _parsed(text: str) -> ast.Module:
    """The syntax tree; CPython below 3.11.5 miscounts when another thread compiles beside it."""
    try:
        return ast.parse(text)
    except SystemError:  # https://github.com/python/cpython/issues/106905
        return ast.parse(text)


def read(root: Path = ROOT) -> House:
    """Parses the package below `root`."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, _parsed(text), len(text.splitlines()))
    imports = {
        name: _imported(module, modules, list(ast.walk(module.tree)))
        for name, module in modules.items()
    }
    at_start = {
        name: _imported(module, modules, _run_at_import(module.tree))
        for name, module in modules.items()
    }
    return House(modules, imports, at_start)


def _run_at_import(tree: ast.Module) -> list[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, no `TYPE_CHECKING`."""
    found: list[ast.AST] = []
    left: list[ast.AST] = list(tree.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            left.extend(node.orelse)
            continue
        found.append(node)
        left.extend(ast.iter_child_nodes(node))
    return found


def _imported(module: Module, modules: dict[str, Module], nodes: list[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules else node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name in modules and name != module.name}


def single_importers(house: House) -> list[str]:
    """The modules, packages aside, that exactly one other module imports."""
    counts = Counter(name for names in house.imports.values() for name in names)
    return [
        name
        for name, module in house.modules.items()
        if counts[name] == 1 and module.path.name != "__init__.py"
    ]


def repeated_classes(house: House) -> dict[str, list[str]]:
    """Class names that more than one module defines, with the modules."""
    places = defaultdict(list)
    for name, module in house.modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    return {name: found for name, found in places.items() if len(found) > 1}


def circles(house: House) -> list[list[str]]:
    """Groups of modules that import one another when they are imported (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in house.at_start[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in house.modules:
        if name not in index:
            visit(name)
    return found


def lines(house: House) -> int:
    """All lines of the package."""
    return sum(module.lines for module in house.modules.values())


def private_uses(house: House) -> list[str]:
    """Places that import or use a private name of another package, `module:line name`."""
    found = []
    for name, module in house.modules.items():
        foreign: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                foreign.update(
                    (a.asname or a.name).split(".")[0]
                    for a in node.names
                    if not a.name.startswith(PACKAGE)
                )
            elif (
                isinstance(node, ast.ImportFrom)
                and node.module
                and not node.module.startswith(PACKAGE)
            ):
                foreign.update(a.asname or a.name for a in node.names)
                parts = [*node.module.split("."), *(a.name for a in node.names)]
                found.extend(f"{name}:{node.lineno} {part}" for part in parts if _is_private(part))
        found += [
            f"{name}:{node.lineno} {node.value.id}.{node.attr}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and _is_private(node.attr)
            and isinstance(node.value, ast.Name)
            and node.value.id in foreign
        ]
        # What is no module's own is found by ruff, whose word for it stands where it is allowed.
        found += [
            f"{name}:{number} {PRIVATE_OF_AN_OBJECT}"
            for number, line in enumerate(module.path.read_text(encoding="utf-8").splitlines(), 1)
            if PRIVATE_OF_AN_OBJECT in line and not any(f"{one}(" in line for one in PUBLIC)
        ]
    return [place for place in found if place.split(" ")[1].split(".")[-1] not in PUBLIC]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def documented(house: House) -> list[tuple[str, str]]:
    """Each docstring of the package with its place."""
    found = []
    for name, module in house.modules.items():
        found += [
            (f"{name}:{getattr(node, 'name', 'module')}", text)
            for node in ast.walk(module.tree)
            if isinstance(node, Documented) and (text := ast.get_docstring(node))
        ]
    return found


def counts(house: House) -> dict[str, int]:
    """The number of each gate."""
    imports = house.imports
    return {
        "lines": lines(house),
        "modules with one importer": len(single_importers(house)),
        "class names used twice": len(repeated_classes(house)),
        "import circles": len(circles(house)),
        "imports of daemon.py": len(imports.get(f"{PACKAGE}.daemon", ())),
        "lines of pipeline.py": house.modules[f"{PACKAGE}.pipeline"].lines,
        "imports of pipeline.py": len(imports.get(f"{PACKAGE}.pipeline", ())),
        "imports of the HTTP handler": len(imports.get(f"{PACKAGE}.sources.http.handler", ())),
        "private names of other packages": len(private_uses(house)),
    }


if __name__ == "__main__":
    sys.stdout.writelines(f"{gate} {count}\n" for gate, count in counts(read()).items())
