from __future__ import annotations

import dataclasses
import enum
import json
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.record import Layout, Records
from ingestd.handlers.decode import CannotDecode, decoder_for


class Struct(msgspec.Struct):
    x: int
    kind: Literal["a", "b"] = "a"


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    x: int = 0


class Picky(msgspec.Struct):
    x: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise LookupError("secret")


@dataclasses.dataclass
class Data:
    x: int


class Typed(typing_extensions.TypedDict):
    x: int


class Model(pydantic.BaseModel):
    x: int


@pydantic.dataclasses.dataclass
class PydanticData:
    x: int


class Color(enum.Enum):
    RED = "red"


class Tree(msgspec.Struct):
    x: int
    children: list[Tree] = []


GOOD, BAD = b'{"x": 1}', b'{"x": "secret"}'

FORMS = [
    (Any, [GOOD, b"3"], [{"x": 1}, 3], b"{"),
    (object, [GOOD, b'"s"'], [{"x": 1}, "s"], b"nope"),
    (dict, [GOOD], [{"x": 1}], b"[1]"),
    (dict[str, Any], [GOOD], [{"x": 1}], b"3"),
    (dict[str, int], [GOOD], [{"x": 1}], BAD),
    (dict[str, object], [GOOD], [{"x": 1}], b"null"),
    (str, [b'"caf\\u00e9"'], ["café"], b"3"),
    (int, [b"1", b"2"], [1, 2], b"1.5"),
    (list[int], [b"[1,2]"], [[1, 2]], b'["secret"]'),
    (int | str | None, [b"1", b'"a"', b"null"], [1, "a", None], b"[]"),
    (Struct, [GOOD], [Struct(1)], BAD),
    (Struct, [GOOD], [Struct(1)], b'{"x": 1, "kind": "secret"}'),
    (Tree, [b'{"x":1,"children":[{"x":2}]}'], [Tree(1, [Tree(2)])], BAD),
    (Data, [GOOD], [Data(1)], BAD),
    (Typed, [GOOD], [{"x": 1}], BAD),
    (Color, [b'"red"'], [Color.RED], b'"secret"'),
    (Model, [GOOD], [Model(x=1)], BAD),
    (Model | None, [GOOD, b"null"], [Model(x=1), None], BAD),
    (list[Model], [b'[{"x": 1}]'], [[Model(x=1)]], BAD),
    (PydanticData, [GOOD], [PydanticData(x=1)], BAD),
    (Annotated[int, pydantic.Field(gt=0)], [b"1"], [1], b"-1"),
    (Annotated[int, msgspec.Meta(gt=0)], [b"1"], [1], b"-1"),
]


@pytest.mark.parametrize("layout", [Records.lines, Records.sized])
@pytest.mark.parametrize(("record", "good", "values", "bad"), FORMS)
def test_each_form_decodes_and_finds_what_does_not_fit(record, good, values, bad, layout) -> None:
    decoder = decoder_for(record, "json")
    assert decoder.decode(layout(good)) == (values, [])

    decoded, rejections = decoder.decode(layout([bad, *good, bad]))
    assert decoded == values
    assert [(r.index, r.reason) for r in rejections] == [
        (0, "undecodable"),
        (len(good) + 1, "undecodable"),
    ]
    for rejection in rejections:
        assert rejection.error
        assert "\n" not in rejection.error
        assert "secret" not in rejection.error


@pytest.mark.parametrize("record_format", ["json", "text", "bytes"])
@pytest.mark.parametrize("layout", [Records.lines, Records.sized])
def test_bytes_are_as_they_came_in_every_format(record_format, layout) -> None:
    items = [b"\xff\x00", b'"x"', b"", b"\r"]
    assert decoder_for(bytes, record_format).decode(layout(items)) == (items, [])


@pytest.mark.parametrize("record", [Any, str, object])
@pytest.mark.parametrize("layout", [Records.lines, Records.sized])
def test_text_is_strict_utf8(record, layout) -> None:
    decoder = decoder_for(record, "text")
    lines = ["café", "", "a\u2028b\x0cc\x1dd\r"]
    raw = [line.encode() for line in lines]
    assert decoder.decode(layout(raw)) == (lines, [])
    decoded, rejections = decoder.decode(layout([raw[0], b"\xff\xfe", *raw[1:], b"\xc3"]))
    assert decoded == lines
    assert [r.index for r in rejections] == [1, 4]
    assert {r.error for r in rejections} == {"not valid UTF-8"}


