"""CloudEvents: three ways to send them are one form of record; the handshake of webhooks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.http.problem import Problem
from ingestd.settings import Settings
from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
from ingestd.sources.http.endpoints.cloudevents import (
    BATCH,
    PATH,
    STRUCTURED,
    CloudeventsEndpoint,
    CloudeventsSettings,
)
from tests.sources.source_tools import Reply, ask, connected
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.sources.http.endpoints.base import Decoded

LIMITS = BodyLimits(1000, 4096, 64)
EVENT = {"specversion": "1.0", "id": "e-1", "source": "/shop", "type": "bought"}
HEADERS = {f"ce-{name}": value for name, value in EVENT.items()}
JSON_TYPE = {"Content-Type": "application/json"}


def endpoint(**own: Any) -> CloudeventsEndpoint:
    settings = CloudeventsSettings(pipeline="default", **own)
    return CloudeventsEndpoint(EndpointContext(Settings().http, {}, "default", [], settings))


def read(body: bytes, headers: dict[str, str]) -> Decoded:
    codec = endpoint().open(Head("POST", PATH, headers, "", "json"))
    (part,) = codec.decode(body, LIMITS)
    assert part.ids is None or len(part.ids.each) == part.parsed.records.count
    return part


def records(part: Decoded) -> list[Any]:
    return [json.loads(item) for item in part.parsed.records.items()]


def test_headers_that_are_no_utf_8_have_a_mark_in_their_place() -> None:
    """A server gives their bytes as lone surrogates."""
    odd = {"ce-subject": "a\udcff%20b", "Content-Type": "text/plain; x=\udcff", "ce-id": "\udcff"}
    (found,) = records(read(b"", HEADERS | odd))
    assert (found["subject"], found["id"]) == ("a\ufffd b", "\ufffd")
    assert found["datacontenttype"] == "text/plain; x=\ufffd"


@pytest.mark.parametrize(
    ("body", "headers", "more"),
    [
        (b' {"n": [1]}', JSON_TYPE, {"datacontenttype": "application/json", "data": {"n": [1]}}),
        (
            b"1",
            {"Content-Type": "application/vnd.x+json; charset=utf-8"},
            {"datacontenttype": "application/vnd.x+json; charset=utf-8", "data": 1},
        ),
        (b"", {}, {}),
        (b"", JSON_TYPE, {"datacontenttype": "application/json"}),
        (b"text", {"Content-Type": "text/plain"}, {"datacontenttype": "text/plain",
                                                  "data_base64": "dGV4dA=="}),
        (b"\xff\0", {}, {"data_base64": "/wA="}),
        (b"[1]", {}, {"data": [1]}),
        (b"[1", {}, {"data_base64": "WzE="}),
        (
            b"",
            {"ce-traceparent": "00-1", "Ce-Subject": "%E2%82%AC %22x%22 50%", "ce-data": "no",
             "ce-no-name": "no", "ce-": "no"},
            {"traceparent": "00-1", "subject": '€ "x" 50%'},
        ),
    ],
)  # fmt: skip
def test_a_binary_event_is_put_together(
    body: bytes, headers: dict[str, str], more: dict[str, Any]
) -> None:
    assert records(read(body, HEADERS | headers)) == [EVENT | more]


def test_an_event_is_the_same_however_it_comes() -> None:
    alone = read(json.dumps(EVENT).encode(), {"Content-Type": f"{STRUCTURED}; charset=utf-8"})
    other = EVENT | {"source": "/web"}
    batch = read(json.dumps([EVENT, other, EVENT]).encode(), {"Content-Type": BATCH})
    binary = read(b"", HEADERS)
    escaped = json.dumps(EVENT).replace("/shop", "\\/sho\\u0070").encode()
    written = read(escaped, {"Content-Type": STRUCTURED})
    assert records(alone) == [EVENT]
    assert records(batch) == [EVENT, other]
    found = [part.ids.each for part in (alone, batch, binary, written) if part.ids is not None]
    assert found[0] == found[1][:1] == found[2] == found[3]
    assert found[1][1] != found[0][0]
    assert read(b"[]", {"Content-Type": BATCH}).parsed.total == 0


def test_bad_events_go_beside_good_ones() -> None:
    bad = [7, {}, EVENT | {"id": ""}, EVENT | {"type": 7}, EVENT | {"specversion": "0.2"}]
    part = read(json.dumps([*bad, EVENT]).encode(), {"Content-Type": BATCH})
    assert records(part) == [EVENT]
    assert [one.index for one in part.parsed.refused] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", JSON_TYPE, 400),
        (b"{}", {}, 400),
        (b"{", HEADERS | JSON_TYPE, 400),
        (b"", {name: value for name, value in HEADERS.items() if name != "ce-id"}, 400),
        (b"", HEADERS | {"ce-specversion": "2.0"}, 400),
        (b"", {"Content-Type": STRUCTURED}, 400),
        (b"[]", {"Content-Type": STRUCTURED}, 400),
        (b"{}", {"Content-Type": BATCH}, 400),
        (b"[{}]", {"Content-Type": BATCH}, 400),
        (b"x", {"Content-Type": "application/cloudevents+avro"}, 415),
        (b"x" * 5000, HEADERS, 413),
        (json.dumps([EVENT] * 1001).encode(), {"Content-Type": BATCH}, 413),
        (b"[" + b"1," * 600_000 + b"1]", {"Content-Type": BATCH}, 413),
    ],
)
def test_what_is_no_event(body: bytes, headers: dict[str, str], status: int) -> None:
    with pytest.raises(Problem) as found:
        read(body, headers)
    assert found.value.kind.status == status


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.just("1.0"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "source", "specversion", "type", "data"]), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(
    st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value, indent=1).encode()),
    st.sampled_from([STRUCTURED, BATCH, "application/json", "text/plain", ""]),
    st.dictionaries(st.sampled_from([*HEADERS, "ce-x", "ce-%"]), st.text(max_size=9)),
    st.booleans(),
)
def test_anything_is_read_or_refused(
    body: bytes, kind: str, headers: dict[str, str], whole: bool
) -> None:
    all_headers = {"Content-Type": kind} | (HEADERS if whole else {}) | headers
    try:
        part = read(body, all_headers)
    except Problem:
        return
    for one in records(part):
        assert one["id"]
        assert one["source"]


# -- through a source and a journal ----------------------------------------------------------------

TOKEN = "token-of-the-tests-0123456789"


def door(folder: Path, *, own: dict[str, Any] | None = None, **http: Any) -> Door:
    table = {"pipeline": "default", **(own or {})}
    return Door(folder, http={"endpoints": {"cloudevents": table}, **http})


async def test_answers_are_our_own(tmp_path: Path) -> None:
    async with door(tmp_path, tokens={"shop": {"token": TOKEN}}) as one:
        headers = {name.replace("-", "_"): value for name, value in HEADERS.items()}
        told = await ask(one.source, b"", PATH, Authorization=f"Bearer {TOKEN}", **headers)
        assert (told.status, told.json) == (202, {"accepted": 1, "invalid": 0, "errors": []})
        batch = json.dumps([EVENT, 7, EVENT | {"id": "e-2"}]).encode()
        told = await ask(one.source, batch, f"{PATH}?access_token={TOKEN}", Content_Type=BATCH)
        assert (told.status, told.json["accepted"], told.json["invalid"]) == (202, 2, 1)
        assert told.json["errors"][0]["index"] == 1
        assert one.accepted == 2
        told = await ask(one.source, batch, PATH, Content_Type=BATCH)
        assert (told.status, told.slug) == (401, "unauthorized")


async def handshake(door: Door, origin: str, path: str = PATH) -> Reply:
    asked = f"OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\n{origin}Connection: close\r\n\r\n"
    async with connected(door.source) as client:
        client.writer.write(asked.encode())
        return await client.reply()


async def test_the_handshake_of_webhooks(tmp_path: Path) -> None:
    own = {"origins": ["events.example"]}
    async with door(tmp_path, own=own, tokens={"shop": {"token": TOKEN}}) as one:
        asks = "WebHook-Request-Origin: Events.example\r\nWebHook-Request-Rate: 120\r\n"
        told = await handshake(one, asks, f"{PATH}?access_token={TOKEN}")
        assert told.status == 204
        assert told.headers["webhook-allowed-origin"] == "Events.example"
        assert told.headers["webhook-allowed-rate"] == "*"
        assert told.headers["allow"] == "POST, OPTIONS"
        assert (await handshake(one, asks)).status == 401
        for origin in ("", "WebHook-Request-Origin: other.example\r\n"):
            told = await handshake(one, origin, f"{PATH}?access_token={TOKEN}")
            assert told.status == 204
            assert "webhook-allowed-origin" not in told.headers
    async with door(tmp_path) as one:
        told = await handshake(one, "WebHook-Request-Origin: any.example\r\n")
        assert told.headers["webhook-allowed-origin"] == "any.example"
