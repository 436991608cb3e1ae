"""Messages of Segment and RudderStack: what becomes of them, and what their libraries are told."""

from __future__ import annotations

import base64
import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints import messages
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.segment import (
    BATCH,
    TYPES,
    SegmentBatchCodec,
    SegmentMessageCodec,
)
from tests.sources.source_tools import ask
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.sources.http.endpoints.base import Decoded

LIMITS = BodyLimits(1000, 4096, 64)
KEY = "write-key-of-the-tests-0123456789"


def read(body: Any, limits: BodyLimits = LIMITS, kind: str = "") -> Decoded:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    codec = SegmentMessageCodec(kind) if kind else SegmentBatchCodec()
    (part,) = codec.decode(raw, limits)
    assert part.ids is None or len(part.ids.each) == part.parsed.records.count
    return part


def records(part: Decoded) -> list[Any]:
    return [json.loads(item) for item in part.parsed.records.items()]


def refusal(body: Any, limits: BodyLimits = LIMITS, kind: str = "") -> Problem:
    with pytest.raises(Problem) as found:
        read(body, limits, kind)
    return found.value


def test_half_a_character_costs_no_message() -> None:
    """JavaScript writes `\\ud83d` where a text was cut in the middle of an emoji."""
    cut = {"type": "track", "messageId": "m-1", "event": "\ud83d and \\ud83d"}
    whole = {"type": "track", "messageId": "m-2", "event": "\U0001f600"}
    part = read({"batch": [cut, whole]})
    assert [one["event"] for one in records(part)] == ["\ufffd and \\ud83d", "\U0001f600"]


def test_a_batch_is_a_record_a_message() -> None:
    first = {"type": "track", "messageId": "m-1", "event": "Bought", "context": {"ip": "10.0.0.1"}}
    second = {"type": "identify", "messageId": "m-2", "traits": {"n": [1, {}]}}
    part = read({"batch": [first, second], "sentAt": "2026-01-01T00:00:00Z", "writeKey": KEY})
    sent = {"sentAt": "2026-01-01T00:00:00Z"}
    assert records(part) == [first | sent, second | sent]
    assert part.token == KEY
    assert KEY.encode() not in part.parsed.records.payload


def test_what_a_batch_says_for_all_is_in_each() -> None:
    part = read(
        {
            "batch": [
                {"messageId": "1"},
                {"messageId": "2", "context": {"ip": "::1"}, "sentAt": "own"},
                {
                    "messageId": "3",
                    "context": "none",
                    "writeKey": "another-key-0123456789",
                },
                {},
            ],
            "context": {"ip": "10.0.0.1", "app": {"name": "shop"}},
            "integrations": {"All": True},
            "sentAt": "now",
        }
    )
    common = {"context": {"ip": "10.0.0.1", "app": {"name": "shop"}}, "integrations": {"All": True}}
    assert records(part) == [
        {"messageId": "1", **common, "sentAt": "now"},
        {
            "messageId": "2",
            "context": {"ip": "::1", "app": {"name": "shop"}},
            "sentAt": "own",
            "integrations": {"All": True},
        },
        {"messageId": "3", "context": "none", "integrations": {"All": True}, "sentAt": "now"},
        {**common, "sentAt": "now"},
    ]
    assert part.token == "another-key-0123456789"


@pytest.mark.parametrize("kind", TYPES)
def test_a_message_alone_has_the_type_of_its_path(kind: str) -> None:
    part = read({"messageId": "1", "userId": "u", "writeKey": KEY}, kind=kind)
    assert records(part) == [{"messageId": "1", "userId": "u", "type": kind}]
    assert part.token == KEY
    assert records(read({"type": "own", "event": "e"}, kind=kind)) == [
        {"type": "own", "event": "e"}
    ]


def test_an_id_that_comes_twice_is_one_record() -> None:
    ids = ["a", "b", "a", "", None, "", 7, 7]
    part = read({"batch": [{"messageId": one, "n": n} for n, one in enumerate(ids)]})
    assert [one["n"] for one in records(part)] == [0, 1, 3, 4, 5, 6]
    assert part.ids is not None
    assert [bool(one) for one in part.ids.each] == [True, True, False, False, False, True]
    again = read({"batch": [{"messageId": "b"}]}).ids
    assert again is not None
    assert again.each == part.ids.each[1:2]


def test_pretty_messages_keep_their_lines() -> None:
    body = b'{"batch": [{"messageId":\n"1"}, {"messageId": "2"}], "sentAt": "now"}'
    assert [one["messageId"] for one in records(read(body))] == ["1", "2"]


