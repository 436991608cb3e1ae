"""`[route]`: records go to the pipeline of a value in them, with one answer for all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from ingestd.base.append import Append, DeliveryWaiter, SourceOffset
from ingestd.base.errors import NeverFits, Overloaded
from ingestd.base.record import InvalidRecord, Records
from ingestd.settings import Settings
from ingestd.sources.screening import Router, ScreenedIntake
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.source_tools import MemoryIntake, ask, serving
from tests.sources.test_screening import OddScreen

if TYPE_CHECKING:
    from collections.abc import Sequence

CLICK, ORDER, OTHER = b'{"type":"click"}', b'{"type":"order.new"}', b'{"type":"else"}'
TABLE = {"click": "clicks", "order.*": "orders"}


class Routed:
    """The pipeline `default` with a route, and those that it names."""

    def __init__(self, default: str = "", *, screens: Any = None, keys: bool = False) -> None:
        make: Any = KeyIntake if keys else lambda name: MemoryIntake(name=name)
        self.default, self.clicks, self.orders = map(make, ("default", "clicks", "orders"))
        plain = {one.name: one for one in (self.default, self.clicks, self.orders)}
        self.intake: Any = ScreenedIntake(
            self.default, None, Router("/type", TABLE, default), plain, screens or {}
        )
        self.all = (self.intake, self.clicks, self.orders)

    @property
    def items(self) -> tuple[list[bytes], ...]:
        return self.default.items, self.clicks.items, self.orders.items


def body(*records: bytes) -> bytes:
    return b"\n".join([*records, b""])


# -- the router ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "to"),
    [
        (b'{"type":"click"}', "clicks"),
        (b'{"type":"cl\\u0069ck"}', "clicks"),
        (b'{"type":"order.new"}', "orders"),
        (b'{"type":7}', "numbers"),
        (b'{"type":"7"}', "numbers"),
        (b'{"type":true}', "truths"),
        (b'{"type":null}', "rest"),
        (b'{"type":["click"]}', "rest"),
        (b'{"type":{"*":1}}', "rest"),
        (b'{"type":"' + b"x" * 300 + b'"}', "rest"),
        (b"[1]", "rest"),
        (b'"click"', "rest"),
        (b"{}", "rest"),
    ],
)
def test_the_pipeline_of_a_value(record: bytes, to: str) -> None:
    router = Router("/type", {**TABLE, "7": "numbers", "true": "truths"}, "rest")
    for records in (Records.lines([record]), Records.sized([record + b"\n"])):
        assert router.sort(records) == ({to: [0]}, [])


@bounded(max_examples=30)
@given(types=st.lists(st.sampled_from(["click", "order.1", "else", "é", None, 7]), min_size=1))
def test_each_record_has_one_place(types: Sequence[Any]) -> None:
    records = Records.lines([json.dumps({"type": one}).encode() for one in types])
    places, rejected = Router("/type", TABLE, "").sort(records)
    every = sorted(
        [*(one for some in places.values() for one in some), *(r.index for r in rejected)]
    )
    assert every == list(range(len(types)))
    assert places.get("clicks", []) == [i for i, one in enumerate(types) if one == "click"]


# -- over HTTP -------------------------------------------------------------------------------------


async def test_one_body_goes_to_several_pipelines_and_has_one_answer() -> None:
    routed = Routed()
    async with serving(*routed.all) as source:
        reply = await ask(source, body(CLICK, ORDER, OTHER, b"{oops", CLICK))
        assert reply.status == 202
        assert (reply.json["accepted"], reply.json["invalid"]) == (3, 2)
        found = [(e["index"], e["reason"]) for e in reply.json["errors"]]
        assert found == [(2, "unrouted"), (3, "malformed")]
        assert reply.json["errors"][0]["detail"] == "/type names no pipeline"
        assert (await ask(source, CLICK, "/v1/records/orders")).status == 202  # as it is asked for
        nothing = await ask(source, OTHER)
        assert (nothing.status, nothing.json["errors"][0]["reason"]) == (400, "unrouted")
        alone = await ask(source, b"[%b]" % CLICK, Content_Type="application/json")
        assert alone.json["accepted"] == 1
    assert routed.items == ([], [CLICK, CLICK, CLICK], [ORDER, CLICK])
    assert [one.reason for one in routed.default.refused] == ["unrouted", "malformed"]


async def test_a_default_may_be_the_pipeline_itself_and_bodies_without_length_are_routed() -> None:
    routed = Routed("default")
    async with serving(*routed.all) as source:
        chunks = body(OTHER, CLICK)
        framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunks), chunks)
        reply = await ask(source, framed, Transfer_Encoding="chunked")
        assert reply.json == {"accepted": 2, "invalid": 0, "errors": []}
        large = body(*[OTHER, CLICK] * 10_000)
        assert (await ask(source, large)).json["accepted"] == 20_000
    assert [len(some) for some in routed.items] == [10_001, 10_001, 0]


async def test_a_refusal_of_one_part_is_that_of_the_request_and_a_key_keeps_the_others() -> None:
    routed = Routed(keys=True)
    async with serving(*routed.all) as source:
        routed.orders.errors = [Overloaded(what="orders", retry_after=3.0)]
        both = body(CLICK, ORDER)
        reply = await ask(source, both, Idempotency_Key="k")
        assert (reply.status, reply.slug, reply.headers["retry-after"]) == (503, "overloaded", "3")
        assert (reply.json["accepted"], reply.json["invalid"]) == (1, 0)
        for _ in range(2):
            reply = await ask(source, both, Idempotency_Key="k")
            assert reply.json == {"accepted": 2, "invalid": 0, "errors": []}
        routed.clicks.errors = [NeverFits(size=9, what="x", bound=1)]
        routed.orders.errors = [Overloaded(what="orders")]
        assert (await ask(source, both)).status == 503
    assert routed.items == ([], [CLICK], [ORDER])


async def test_a_part_that_was_accepted_before_has_its_errors_again() -> None:
    routed = Routed("default", keys=True, screens={"clicks": OddScreen()})
    bad = b'{"type":"click","a":"bad"}'
    async with serving(*routed.all) as source:
        routed.default.errors = [Overloaded(what="default", retry_after=3.0)]
        sent = body(OTHER, CLICK, bad)
        reply = await ask(source, sent, Idempotency_Key="k")
        assert (reply.status, reply.json["accepted"], reply.json["invalid"]) == (503, 1, 1)
        for _ in range(2):
            reply = await ask(source, sent, Idempotency_Key="k")
            found = [(e["index"], e["reason"]) for e in reply.json["errors"]]
            assert (reply.status, reply.json["accepted"], found) == (202, 2, [(2, "schema")])
    assert reply.headers["idempotent-replayed"] == "true"
    assert routed.items == ([OTHER], [CLICK], [])


async def test_a_token_needs_the_right_for_each_pipeline(tmp_path: Any) -> None:
    routed = Routed()
    tokens = {"some": {"file": str(tmp_path / "t"), "pipelines": ["default", "clicks"]}}
    (tmp_path / "t").write_text("s" * 40 + "\n")
    (tmp_path / "t").chmod(0o600)
    async with serving(*routed.all, tokens=tokens) as source:
        asked = {"Authorization": "Bearer " + "s" * 40}
        assert (await ask(source, CLICK, **asked)).status == 202
        reply = await ask(source, body(CLICK, b"no JSON", ORDER), **asked)
        assert reply.status == 403
        assert reply.json["detail"] == (
            "some may not send here: the record at index 2 is routed to another pipeline"
        )
    assert routed.items == ([], [CLICK], [])


async def test_records_have_to_fit_the_pipeline_that_they_go_to() -> None:
    routed = Routed(screens={"clicks": OddScreen()})
    bad = b'{"type":"click","a":"bad"}'
    async with serving(*routed.all) as source:
        reply = await ask(source, body(ORDER, bad, CLICK, b'{"type":"order.bad"}', OTHER))
        found = [(e["index"], e["reason"]) for e in reply.json["errors"]]
        assert (reply.json["accepted"], found) == (3, [(1, "schema"), (4, "unrouted")])
        strict = await ask(source, body(OTHER, bad, CLICK), Prefer="handling=strict")
        assert [e["index"] for e in strict.json["errors"]] == [0, 1]
    assert [one.reason for one in routed.clicks.refused] == ["schema"]
    assert [one.reason for one in routed.default.refused] == ["unrouted"]
    assert routed.items == ([], [CLICK], [ORDER, b'{"type":"order.bad"}'])


async def test_endpoints_are_routed_and_their_ids_are_known_in_each_pipeline() -> None:
    routed = Routed(keys=True)
    own = {"metadata_field": ""}
    lines = [b'{"create":{"_id":"%d"}}' % n for n in range(3)]
    bulk = body(lines[0], CLICK, lines[1], OTHER, lines[2], ORDER)
    async with serving_endpoint("elasticsearch", *routed.all, own=own) as source:
        for _ in range(2):
            reply = await ask(source, bulk, "/elastic/x/_bulk", Content_Type="application/json")
            assert [i["create"]["status"] for i in reply.json["items"]] == [201, 400, 201]
    assert routed.items == ([], [CLICK], [ORDER])


# -- without answers -------------------------------------------------------------------------------


async def test_an_append_goes_to_all_and_what_else_is_in_it_comes_last() -> None:
    routed = Routed()
    offset, order = SourceOffset("k", b"s"), []

    def noted(intake: Any) -> None:
        accept = intake.accept

        async def accepted(append: Append) -> None:
            await accept(append)
            order.append((intake.name, append.offset, append.records.count))

        intake.accept = accepted

    for one in (routed.default, routed.clicks, routed.orders):
        noted(one)
    routed.orders.errors = [Overloaded(what="x", retry_after=0.01)]
    whole = DeliveryWaiter(4)
    records = Records.lines([CLICK, OTHER, ORDER, CLICK])
    await routed.intake.accept(
        Append(records, [InvalidRecord(0, "malformed", "", b"")], offset=offset, waiter=whole)
    )
    assert order == [("clicks", None, 2), ("orders", None, 1), ("default", offset, 0)]
    assert len(routed.default.refused) == 2
    assert whole.left == 3  # the record without a pipeline is settled
    (clicks, orders) = (part for _, part in routed.intake._waiters[whole])
    orders.died(0, 1, "failed", "no")
    orders.settled(0, 1)
    clicks.settled(0, 2)
    assert (whole.failed[0].index, whole.done.is_set()) == (2, True)


async def test_nothing_is_accepted_where_no_pipeline_has_room() -> None:
    routed = Routed()
    full = Overloaded(what="x", retry_after=0.01)
    routed.clicks.errors, routed.orders.errors = [full], [full]
    append = Append(Records.lines([CLICK, ORDER]))
    with pytest.raises(Overloaded):
        await routed.intake.accept(append)
    assert routed.items == ([], [], [])
    await routed.intake.accept(append)
    assert routed.items == ([], [CLICK], [ORDER])
    assert routed.default.runs == []


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key", "text"),
    [
        ({"route": {"field": "/t", "to": {"x": "nope"}}}, "route.to.x", "there is no pipeline"),
        ({"route": {"field": "/t", "default": "nope"}}, "route.default", "there is no pipeline"),
        ({"route": {"to": {"x": "a"}}}, "route.field", "is empty"),
        ({"route": {"field": "/t"}}, "route.to", "no record could be accepted"),
        ({"format": "text", "route": {"field": "/t", "to": {"x": "a"}}}, "route.field", "text"),
        (
            {"pipelines": {"a": {"format": "text"}}, "route": {"field": "/t", "to": {"x": "a"}}},
            "route.to.x", "has the format text",
        ),
        (
            {
                "pipelines": {"a": {"route": {"field": "/t", "default": "b"}}, "b": {}},
                "route": {"field": "/t", "to": {"x": "a"}},
            },
            "route.to.x", "has a route itself",
        ),
        (
            {
                "pipelines": {"a": {"record_bytes_max": 10}},
                "route": {"field": "/t", "to": {"x": "a"}},
            },
            "route.to.x", "record_bytes_max of 'a' is less",
        ),
        ({"pipelines": {"a": {"route": {"field": "t"}}}}, "", "no JSON Pointer"),
    ],
)  # fmt: skip
def test_routes_that_cannot_work_are_refused(values: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        Settings(**{"pipelines": {"a": {}, "b": {}}, **values})
    assert any(key in line and text in line for line in str(raised.value).splitlines())


def test_a_route_is_not_inherited_and_feeds_what_it_names() -> None:
    settings = Settings(
        route={"field": "/t", "to": {"x": "a"}, "default": "default"},  # type: ignore[arg-type]
        pipelines={"a": {}, "b": {}},  # type: ignore[dict-item]
        source={"kind": "stdin"},  # type: ignore[arg-type]
    )
    assert settings.pipelines["a"].route.field == ""
    (source,) = settings.running_sources()
    assert [source.feeds(name) for name in ("default", "a", "b")] == [True, True, False]
