"""Events of PostHog: what becomes of them, and what its libraries are told."""

from __future__ import annotations

import base64
import gzip
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.posthog import PosthogCodec
from tests.sources.source_tools import ask, connected
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.sources.http.endpoints.base import Decoded

LIMITS = BodyLimits(1000, 4096, 64)
KEY = "phc_key_of_the_tests_0123456789"
EVENT = {"event": "bought", "distinct_id": "u", "properties": {"n": 1}, "uuid": "u-1"}


def read(body: Any, limits: BodyLimits = LIMITS) -> Decoded:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    (part,) = PosthogCodec("").decode(raw, limits)
    assert part.ids is None or len(part.ids.each) == part.parsed.records.count
    return part


def records(part: Decoded) -> list[Any]:
    return [json.loads(item) for item in part.parsed.records.items()]


def test_a_batch_is_a_record_an_event() -> None:
    batch = [EVENT, EVENT | {"uuid": "u-2", "sent_at": "own"}, EVENT | {"uuid": None}, EVENT]
    part = read({"api_key": KEY, "batch": batch, "sent_at": "now", "historical_migration": False})
    sent = {"sent_at": "now"}
    assert records(part) == [EVENT | sent, batch[1], batch[2] | sent]
    assert part.token == KEY
    assert part.ids is not None
    assert [bool(one) for one in part.ids.each] == [True, True, False]
    part = read({"api_key": KEY, "batch": [EVENT], "historical_migration": True})
    assert records(part) == [EVENT | {"historical_migration": True}]
    assert records(read({"batch": [EVENT]})) == [EVENT]


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one, one]])
def test_events_come_alone_or_in_an_array_with_the_key_in_them(wrap: Any) -> None:
    for keyed in (
        EVENT | {"api_key": KEY},
        EVENT | {"token": KEY},
        EVENT | {"properties": {"n": 1, "token": KEY}},
    ):
        part = read(wrap(keyed))
        assert records(part) == [EVENT]
        assert part.token == KEY
    own = EVENT | {"properties": {"token": "of the user's"}}
    part = read({"api_key": KEY, "batch": [own]})
    assert (records(part), part.token) == ([own], KEY)


def test_forms_of_older_libraries_are_read() -> None:
    body = json.dumps(EVENT | {"api_key": KEY, "event": "a?>~ü"}).encode()
    plain = urlencode({"data": body.decode()}).encode()
    coded = urlencode({"data": base64.b64encode(body).decode(), "compression": "base64"}).encode()
    unquoted = b"data=" + base64.b64encode(body)
    for form in (plain, coded, unquoted):
        part = read(form)
        assert records(part) == [EVENT | {"event": "a?>~ü"}]
        assert part.token == KEY


def test_bad_events_go_beside_good_ones() -> None:
    bad = [7, {}, {"event": ""}, {"event": 3}, [EVENT]]
    long = EVENT | {"token": KEY, "long": "x" * 5000}
    keyed = [{"token": KEY}, {"event": "", "properties": {"token": KEY}}]
    part = read({"api_key": KEY, "batch": [*bad, long, *keyed, EVENT]})
    assert records(part) == [EVENT]
    assert [one.index for one in part.parsed.refused] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert part.parsed.refused[1].payload == b"{}"
    assert not any(KEY.encode() in one.payload for one in part.parsed.refused)
    assert read({"api_key": KEY, "batch": []}).parsed.total == 0


def test_odd_properties_and_large_events_are_no_fault_of_others() -> None:
    odd = b'{"event": "a", "properties": 1e999}'
    part = read(b'{"batch": [%b, {"event": "b", "properties": [1]}]}' % odd)
    assert [one["event"] for one in records(part)] == ["b"]
    assert part.parsed.refused[0].payload == odd
    large = EVENT | {"token": KEY, "long": "x" * 5000}
    part = read([large, EVENT, "x" * 5000])
    assert (records(part), part.token) == ([EVENT], KEY)
    many = b'{"event": "a", "properties": [' + b"1," * 600_000 + b"1]}"
    with pytest.raises(Problem) as found:
        read(many)
    assert found.value.kind.status == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"data=", 400),
        (b"data=%7B", 400),
        (b"data=***", 400),
        (b"data=" + b"a=&" * 50, 400),
        (b"data=\xff", 400),
        (b"\x1f\x8b", 400),
        ({}, 400),
        ({"batch": "x"}, 400),
        (b"7", 400),
        ([], 200),
        ([7], 400),
        ([EVENT] * 1001, 413),
        ({"batch": [EVENT], "sent_at": "x" * 5000}, 413),
    ],
)
def test_what_is_no_event(body: Any, status: int) -> None:
    try:
        read(body)
        found = 200
    except Problem as refused:
        found = refused.kind.status
    assert found == status


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["batch", "event", "uuid", "token", "properties", "sent_at", "a\n"]),
            inner,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(
    st.binary(max_size=60)
    | st.binary(max_size=60).map(lambda data: b"data=" + data)
    | JSON.map(lambda value: json.dumps(value, indent=1).encode())
    | JSON.map(lambda value: b"data=" + base64.b64encode(json.dumps(value).encode()))
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        (part,) = PosthogCodec("").decode(body, LIMITS)
    except Problem:
        return
    for one in records(part):
        assert one["event"]
        assert "token" not in one


# -- through a source and a journal ----------------------------------------------------------------


def door(folder: Path, **http: Any) -> Door:
    return Door(folder, http={"endpoints": {"posthog": {"pipeline": "default"}}, **http})


@pytest.mark.parametrize("path", ["/batch/", "/capture/", "/e/", "/i/v0/e/", "/i/v0/ai/batch/"])
async def test_each_path_takes_each_form(tmp_path: Path, path: str) -> None:
    async with door(tmp_path, tokens={"shop": {"token": KEY}}) as one:
        for number, slash in enumerate(("/", "")):
            event = EVENT | {"uuid": str(number)}
            body = json.dumps({"api_key": KEY, "batch": [event]}).encode()
            told = await ask(one.source, body, path.rstrip("/") + slash)
            assert (told.status, told.body) == (200, b'{"status":1}')
        zipped = gzip.compress(json.dumps(EVENT | {"token": KEY, "uuid": "z"}).encode())
        told = await ask(one.source, zipped, path + "?compression=gzip-js&ver=1")
        assert (told.status, told.json) == (200, {"status": 1})
        told = await ask(one.source, zipped, path + "?compression=gzip-js", Content_Encoding="gzip")
        assert told.status == 200
        assert one.accepted == 3
        for body, status, kind in (
            (json.dumps({"batch": [EVENT]}).encode(), 401, "authentication_error"),
            (json.dumps({"api_key": KEY[::-1], "batch": [EVENT]}).encode(), 401, "auth"),
            (b"{", 400, "validation_error"),
        ):
            told = await ask(one.source, body, path)
            assert told.status == status
            assert told.json["type"].startswith(kind)
            assert told.json["detail"]
        assert one.accepted == 3


async def test_nothing_has_feature_flags(tmp_path: Path) -> None:
    async with door(tmp_path, tokens={"shop": {"token": KEY}}) as one:
        async with connected(one.source) as client:
            for path in ("/flags/?v=2", "/flags", "/decide/?v=3", "/decide"):
                client.post(b'{"api_key": "whatever"}' * 50, path)
                told = await client.reply()
                assert (told.status, told.json) == (200, {})
        assert one.accepted == 0