def test_bad_messages_go_beside_good_ones() -> None:
    deep: Any = []
    for _ in range(80):
        deep = [deep]
    bad = [7, "x", None, {"messageId": "d", "deep": deep}, {"messageId": "l", "long": "x" * 5000}]
    part = read({"batch": [*bad, {"messageId": "good"}, {"messageId": "good"}]})
    assert [one["messageId"] for one in records(part)] == ["good"]
    reasons = [(one.index, one.reason) for one in part.parsed.refused]
    assert reasons == [(n, "malformed") for n in range(4)] + [(4, "too_large")]
    long = {"messageId": "l", "writeKey": KEY, "long": "x" * 5000}
    part = read({"batch": [long, {"messageId": "good"}]})
    assert KEY.encode() not in part.parsed.refused[0].payload
    assert read({"batch": [], "writeKey": KEY}).parsed.total == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"batch": [{"a": "\xff"}]}', 400),
        (b"[]", 400),
        (b"7", 400),
        ({}, 400),
        ({"batch": {}}, 400),
        ({"batch": None}, 400),
        ({"batch": [1, 2]}, 400),
        (b'{"batch": ' + b"[" * 100_000, 400),
        (b'{"batch": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
        ({"batch": [{}] * 1001}, 413),
        (b'{"batch": [' + b"1," * 600_000 + b"1]}", 413),
        ({"batch": [{"n": "x" * 5000}]}, 413),
        ({"batch": [{}, {}], "sentAt": "x" * 5000}, 413),
        ({"batch": [{}] * 900, "context": {"x": "y" * 4000}}, 413),
    ],
)
def test_what_is_no_batch(body: Any, status: int) -> None:
    limits = LIMITS._replace(bytes_max=1024**2)
    assert refusal(body, limits).kind.status == status


def test_small_bodies_are_read_at_once_and_large_ones_in_a_thread() -> None:
    small = json.dumps({"batch": [{"messageId": str(n)} for n in range(900)]}).encode()
    assert SegmentBatchCodec().decode_quickly(small, LIMITS)
    assert (
        SegmentBatchCodec().decode_quickly(b'{"batch": [' + b"{}," * 3000 + b"{}]}", LIMITS) is None
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["batch", "messageId", "context", "writeKey", "sentAt", "a\n"]), inner
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value, indent=1).encode()))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    for codec in (SegmentBatchCodec(), SegmentMessageCodec("track")):
        try:
            parts = codec.decode(body, LIMITS)
        except Problem:
            continue
        for one in records(parts[0]):
            assert isinstance(one, dict)
            assert "writeKey" not in one


@settings(max_examples=100)
@given(st.lists(JSON, max_size=12), st.integers(0, 12), st.sampled_from([None, 1]))
def test_elements_are_counted_a_window_at_a_time(
    elements: list[Any], most: int, indent: int | None
) -> None:
    array = json.dumps(elements, indent=indent, ensure_ascii=False).encode()
    longest = max((len(json.dumps(one, indent=8).encode()) for one in elements), default=0)
    limits = LIMITS._replace(records_max=most, record_bytes_max=longest + 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_WINDOW_BYTES", 0)
        patch.setattr(messages, "_ELEMENTS_SURE", 0)
        for body in (array, b'{"x": 1, "batch":  ' + array + b"}"):
            if len(elements) <= most:
                messages.bound_elements(body, limits)
                continue
            with pytest.raises(Problem) as found:
                messages.bound_elements(body, limits)
            assert found.value.kind.slug == "too-many-records"


# -- through a source and a journal ----------------------------------------------------------------


def basic(key: str) -> str:
    return f"Basic {base64.b64encode(f'{key}:'.encode()).decode()}"


def door(folder: Path, **http: Any) -> Door:
    return Door(folder, http={"endpoints": {"segment": {"pipeline": "default"}}, **http})


async def test_the_write_key_is_a_token_of_the_one_table(tmp_path: Path) -> None:
    tokens = {"shop": {"token": KEY}}
    async with door(tmp_path, tokens=tokens) as one:
        body = json.dumps({"batch": [{"messageId": "1"}]}).encode()
        keyed = json.dumps({"batch": [{"messageId": "2"}], "writeKey": KEY}).encode()
        false = keyed.replace(KEY.encode(), KEY[::-1].encode())
        for sent, headers, status in (
            (body, {"Authorization": basic(KEY)}, 200),
            (body, {"Authorization": f"Bearer {KEY}"}, 200),
            (keyed, {}, 200),
            (keyed, {"Authorization": basic(KEY[::-1])}, 401),
            (body, {}, 401),
            (false, {}, 401),
        ):
            told = await ask(one.source, sent, BATCH, **headers)
            assert told.status == status
            assert told.headers["content-type"] == "application/json"
            assert told.json["success"] is (status == 200)
        assert told.json["code"] == "unauthorized"
        assert one.accepted == 2


async def test_answers_are_those_that_libraries_read(tmp_path: Path) -> None:
    async with door(tmp_path) as one:
        batch = gzip.compress(json.dumps({"batch": [{"messageId": "1"}, 7]}).encode())
        told = await ask(one.source, batch, BATCH, Content_Encoding="gzip")
        assert (told.status, told.json) == (200, {"success": True})
        again = await ask(one.source, b'{"messageId": "1", "event": "e"}', "/v1/track")
        assert (again.status, again.json) == (200, {"success": True})
        assert one.accepted == 1
        told = await ask(one.source, b"{", BATCH)
        assert (told.status, told.json["code"]) == (400, "malformed")
        assert "message" in told.json
        with one.held_commits():
            one.pipelines["default"].recent_ids.hold(
                "anonymous", read({"batch": [{"messageId": "9"}]}).ids.known
            )
            told = await ask(one.source, b'{"messageId": "9"}', "/v1/page")
        assert (told.status, told.headers["retry-after"]) == (503, "1")
        assert told.json["code"] == "overloaded"
