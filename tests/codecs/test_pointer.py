"""Values at a JSON Pointer of each record, compared with RFC 6901 followed step by step."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.record import Records
from ingestd.codecs.lines import CANONICAL_BYTES
from ingestd.codecs.pointer import CHARACTERS_MAX, TOKENS_MAX, Pointer, Where

NAMES = st.sampled_from(
    ["a", "b", "0", "1", "01", "", "~", "/", "a/b", "~1", 'q"', "\\", "\n", "é"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | NAMES
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def step_by_step(value: Any, tokens: list[str]) -> Any:
    """The value that RFC 6901, 4 finds; `None` if there is none."""
    for token in tokens:
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and token in [str(i) for i in range(len(value))]:
            value = value[int(token)]
        else:
            return None
    return value


def pointer_of(tokens: list[str]) -> Pointer:
    return Pointer("".join("/" + t.replace("~", "~0").replace("/", "~1") for t in tokens))


@given(
    records=st.lists(VALUES, max_size=6),
    tokens=st.lists(NAMES, min_size=1, max_size=3),
    ascii_only=st.booleans(),
    sized=st.booleans(),
)
def test_values_are_those_of_the_rfc(records, tokens, ascii_only, sized) -> None:
    texts = [json.dumps(one, ensure_ascii=ascii_only).encode() for one in records]
    run = Records.sized(texts) if sized else Records.lines(texts)
    found = pointer_of(tokens).values(run)
    expected = [step_by_step(one, tokens) for one in records]
    assert [None if one is None else json.loads(one) for one in found] == expected
    assert found == [pointer_of(tokens).value(text) for text in texts]


def test_equal_strings_have_equal_bytes() -> None:
    spellings = [rb'{"k":"a/b"}', rb'{"k":"a\/b"}', rb'{"k":"\u0061\u002fb"}', rb'{ "k" : "a/b" }']
    assert Pointer("/k").values(Records.lines(spellings)) == [msgspec.json.encode("a/b")] * 4
    numbers = [b'{"k":1}', b'{"k":1.0}', b'{"k":"1"}']
    assert len(set(Pointer("/k").values(Records.lines(numbers)))) == 3


def test_a_name_in_escapes_and_one_that_comes_twice() -> None:
    assert Pointer("/user_id").value(rb'{"user\u005fid":1}') == b"1"
    for pointer in ("/a", "/a/0"):  # the last one counts, in both ways through a record
        last = b"[2]" if pointer == "/a" else b"2"
        assert Pointer(pointer).value(b'{"a":[1],"a":[2]}') == last


def test_a_record_of_another_shape_changes_no_other_one() -> None:
    usual = [b'{"k":%d}' % i for i in range(CANONICAL_BYTES // 8)]
    records = [*usual, b"[7]", b"3", b'{"k":null}', *usual]
    found = Pointer("/k").values(Records.lines(records))
    numbers: list[bytes | None] = [b"%d" % i for i in range(len(usual))]
    assert found == [*numbers, None, None, None, *numbers]
    assert Pointer("/0").values(Records.lines(records))[len(usual)] == b"7"
    assert Pointer("/k").values(Records.lines([])) == []


@pytest.mark.parametrize(
    "text",
    ["", "user_id", "/a~", "/a~2", "/" * (TOKENS_MAX + 1), "/" + "a" * CHARACTERS_MAX],
)
def test_what_is_no_pointer_is_refused(text) -> None:
    with pytest.raises(ValueError, match="JSON Pointer"):
        Pointer(text)


@pytest.mark.parametrize("record", [b'{"a":"\xff\\n"}', b'{"a":' + b"[" * 100_000, b"\xff", b""])
def test_a_record_that_is_no_json_meets_no_condition(record: bytes) -> None:
    assert not Where(["a=1"]).holds(record)
