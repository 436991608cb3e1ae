"""Decompression in pieces: padding, members and frames, cuts, and the windows that zstd needs."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import zlib

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from ingestd.codecs.compression import WINDOW_MAX, Corrupt, Inflater, WindowTooLarge, zstd_window

MIB = 1024**2
TEXT = b"".join(b"%d: some text that repeats\n" % n for n in range(300))
SKIPPED = struct.pack("<II", 0x184D2A53, 5) + b"notes"


def with_large_window(content: bytes) -> bytes:
    """As `zstd --long=27` makes it of a stream."""
    options = {zstd.CompressionParameter.window_log: 27}
    stream = zstd.ZstdCompressor(options=options)
    return stream.compress(content) + stream.flush()


LARGE = with_large_window(TEXT)

steps = st.sampled_from([1, 2, 3, 7, 100, 8191, 1_000_000])


def inflated(encoding: str, wire: bytes, step: int, **more: int) -> bytes:
    inflater = Inflater(encoding, 1 << 40, **more)
    pieces = [
        piece
        for at in range(0, len(wire), step)
        for piece in inflater.feed(wire[at : at + step])
    ]  # fmt: skip
    inflater.finish()
    return b"".join(pieces)


@given(steps, st.integers(0, 20_000), st.integers(0, 600))
def test_zero_bytes_behind_a_gzip_member_are_padding(step: int, behind: int, between: int) -> None:
    member = gzip.compress(TEXT)
    if step < 100:
        behind, between = behind % 600, between % 100
    wire = member + b"\0" * between + gzip.compress(b"") + member + b"\0" * behind
    assert inflated("gzip", wire, step) == TEXT * 2


@pytest.mark.skipif(shutil.which("gzip") is None, reason="needs gzip")
def test_gzip_itself_takes_the_padding() -> None:
    wire = gzip.compress(TEXT) + b"\0" * 5000
    done = subprocess.run(["gzip", "-dc"], input=wire, capture_output=True)
    assert (done.returncode, done.stdout) == (0, TEXT)


@pytest.mark.parametrize(
    ("encoding", "behind"),
    [
        ("gzip", b"x"),
        ("gzip", b"\0\0x"),
        ("gzip", b"\x1f"),
        ("gzip", b"\0\x1f\x8b"),
        ("zstd", b"x"),
        ("zstd", b"\0\0\0\0\0"),
        ("zstd", b"\x28"),
        ("zstd", b"\x28\xb5\x2f"),
        ("zstd", b"\x53\x2a"),
        ("deflate", b"x"),
        ("deflate", b"\0"),
        ("deflate", b"\0\0\0"),
    ],
)
@pytest.mark.parametrize("step", [1, 100_000])
def test_anything_else_behind_the_end_is_corrupt(encoding: str, behind: bytes, step: int) -> None:
    pack = {"gzip": gzip.compress, "zstd": zstd.compress, "deflate": zlib.compress}[encoding]
    assert inflated(encoding, pack(TEXT), step) == TEXT
    with pytest.raises(Corrupt):
        inflated(encoding, pack(TEXT) + behind, step)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@given(data=st.data(), step=steps)
def test_a_cut_anywhere_but_between_members_is_seen(
    encoding: str, data: st.DataObject, step: int
) -> None:
    pack = {"gzip": gzip.compress, "zstd": zstd.compress}[encoding]
    parts = [pack(b"a" * 1000), pack(b""), pack(b"b" * 1000)]
    wire = b"".join(parts)
    ends = {len(b"".join(parts[:n])) for n in (1, 2, 3)}
    cut = data.draw(st.integers(0, len(wire)))
    if cut in ends:
        inflated(encoding, wire[:cut], step)
    else:
        with pytest.raises(Corrupt, match="cut off"):
            inflated(encoding, wire[:cut], step)


@given(st.binary(max_size=70_000), steps)
def test_a_frame_of_any_size(content: bytes, step: int) -> None:
    wire = SKIPPED + zstd.compress(content) + SKIPPED
    if step < 100:
        wire = SKIPPED + zstd.compress(content[:300]) + SKIPPED
        content = content[:300]
    assert inflated("zstd", wire, step) == content


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
@pytest.mark.parametrize(
    ("arguments", "window"),
    [
        (["--long=27"], 128 * MIB),
        (["--ultra", "-22"], 128 * MIB),
        (["-19"], 8 * MIB),
        ([], 2 * MIB),
    ],
)
def test_the_window_of_a_file_that_zstd_made(arguments: list[str], window: int) -> None:
    made = subprocess.run(["zstd", "-c", *arguments], input=TEXT, capture_output=True, check=True)
    assert [zstd_window(made.stdout[:n]) for n in (0, 1, 4, 5, 6)] == [None] * 4 + [window]
    assert inflated("zstd", made.stdout, 1000, window_max=window) == TEXT
    if window > WINDOW_MAX:
        with pytest.raises(WindowTooLarge) as caught:
            inflated("zstd", made.stdout, 1000)
        assert caught.value.window == window
        assert str(caught.value) == "the zstd body needs a window of 128 MiB, more than 8 MiB"


@given(steps, st.booleans())
def test_it_goes_on_once_a_larger_window_is_allowed(step: int, first: bool) -> None:
    """Also where the frame that needs it is not the first one."""
    wire = (b"" if first else zstd.compress(TEXT)) + LARGE + zstd.compress(b"end")
    inflater = Inflater("zstd", 1 << 40)
    out, raised = b"", 0
    for at in range(0, len(wire), step):
        feed: bytes | None = wire[at : at + step]
        while feed is not None:
            try:
                for piece in inflater.feed(feed):
                    out += piece
            except WindowTooLarge as large:
                inflater.window_max, feed = large.window, b""
                raised += 1
            else:
                feed = None
    inflater.finish()
    assert raised == 1
    assert out == (b"" if first else TEXT) + TEXT + b"end"
