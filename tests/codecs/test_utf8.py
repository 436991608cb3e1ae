"""UTF-8 of whole bodies, against Python's own decoder."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from ingestd.codecs import utf8
from ingestd.sources.http.decode import DocumentCodec
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.splunk_hec import EventsCodec
from tests.peak import peak


def fault(text: bytes) -> int:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1


@given(
    st.lists(st.binary(max_size=6) | st.text(max_size=6).map(str.encode)).map(b"".join),
    st.integers(4, 9),
)
def test_pieces_are_read_as_the_whole(text: bytes, piece: int) -> None:
    with patch.object(utf8, "_PIECE_BYTES", piece):
        assert utf8.find_fault(text) == fault(text)
        whole = text.decode(errors="replace").encode()
        assert utf8.replace_faults(text) == whole
        assert utf8.size_replaced(text) == len(whole)


def test_an_emoji_in_a_large_body_takes_no_more_than_a_letter() -> None:
    limits = BodyLimits(100_000, 1024**2)
    event = b'{"event":"%b"}'
    for codec in (DocumentCodec(), EventsCodec(lambda _index, _sourcetype: "")):
        taken = []
        for last in (b"a", "\N{GRINNING FACE}".encode()):
            body = b"[%b]" % b",".join([event % (b"x" * 10_000)] * 800 + [event % last])
            with peak() as most:
                (part,) = codec.decode(body, limits)
            assert part.parsed.records.count == 801
            taken.append(most.bytes)
        assert taken[1] < taken[0] + 1024**2
