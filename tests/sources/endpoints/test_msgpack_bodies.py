"""The records endpoint takes MessagePack: bodies, answers, bounds; over HTTP."""

from __future__ import annotations

import gzip
import json

import msgpack
import pytest

from tests.sources.source_tools import MemoryIntake, ask, connected, serving

NOW = msgpack.ExtType(0, (1_764_412_619).to_bytes(4, "big") + (7).to_bytes(4, "big"))
TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack; v=1")


async def test_msgpack_is_accepted_under_each_of_its_names():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        for kind in TYPES:
            client.post(msgpack.packb([{"n": 1}, {"n": 2}]), Content_Type=kind)
            reply = await client.reply()
            assert (reply.status, reply.json["accepted"]) == (202, 2)
        events = b"".join(msgpack.packb([[NOW, {}], {"n": n}]) for n in range(3000))
        client.post(gzip.compress(events), Content_Type=TYPES[0], Content_Encoding="gzip")
        assert (await client.reply()).json["accepted"] == 3000
    assert json.loads(intake.items[-1]) == {"date": 1764412619.000000007, "n": 2999}


async def test_malformed_msgpack_is_refused_and_its_invalid_records_are_listed():
    intake = MemoryIntake(record_bytes_max=100)
    bounds = {"records_max": 10, "decompressed_bytes_max": 900}
    whole = msgpack.packb([{"n": 1}] * 3)
    async with serving(intake, **bounds) as source:
        for body, status, slug in (
            (whole[:-1], 400, "malformed"),
            (b"\xc1", 400, "malformed"),
            (whole + b"\xc1", 400, "malformed"),
            (b"\x90", 400, "empty"),
            (msgpack.packb(["x" * 200]), 413, "record-too-large"),
            (msgpack.packb([1] * 11), 413, "too-many-records"),
            (msgpack.packb(["\0" * 16] * 10), 413, "payload-too-large"),
        ):
            reply = await ask(source, body, Content_Type=TYPES[0])
            assert (reply.status, reply.slug) == (status, slug), body
        some = msgpack.packb([1, "x" * 200, [NOW, 5]])
        reply = await ask(source, some, Content_Type=TYPES[0])
        assert (reply.status, reply.json["accepted"], reply.json["invalid"]) == (202, 1, 2)
        assert [one["index"] for one in reply.json["errors"]] == [1, 2]


@pytest.mark.parametrize("form", ["text", "bytes"])
async def test_only_json_pipelines_take_msgpack(form):
    async with serving(MemoryIntake(form)) as source, connected(source) as client:
        client.post(b"\x01", Content_Type=TYPES[0])
        assert (await client.reply()).status == 415


async def test_json_that_is_larger_than_its_msgpack_counts_against_what_is_in_flight():
    intake = MemoryIntake()
    async with serving(intake, inflight_bytes_max=100_000) as source, connected(source) as client:
        client.post(msgpack.packb(["x" * 1000] * 30), Content_Type=TYPES[0])
        assert (await client.reply()).status == 202
        client.post(msgpack.packb(["\0" * 1000] * 30), Content_Type=TYPES[0])
        assert (await client.reply()).slug == "payload-too-large"
