"""Escapes of JSON that are half a surrogate pair."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.codecs.json import without_lone_surrogates


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (rb'"\ud83d"', "\ufffd"),
        (rb'"\uD83D\uDE00"', "\U0001f600"),
        (rb'"\ude00\ud83d"', "\ufffd\ufffd"),
        (rb'"\ud83d\ud83d\ude00"', "\ufffd\U0001f600"),
        (rb'"\\ud83d"', "\\ud83d"),
        (rb'"\\\ud83d"', "\\\ufffd"),
        (rb'"\ud83d\n\ude00"', "\ufffd\n\ufffd"),
    ],
)
def test_what_becomes_of_them(text: bytes, found: str) -> None:
    assert json.loads(without_lone_surrogates(text)) == found


@given(st.text(st.sampled_from('\ud83d\ude00\\ua\U0001f600\n"')))
def test_any_text_is_read_as_by_utf_16(text: str) -> None:
    written = json.dumps(text).encode()
    units = text.encode("utf-16-le", "surrogatepass")
    assert json.loads(without_lone_surrogates(written)) == units.decode("utf-16-le", "replace")
