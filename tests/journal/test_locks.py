"""A journal is one daemon's, under whichever name it is found, and nobody else's to read."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import DataDirError
from ingestd.host.data_dir import DataDir, FileLock
from ingestd.journal.sqlite import repair
from ingestd.journal.sqlite.offline import journals
from ingestd.journal.sqlite.store import Store
from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from pathlib import Path


def modes(folder: Path) -> dict[str, int]:
    return {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
    }


def start(cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A daemon that should not come up."""
    return subprocess.run(
        [sys.executable, "-m", "ingestd", "run", "--listen", "127.0.0.1:0", "--admin.listen", "",
         *flags],
        cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


PIPELINES = '[pipelines.clicks]\n[pipelines.clicks.handler]\ntarget = "jsonl"\n'


def refused(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 78, done.stderr
    assert "another ingestd (process" in done.stderr
    assert "uses it; stop that one, or choose another directory (--data-dir)" in done.stderr


@pytest.mark.slow
def test_a_data_directory_within_another_ones_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text(PIPELINES)
    with daemon(cwd=tmp_path) as running:
        inside = tmp_path / "ingestd-data" / "pipelines" / "clicks"
        assert running.post(b"1\n", "/v1/records/clicks")[0] == 202
        refused(start(tmp_path, "--data-dir", str(inside), "--config", "/dev/null"))
        around = f"{tmp_path}/ingestd-data/pipelines/../pipelines/clicks"
        refused(start(tmp_path, "--data-dir", around, "--config", "/dev/null"))


@pytest.mark.slow
def test_a_pipeline_folder_that_is_a_link_to_another_ones_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "ingestd.toml").write_text(PIPELINES)
    with daemon(cwd=one):
        pipelines = other / "ingestd-data" / "pipelines"
        pipelines.mkdir(parents=True)
        (pipelines / "clicks").symlink_to(one / "ingestd-data" / "pipelines" / "clicks")
        refused(start(other))


def test_a_journal_under_a_second_name_is_refused(tmp_path: Path) -> None:
    """A hard link, as a file that is mounted by itself would be."""
    with daemon(cwd=tmp_path) as running:
        other = tmp_path / "other"
        other.mkdir()
        os.link(tmp_path / "ingestd-data" / "journal.db", other / "journal.db")
        done = start(tmp_path, "--data-dir", str(other))
        refused(done)
        assert f"process {running.process.pid}" in done.stderr
        assert running.post(b"1\n")[0] == 202
        running.process.send_signal(signal.SIGKILL)
        running.wait()
    with daemon(cwd=tmp_path) as again:
        assert again.post(b"1\n")[0] == 202


def test_a_data_directory_that_is_a_file_is_refused_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataDirError, match="is, or lies below, a file and not a folder"):
            DataDir(path)


def test_a_data_directory_without_rights_says_whose_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Root, as whom tests may run, is refused nothing.
    monkeypatch.setattr("ingestd.host.data_dir.make_folder", refuse)
    with pytest.raises(DataDirError, match=f"user with the id {os.geteuid()}, who runs this"):
        DataDir(tmp_path / "data")


def test_two_pipelines_of_one_daemon_cannot_share_a_folder(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    folder = data.folder("a")
    (folder.parent / "b").symlink_to(folder)
    with pytest.raises(DataDirError, match="another ingestd"):
        data.folder("b")
    data.close()
    DataDir(folder).close()


def test_a_child_that_is_forked_holds_no_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "x", of=tmp_path)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        theirs.send(b"here")
        theirs.recv(1)
        os._exit(0)
    theirs.close()
    assert ours.recv(4) == b"here"
    lock.close()
    FileLock(tmp_path / "x", of=tmp_path).close()
    ours.close()
    os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_every_file_is_private_in_a_folder_that_was_there(tmp_path: Path, umask: int) -> None:
    data = tmp_path / "ingestd-data"
    data.mkdir(mode=0o755)
    data.chmod(0o755)
    before = os.umask(umask)
    try:
        with daemon("--batch.age_max", "1ms", cwd=tmp_path) as running:
            assert running.post(b"{\n1\n2\n")[0] == 202
            running.event("data_directory_readable")
            while running.status()["pipelines"]["default"]["pending"]:
                pass
            found = modes(data)
            assert {"journal.db", "journal.db-wal", "journal.db-shm", "lock"} <= found.keys()
            assert any(name.endswith(".jsonl") for name in found)
            assert set(found.values()) == {0o600}
            folders = {
                p.name: stat.S_IMODE(p.stat().st_mode) for p in data.rglob("*") if p.is_dir()
            }
            assert set(folders.values()) == {0o700}
            running.process.kill()
            running.wait()
        for path in data.rglob("*"):
            if path.is_file():
                path.chmod(0o664)
        (tmp_path / "letters").symlink_to("/dev/full")
        victim = tmp_path / "victim"
        victim.write_text("keep")
        (tmp_path / "export.part").symlink_to(victim)
        with daemon("--batch.age_max", "1ms", cwd=tmp_path) as running:
            assert running.post(b"3\n")[0] == 202
            while running.status()["pipelines"]["default"]["pending"]:
                pass
            assert set(modes(data).values()) == {0o600}
            done = subprocess.run(
                [sys.executable, "-m", "ingestd", "dead", "export", "-o", "export"],
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=True,
            )  # fmt: skip
            assert done.returncode == 0
        assert victim.read_text() == "keep"
        assert stat.S_IMODE((tmp_path / "export").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_journal_that_is_a_link_lies_on_another_disk(tmp_path: Path) -> None:
    """Its write-ahead log lies beside what the link names; the commands find it, too."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "ingestd-data").mkdir()
    (tmp_path / "ingestd-data" / "journal.db").symlink_to(tmp_path / "disk" / "journal.db")
    with daemon("--batch.age_max", "1ms", cwd=tmp_path) as running:
        assert running.post(b"1\n{\n")[0] == 202
        running.until_settled()
        assert {"journal.db", "journal.db-wal"} <= modes(tmp_path / "disk").keys()
        running.process.kill()
        running.wait()
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "dead", "list", "--json"], capture_output=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=True,
    )  # fmt: skip
    assert b"malformed" in done.stdout


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "journal.db is no regular file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_a_journal_that_is_no_file_is_refused(tmp_path: Path, make: Any, said: str) -> None:
    (tmp_path / "ingestd-data").mkdir()
    make(tmp_path / "ingestd-data" / "journal.db")
    done = start(tmp_path)
    assert done.returncode == 78, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(DataDirError, match="symbolic links"):
        DataDir(tmp_path / "data")
    assert (tmp_path / "other").read_text() == "theirs"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_tools_say_that_a_data_directory_is_another_users(tmp_path: Path) -> None:
    DataDir(tmp_path / "data").close()
    os.seteuid(65534)
    try:
        with pytest.raises(DataDirError, match="Permission denied; only its daemon's user"):
            journals(tmp_path / "data")
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_root_makes_in_the_folder_of_another_user_is_that_users(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Store(folder / "journal.db").close()
    for path in (folder, folder / "journal.db"):
        os.chown(path, 65534, 65534)
    data = DataDir(folder)
    repair.repair(folder / "journal.db", 2e9)
    data.close()
    assert {path.name: path.stat().st_uid for path in folder.iterdir()} == {
        "lock": 65534, "journal.db": 65534, "journal.db.damaged-20330518T033320Z": 65534,
    }  # fmt: skip
