"""Where modules are looked for, and how a worker gets to know."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from ingestd.base.path import put_behind_library
from ingestd.host.process import Surroundings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_worker_gets_absolute_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that is relative, of the site packages say, means something else elsewhere."""
    monkeypatch.chdir(tmp_path)
    sys.path[:] = ["", "lib", "/usr/lib"]
    surroundings = Surroundings.now()
    assert surroundings.path == [str(tmp_path), str(tmp_path / "lib"), "/usr/lib"]
    assert surroundings.folder == str(tmp_path)


def test_the_umask_stays_as_it_is(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert Surroundings.now().umask == 0o027
        (tmp_path / "file").touch()
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_what_a_module_adds_is_not_taken_away(tmp_path: Path) -> None:
    """Each thread that loads a handler puts its folder there, while the module is imported."""
    folder, threads = str(tmp_path), 8
    added: list[str] = []
    begin = threading.Barrier(threads)

    def load(number: int) -> None:
        begin.wait()
        for turn in range(20):
            put_behind_library(folder)
            if number == 0:
                sys.path.insert(0, f"/vendor/{turn}")
                added.append(f"/vendor/{turn}")

    began = [threading.Thread(target=load, args=(number,)) for number in range(threads)]
    for thread in began:
        thread.start()
    for thread in began:
        thread.join()
    assert set(added) <= set(sys.path)
    assert sys.path.count(folder) == 1
    assert set(Surroundings.now().path) >= {place for place in sys.path if place.startswith("/")}


def test_a_folder_lies_between_the_library_and_what_is_installed(tmp_path: Path) -> None:
    put_behind_library(str(tmp_path))
    place = sys.path.index(str(tmp_path))
    library = [os.path.dirname(os.__file__)]  # noqa: PTH120
    assert all(place > sys.path.index(entry) for entry in library)
    assert all(place < n for n, entry in enumerate(sys.path) if entry.endswith("site-packages"))
