"""The package keeps its structure: each gate is counted from the source text.

`BOUNDS` only ever goes down: at most 30 modules with one importer, 18 imports of
`pipeline.py`, 15 of `daemon.py`, 10 of the HTTP handler, and no private name of another package.
"""

from __future__ import annotations

import pytest

from tests.structure import gates

BOUNDS = {
    "modules with one importer": 30,
    "imports of pipeline.py": 18,
    "lines of pipeline.py": 480,
    "imports of daemon.py": 15,
    "imports of the HTTP handler": 10,
    "private names of other packages": 0,
}


@pytest.fixture(scope="module")
def house() -> gates.House:
    return gates.read()


def test_no_import_circles(house: gates.House) -> None:
    assert gates.circles(house) == []


def test_no_class_name_twice(house: gates.House) -> None:
    assert gates.repeated_classes(house) == {}


@pytest.mark.parametrize("gate", BOUNDS)
def test_a_gate_holds(house: gates.House, gate: str) -> None:
    assert gates.counts(house)[gate] <= BOUNDS[gate]


def test_a_circle_and_a_repeated_class_are_found(tmp_path) -> None:
    folder = tmp_path / "ingestd"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("import os\nfrom ingestd import b\nclass One: x = os._exit\n")
    (folder / "b.py").write_text(
        "import json\nfrom ingestd import a\nfrom xml import sax\n"
        "class One: x = json._hidden, sax._more\n"
        "y = One()._kept  # noqa: SLF001\n"
    )
    house = gates.read(tmp_path)
    assert gates.circles(house) == [["ingestd.a", "ingestd.b"]]
    assert gates.repeated_classes(house) == {"One": ["ingestd.a", "ingestd.b"]}
    assert gates.private_uses(house) == [
        "ingestd.b:4 json._hidden",
        "ingestd.b:4 sax._more",
        "ingestd.b:5 SLF001",
    ]
    assert gates.single_importers(house) == ["ingestd.a", "ingestd.b"]
