from __future__ import annotations

import fcntl
import gzip
import sys
import threading
from pathlib import Path

import pytest

from ingestd.sinks import files
from ingestd.sinks.files import Compressor, PackingPlan, plan_packing
from ingestd.sinks.jsonl import JsonlOptions, JsonlSink

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NINE = 1_767_258_000.0  # 2026-01-01T09:00:00Z
READ = {"gzip": (".gz", gzip.decompress), "zstd": (".zst", zstd.decompress)}


def names(path: Path) -> list[str]:
    return sorted(
        file.name for file in path.iterdir() if file.name not in {".compress.lock", ".batches"}
    )


class At(JsonlSink):
    seconds = NINE

    def now(self) -> float:
        return self.seconds


@pytest.fixture(params=["gzip", "zstd"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def compressor(tmp_path: Path, kind: str):
    """One whose own thread has ended: `work` is called by hand."""
    made = Compressor(tmp_path, kind, lambda: NINE)
    made.close()
    made._closed = False
    return made


def test_what_there_is_to_do_is_read_from_the_names() -> None:
    assert plan_packing(
        [
            "2026-01-01T09.jsonl",  # being written
            "2026-01-01T10.jsonl",  # someone's clock is ahead
            "2026-01-01T09.1.jsonl",  # full
            "2026-01-01T08.jsonl",  # over
            "2026-01-01T07.1.jsonl",  # packed, but not removed: a crash
            "2026-01-01T07.1.jsonl.gz",
            "2026-01-01T07.2.jsonl",  # packed by the other method
            "2026-01-01T07.2.jsonl.zst",
            ".2026-01-01T06.1.jsonl.gz.tmp",  # a crash in the middle
            ".compress.lock",
            ".other.tmp",
            "notes.jsonl",
            "2026-01-01T05.jsonl.bak",
            "clicks",
        ],
        "2026-01-01T09",
    ) == PackingPlan(
        remove=[".2026-01-01T06.1.jsonl.gz.tmp", "2026-01-01T07.1.jsonl", "2026-01-01T07.2.jsonl"],
        set_aside=["2026-01-01T08.jsonl"],
        pack=["2026-01-01T09.1.jsonl"],
    )


def test_full_and_past_files_are_packed_while_it_writes(tmp_path, batch, kind, until) -> None:
    suffix, unpack = READ[kind]
    sink = At(JsonlOptions.of(path=tmp_path, rotate_bytes=10, compress=kind))
    for item in (b"11111", b"22222", b"33333"):
        sink(batch([item]))
    sink.seconds += 3600
    sink(batch([b"44444"]))
    packed = [f"2026-01-01T09.{n}.jsonl{suffix}" for n in (1, 2, 3)]
    until(lambda: names(tmp_path) == [*packed, "2026-01-01T10.jsonl"])
    sink.close()
    contents = [unpack((tmp_path / name).read_bytes()) for name in packed]
    assert contents == [b"11111\n", b"22222\n", b"33333\n"]
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o600"}
    assert not [thread for thread in threading.enumerate() if "compressor" in thread.name]


def test_the_next_start_does_what_the_last_one_left(tmp_path, kind, until) -> None:
    suffix, unpack = READ[kind]
    left = {
        "2026-01-01T07.1.jsonl": b"packed\n",
        f"2026-01-01T07.1.jsonl{suffix}": b"whole, or it would not have this name",
        f".2026-01-01T07.2.jsonl{suffix}.tmp": b"half",
        "2026-01-01T07.2.jsonl": b"again\n",
        "2026-01-01T08.jsonl": b"over\nto",
        "2026-01-01T06.jsonl": b"",
        "notes.txt": b"not ours",
    }
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    sink = At(JsonlOptions.of(path=tmp_path, compress=kind))
    after = ["2026-01-01T07.1.jsonl", "2026-01-01T07.2.jsonl", "2026-01-01T08.1.jsonl"]
    until(lambda: names(tmp_path) == [*(name + suffix for name in after), "notes.txt"])
    sink.close()
    assert unpack((tmp_path / (after[1] + suffix)).read_bytes()) == b"again\n"
    assert unpack((tmp_path / (after[2] + suffix)).read_bytes()) == b"over\n"


@pytest.mark.parametrize("moment", ["rename", "sync_folder", "unlink"])
def test_a_crash_at_each_step_loses_nothing(
    tmp_path, compressor, kind, moment, monkeypatch
) -> None:
    """Stop at a step as a crash would, then work again."""
    suffix, unpack = READ[kind]
    (tmp_path / "2026-01-01T08.jsonl").write_bytes(b"1\n2\n")

    class Crash(BaseException): ...

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        real_unlink = Path.unlink
        if moment == "rename":
            files._retire(tmp_path / "2026-01-01T08.jsonl")
            patch.setattr(Path, "rename", crash)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # nor does a crash tidy up
        elif moment == "sync_folder":
            files._retire(tmp_path / "2026-01-01T08.jsonl")
            patch.setattr(files, "sync_folder", crash)
        else:
            patch.setattr(
                Path,
                "unlink",
                lambda self, **more: (
                    crash() if self.suffix == ".jsonl" else real_unlink(self, **more)
                ),
            )
        with pytest.raises(Crash):
            compressor.work()
    assert len(names(tmp_path)) == 2
    for _ in range(2):
        assert compressor.work()
        assert names(tmp_path) == [f"2026-01-01T08.1.jsonl{suffix}"]
    assert unpack((tmp_path / names(tmp_path)[0]).read_bytes()) == b"1\n2\n"


def test_only_one_works_in_a_folder(tmp_path, compressor) -> None:
    (tmp_path / "2026-01-01T08.jsonl").write_bytes(b"1\n")
    with (tmp_path / ".compress.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert compressor.work() is False
        assert names(tmp_path) == ["2026-01-01T08.jsonl"]
    assert compressor.work() is True
    assert len(names(tmp_path)) == 1


def test_closing_gives_up_in_the_middle(tmp_path, compressor, kind) -> None:
    (tmp_path / "2026-01-01T08.1.jsonl").write_bytes(b"1\n")
    compressor._closed = True
    compressor._pack(tmp_path / "2026-01-01T08.1.jsonl")
    assert names(tmp_path) == ["2026-01-01T08.1.jsonl"]


def test_a_straggler_still_gets_its_line_in(tmp_path, batch, kind, compressor) -> None:
    """A writer whose clock is behind writes to an hour that was packed already."""
    suffix, unpack = READ[kind]
    late = At(JsonlOptions.of(path=tmp_path))
    late.seconds = NINE - 1
    late(batch([b"1"]))
    assert compressor.work()
    late(batch([b"2"]))
    late.close()
    assert compressor.work()
    assert [unpack((tmp_path / name).read_bytes()) for name in names(tmp_path)] == [b"1\n", b"2\n"]
    assert names(tmp_path) == [f"2026-01-01T08.{n}.jsonl{suffix}" for n in (1, 2)]


def test_many_writers_and_packers_lose_no_line(tmp_path, batch, until) -> None:
    def write(name: int) -> None:
        sink = At(JsonlOptions.of(path=tmp_path, rotate_bytes=2000, compress="gzip"))
        for number in range(60):
            sink.seconds = NINE + 100 * number
            sink(batch([b"%d-%d-%d" % (name, number, place) for place in range(20)]))
        sink.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = []
    for file in tmp_path.glob("2*"):
        raw = file.read_bytes()
        lines += (gzip.decompress(raw) if file.suffix == ".gz" else raw).splitlines()
    assert len(lines) == len(set(lines)) == 4 * 60 * 20
