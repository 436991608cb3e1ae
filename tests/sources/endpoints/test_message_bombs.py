"""Bodies of messages that would take many times their size in memory are refused before that."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.cloudevents import EventBatchCodec
from ingestd.sources.http.endpoints.posthog import PosthogCodec
from ingestd.sources.http.endpoints.segment import SegmentBatchCodec, SegmentMessageCodec
from tests.peak import peak

if TYPE_CHECKING:
    from ingestd.sources.http.endpoints.base import BodyCodec

MIB = 1024**2
LIMITS = BodyLimits(10_000, MIB // 4)
KEYS = b",".join([b'"k%d":1' % number for number in range(20_000)])
BOMBS: dict[str, tuple[BodyCodec, bytes]] = {
    "a batch of nothing": (SegmentBatchCodec(), b'{"batch":[' + b"{}," * MIB + b"{}]}"),
    "an array of nothing": (PosthogCodec(""), b"[" + b"1," * MIB + b"1]"),
    "a large event": (PosthogCodec(""), b'{"event":"a","properties":[' + b"1," * MIB + b"1]}"),
    "a large form": (PosthogCodec(""), b"data=" + b"%7B" * MIB),
    "a large id": (EventBatchCodec(), b'[{"id":[' + b"[]," * MIB + b"1]}]"),
    "a large message": (SegmentMessageCodec("track"), b"{" + KEYS * 20 + b"}"),
    "a context for many": (
        SegmentBatchCodec(),
        b'{"context":{' + KEYS + b'},"batch":[' + b"{}," * 9_000 + b"{}]}",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_early(name: str) -> None:
    codec, body = BOMBS[name]
    with peak() as most, pytest.raises(Problem) as found:
        codec.decode(body, LIMITS)
    assert found.value.kind.status in {400, 413}
    assert most.bytes < 48 * MIB, f"{most.bytes / MIB:.0f} MiB"


@pytest.mark.parametrize("form", [b"%b", b'{"batch":[%b]}', b"[%b]"])
@pytest.mark.parametrize("codec", [SegmentBatchCodec(), SegmentMessageCodec("track"),
                                   PosthogCodec(""), EventBatchCodec()])  # fmt: skip
def test_no_depth_is_a_failure(codec: BodyCodec, form: bytes) -> None:
    """Where the interpreter's stack ends depends on who calls."""
    for depth in range(850, 1000):
        values = b"[" * depth + b"]" * depth
        body = form % (b'{"event":"a","messageId":%b,"uuid":%b,"properties":%b}' % ((values,) * 3))
        with contextlib.suppress(Problem):
            (part,) = codec.decode(body, LIMITS)
            assert part.parsed.records.count == 0