@pytest.mark.parametrize(
    ("record", "record_format", "says"),
    [
        (dict, "text", 'format = "json"'),
        (Struct, "text", "not Struct"),
        (str, "bytes", "list[bytes], not str"),
        (Model, "bytes", "not Model"),
        (complex, "json", "into complex"),
        (list[pytest.Item], "json", "into Item"),
        (int | complex, "json", "can't decode JSON"),
        (Annotated[pytest.Item, pydantic.Field()], "json", "pydantic can't decode"),
    ],
)
def test_what_can_never_be_decoded_is_refused_at_once(record, record_format, says) -> None:
    with pytest.raises(CannotDecode) as caught:
        decoder_for(record, record_format).decode(Records.lines([b"1"]))
    assert says in str(caught.value)


def problem(record: Any, item: bytes) -> str:
    (rejection,) = decoder_for(record, "json").decode(Records.sized([item]))[1]
    return rejection.error


def test_problems_say_what_and_where_but_not_the_value() -> None:
    assert problem(Struct, BAD) == "Expected `int`, got `str` - at `$.x`"
    assert problem(Struct, b'{"x":1,"kind":"secret"}') == "Invalid enum value - at `$.kind`"
    assert problem(Color, b'"a - at `b`"') == "Invalid enum value"
    assert problem(Strict, b'{"y":1}') == "Object contains unknown field `y`"
    assert problem(Picky, b'{"x":-1}') == "LookupError while it was decoded"
    assert problem(Any, b'"\xff"') == "not valid UTF-8"
    assert problem(Any, b"[" * 100_000) == "nested too deeply"
    assert problem(Model, BAD).startswith("x: Input should be a valid integer")
    assert len(problem(Strict, b'{"%s":1}' % (b"y" * 5000))) <= 300

    class Two(pydantic.BaseModel):
        a: int
        b: int

    assert problem(Two, b"{}") == "a: Field required (and 1 more)"


def test_a_run_that_lies_about_its_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="said to hold 3 records holds 2"):
        decoder_for(Any, "json").decode(Records(Layout.LINES, 3, b"1\n2\n"))
    with pytest.raises(ValueError, match="said to hold 1 records holds 2"):
        decoder_for(bytes, "json").decode(Records.sized([b"1", b"2"])._replace(count=1))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
).map(lambda value: json.dumps(value).encode())
BROKEN = st.sampled_from([b"{", b"}", b"[1", b"x", b'"', b"\xff", b'"\xff"', b"nul", b"1,"])
RECORDS = [Any, dict, int, str, Struct, Model, dict[str, Any], bytes]


@given(
    items=st.lists(VALUES | BROKEN | st.just(GOOD), max_size=20),
    record=st.sampled_from(RECORDS),
    sized=st.booleans(),
)
def test_decoded_and_rejected_are_each_record_once(items, record, sized) -> None:
    decoder = decoder_for(record, "json")
    decoded, rejections = decoder.decode((Records.sized if sized else Records.lines)(items))

    expected, gone = [], []
    for index, item in enumerate(items):
        try:
            expected.append(decoder.one(item) if decoder.one else item)
        except Exception:
            gone.append(index)
    assert decoded == expected
    assert [rejection.index for rejection in rejections] == gone


@given(
    items=st.lists(st.binary(max_size=12), max_size=12),
    record_format=st.sampled_from(["json", "text", "bytes"]),
    sized=st.booleans(),
)
def test_any_bytes_are_decoded_or_rejected(items, record_format, sized) -> None:
    if not sized:
        items = [item.replace(b"\n", b"") for item in items]
    decoder = decoder_for(Any, record_format)
    decoded, rejections = decoder.decode((Records.sized if sized else Records.lines)(items))
    places = [rejection.index for rejection in rejections]
    assert len(decoded) + len(places) == len(items)
    assert places == sorted(set(places))
    assert all(0 <= place < len(items) for place in places)
