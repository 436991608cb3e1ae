from __future__ import annotations

import importlib
import pickle
import pkgutil

import ingestd
from ingestd.base.errors import DataDirError, IngestdError


def every(kind: type[IngestdError]) -> list[type[IngestdError]]:
    return [one for below in kind.__subclasses__() for one in (below, *every(below))]


def test_every_error_has_a_message_of_its_own() -> None:
    for module in pkgutil.walk_packages(ingestd.__path__, "ingestd."):
        if module.name != "ingestd.__main__":
            importlib.import_module(module.name)
    kinds = every(IngestdError)
    assert len(kinds) > 10
    assert not [kind for kind in kinds if kind.message == IngestdError.message]


def test_an_error_is_pickled_by_its_facts() -> None:
    error = DataDirError(path="x", problem="{odd}")
    assert str(error) == "data directory x: {odd}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
