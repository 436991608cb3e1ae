"""JSON that is nested too deeply is refused at every door, and nothing behind one meets it."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import msgspec
import pytest

from ingestd.codecs.framing import Framer
from ingestd.codecs.json import DEPTH_MAX, holds_deeper, is_deeper
from ingestd.codecs.lines import parse_lines
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import DocumentCodec
from ingestd.sources.http.endpoints.base import BodyLimits
from tests.daemon.harness import daemon, written
from tests.sources.source_tools import MemoryIntake, ask, serving

DETAIL = f"nested deeper than json_depth_max = {DEPTH_MAX}"


def arrays(depth: int, inside: bytes = b"") -> bytes:
    return b"[" * depth + inside + b"]" * depth


def objects(depth: int) -> bytes:
    return b'{"":' * depth + b"1" + b"}" * depth


def depth_of(value: bytes) -> int:
    """The plain way."""
    depth = most = 0
    in_string = escaped = False
    for byte in value:
        if in_string:
            in_string = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord('"'):
            in_string = True
        elif byte in b"[{":
            depth += 1
            most = max(most, depth)
        elif byte in b"]}":
            depth -= 1
    return most


def anything(rng: random.Random, depth: int) -> object:
    """A value about that deep, with brackets, quotes and backslashes in its strings."""
    texts = ["x", "]}]}", "[{[{", '\\"[', "\\", "]", '"', "é{"]
    if depth <= 0 or rng.random() < 0.05:
        return rng.choice([1, None, *texts])
    side = [anything(rng, rng.randrange(min(depth, 3))) for _ in range(rng.randrange(3))]
    if rng.random() < 0.5:
        return [*side, anything(rng, depth - 1)]
    return {rng.choice(texts): anything(rng, depth - 1), "z": side}


@pytest.mark.parametrize("seed", range(20))
def test_it_is_what_the_plain_way_finds(seed):
    rng = random.Random(seed)
    for _ in range(40):
        bound = rng.choice([1, 2, 3, 8, 20, 128])
        separators = rng.choice([(",", ":"), (", ", ": "), (",  ", " :\t")])
        values = [
            json.dumps(
                anything(rng, rng.randrange(bound + 4)),
                separators=separators,
                ensure_ascii=rng.random() < 0.5,
            ).encode()
            for _ in range(rng.randrange(1, 60))
        ]
        deeper = [depth_of(value) > bound for value in values]
        assert [is_deeper(value, bound) for value in values] == deeper
        block = b"".join(value + b"\n" for value in values)
        assert holds_deeper(block, values, bound) == any(deeper)


@pytest.mark.parametrize("make", [arrays, objects])
@pytest.mark.parametrize(
    "around", [b"", b'{"a":1}\n' * 3000, b'{"long":"%b"}\n' % (b"x" * 9999) * 9]
)
@pytest.mark.parametrize("bound", [1, 16, DEPTH_MAX, 512])
def test_the_bound_is_exact(make, bound, around):
    block = around + make(bound) + b"\n" + around
    assert parse_lines(block, "json", 10**6, 0, bound).refused == []
    parsed = parse_lines(around + make(bound + 1) + b"\n" + around, "json", 10**6, 0, bound)
    assert [one.index for one in parsed.refused] == [around.count(b"\n")]
    assert parsed.refused[0].reason == "malformed"
    assert parsed.refused[0].detail == f"nested deeper than json_depth_max = {bound}"
    assert parsed.records.payload == around * 2


@pytest.mark.parametrize("depth", [DEPTH_MAX + 1, 500, 990, 1000, 5000, 100_000])
@pytest.mark.parametrize("make", [arrays, objects])
def test_however_deep_it_is(make, depth):
    """Beyond the decoder's own limit, and between ours and that."""
    bad = make(depth)
    bounds = BodyLimits(100, 10**7)
    parsed = parse_lines(b"1\n" + bad + b"\n2", "json", 10**7)
    assert parsed.records.items() == [b"1", b"2"]
    assert [one.detail for one in parsed.refused] == [DETAIL]
    for body in (b"[%b]" % bad, b" [ %b ] " % bad):
        with pytest.raises(Problem, match=DETAIL) as caught:
            DocumentCodec().decode(body, bounds)
        assert caught.value.kind.status in (400, 413)
    framer = Framer("json", 10**7)
    framer.feed(bad + b"\n1\n")
    assert is_deeper(bad, DEPTH_MAX)


def test_elements_of_an_array_are_records():
    """The array itself does not count; a deep element is refused, and the others are taken."""
    bounds = BodyLimits(100, 10**6)
    body = b"[1,%b,%b,{}]" % (arrays(DEPTH_MAX), arrays(DEPTH_MAX + 1))
    ((parsed, *_),) = DocumentCodec().decode(body, bounds)
    assert parsed.records.items() == [b"1", arrays(DEPTH_MAX), b"{}"]
    assert [(one.index, one.reason, one.detail) for one in parsed.refused] == [
        (2, "malformed", DETAIL)
    ]


def test_brackets_in_strings_do_not_count():
    text = json.dumps({"a": "[" * 1000, "b": ['\\"' + "{" * 1000]}).encode()
    assert parse_lines(text, "json", 10**6).refused == []
    hidden = b'["' + b"]" * 500 + b'",' + arrays(DEPTH_MAX) + b',"' + b"]" * 500 + b'"]'
    assert [one.detail for one in parse_lines(hidden, "json", 10**6).refused] == [DETAIL]


def test_only_json_is_looked_at():
    assert parse_lines(arrays(1000), "text", 10**6).refused == []


async def test_the_setting_is_the_pipelines():
    shallow = MemoryIntake(json_depth_max=2)
    deep = MemoryIntake(name="deep", json_depth_max=3)
    async with serving(shallow, deep) as source:
        assert (await ask(source, arrays(3))).slug == "malformed"
        assert (await ask(source, arrays(3), "/v1/records/deep")).status == 202
        assert (await ask(source, arrays(2))).status == 202


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_every_python_reads_what_passes(version, tmp_path):
    """The largest `json_depth_max`, as deep in the stack as a handler may be, in each version."""
    python = next(iter(Path.home().glob(f".pyenv/versions/{version}*/bin/python")), None)
    if python is None:
        pytest.skip(f"no Python {version} here")
    script = (
        "import json, sys\n"
        "def deep(n): return deep(n - 1) if n else json.loads('[' * 512 + ']' * 512)\n"
        "deep(200)\n"
    )
    assert subprocess.run([python, "-c", script], capture_output=True).returncode == 0


def test_msgspec_reads_what_passes():
    def deep(levels: int) -> object:
        return deep(levels - 1) if levels else msgspec.json.decode(arrays(512))

    assert deep(200)


def test_from_standard_input(tmp_path):
    """The other door."""
    file = tmp_path / "input"
    file.write_bytes(b"1\n" + arrays(DEPTH_MAX + 1) + b"\n" + arrays(DEPTH_MAX) + b"\n")
    with file.open("rb") as stdin, daemon("--source", "stdin", cwd=tmp_path, stdin=stdin) as one:
        assert one.wait() == 0
        report = one.event("drained")
    assert (report["processed"], report["invalid"]) == (2, 1)
    assert sorted(written(tmp_path)) == [b"1", arrays(DEPTH_MAX)]
