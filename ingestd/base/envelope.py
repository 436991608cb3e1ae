"""The envelope of a record: its origin, packed once by its source and read only where it is wanted.

From its source to its handler an envelope is bytes beside the records (`Records.envelopes`), in one
of three forms:

* empty: nothing is known of any of the records;
* one packed `Envelope`, that of all of them. Most traffic is so: a cut keeps it, and a join of
  records with the same one is a comparison;
* runs: `_RUNS` and then each different envelope once, the records as runs that share one, and,
  where the source numbers its records (lines of a file, offsets of a partition), the number of each
  run's first record. Numbers grow by one within a run, so a million lines are one run.

An `Envelope` is a MessagePack array, which never begins as `_RUNS` does. No form depends on how the
records were cut and joined on their way: equal neighbours are always one run.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import asdict, replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BYTES_MAX = 4096
"""Bound of a packed envelope: headers, then attributes, are left out from the last one on."""
NAME_CHARACTERS_MAX = 256
VALUE_CHARACTERS_MAX = 1024
"""Bounds of texts: the value of a header or an attribute, and everything else; more is cut off."""

_RUNS = b"R"


class Envelope(msgspec.Struct, frozen=True, array_like=True, repr_omit_defaults=True):
    """The origin of a record. A text is empty where its source has nothing to say.

    Attributes:
        source: the name of the source: `http`, `stdin`, `fetch`, or a name of `[sources]`.
        endpoint: the protocol that an HTTP request came by: `records`, `webhooks`.
        client: the principal's name: of its token, its certificate or its webhook.
        content_type: as the request has it.
        headers: the request headers that are kept, by their names in lower case.
        traceparent: the trace that the request is part of (W3C Trace Context).
        attributes: facts of one kind of source: `url` and `line` of `fetch`.
        numbered: the attribute that numbers the records; empty in the envelope of one record.
    """

    source: str = ""
    endpoint: str = ""
    client: str = ""
    content_type: str = ""
    headers: dict[str, str] = {}
    traceparent: str = ""
    attributes: dict[str, str | int] = {}
    numbered: str = ""


EMPTY = Envelope()
"""The envelope of records of which nothing is known."""


class _Run(NamedTuple):
    """Records with one envelope.

    Attributes:
        envelope: packed; empty for none.
        records: how many.
        number: the first one's and one more; 0 without numbers.
    """

    envelope: bytes
    records: int
    number: int = 0


class _Runs(msgspec.Struct, frozen=True, array_like=True):
    """The third form.

    Attributes:
        envelopes: each different one, packed.
        runs: of each run, a place in `envelopes`, its records, and the number of the first one.
    """

    envelopes: list[bytes]
    runs: list[tuple[int, int, int]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Envelope).decode
_decode_runs = msgspec.msgpack.Decoder(_Runs).decode


def pack(envelope: Envelope) -> bytes:
    """An envelope as it travels; texts beyond their bounds are cut, what has no room is left out.

    Args:
        envelope: of records whose source has not numbered them, or see `numbered`.
    """
    headers = {_text(name): _text(value) for name, value in envelope.headers.items()}
    attributes = {
        _text(name): _text(value) if isinstance(value, str) else value
        for name, value in envelope.attributes.items()
    }
    while True:
        packed = _encode(
            Envelope(
                _text(envelope.source, NAME_CHARACTERS_MAX),
                _text(envelope.endpoint, NAME_CHARACTERS_MAX),
                _text(envelope.client, NAME_CHARACTERS_MAX),
                _text(envelope.content_type, NAME_CHARACTERS_MAX),
                headers,
                _text(envelope.traceparent, NAME_CHARACTERS_MAX),
                attributes,
                _text(envelope.numbered, NAME_CHARACTERS_MAX),
            )
        )
        rest = headers or attributes
        if len(packed) <= BYTES_MAX or not rest:
            return packed
        rest.popitem()


def _text(text: str, longest: int = VALUE_CHARACTERS_MAX) -> str:
    text = text[:longest]
    # A header's bytes that are no UTF-8 come as surrogates, which can't be encoded.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def numbered(packed: bytes, records: int, first: int) -> bytes:
    """The envelopes of records that have numbers, from `first` on.

    Args:
        packed: the envelope of all of them; its `numbered` names the attribute.
        records: how many.
        first: the first one's number.
    """
    return _form([_Run(packed, records, first + 1)])


def is_shared(packed: bytes) -> bool:
    """Returns True if all records have the same envelope, or none."""
    return packed[:1] != _RUNS


def joined(parts: Sequence[tuple[int, bytes]]) -> bytes:
    """The envelopes of runs of records that are joined: (records, envelopes) of each."""
    first = parts[0][1] if parts else b""
    if first[:1] != _RUNS:
        for _, packed in parts:
            if packed != first:
                break
        else:
            return first
    return _form([run for count, packed in parts for run in _runs(packed, count)])


def with_attribute(packed: bytes, records: int, name: str, value: str) -> bytes:
    """The envelopes of some records with one attribute more; it stands first, so it has room."""
    known: dict[bytes, bytes] = {}
    runs = []
    for run in _runs(packed, records):
        if run.envelope not in known:
            one = _decode(run.envelope) if run.envelope else EMPTY
            attributes = {name: value, **{k: v for k, v in one.attributes.items() if k != name}}
            known[run.envelope] = pack(replace(one, attributes=attributes))
        runs.append(run._replace(envelope=known[run.envelope]))
    return _form(runs)


def part(packed: bytes, first: int, records: int) -> bytes:
    """The envelopes of records `first` to `first + records - 1`."""
    if packed[:1] != _RUNS:
        return packed
    return EnvelopeRuns(packed, records).part(first, records)


def singles(packed: bytes, records: int) -> list[bytes]:
    """The envelopes of each record by itself.

    Raises:
        ValueError, LookupError: they are damaged, or of other records.
    """
    found: list[bytes] = []
    for envelope, count, number in _runs(packed, records):
        if envelope:
            _decode(envelope)
        if number:
            found += [_form([_Run(envelope, 1, n)]) for n in range(number, number + count)]
        else:
            found += [envelope] * count
    if len(found) != records:
        raise ValueError(f"envelopes of {len(found)} records, not {records}")
    return found


class EnvelopeRuns:
    """The envelopes of a run of records, unpacked once: to read them, or to cut them many times.

    Args:
        packed: as they came.
        records: how many records there are.
    """

    def __init__(self, packed: bytes, records: int) -> None:
        self._packed = packed
        self._runs = _runs(packed, records)
        self._ends = list(accumulate(run.records for run in self._runs))
        self._decoded: dict[bytes, Envelope] = {b"": EMPTY}

    def part(self, first: int, records: int) -> bytes:
        """See `part`."""
        if self._packed[:1] != _RUNS:
            return self._packed
        end, place, found = first + records, bisect_right(self._ends, first), list[_Run]()
        while first < end and place < len(self._runs):
            envelope, count, number = self._runs[place]
            start = self._ends[place] - count
            upto = min(end, self._ends[place])
            found.append(_Run(envelope, upto - first, number and number + first - start))
            first, place = upto, place + 1
        return _form(found)

    def different(self) -> Iterator[Envelope]:
        """Yields each different envelope, in the order of their first records, without numbers."""
        for packed in dict.fromkeys(run.envelope for run in self._runs):
            yield _decode(packed) if packed else EMPTY

    def of(self, index: int) -> Envelope:
        """The envelope of a record; each different one is decoded once.

        Raises:
            IndexError: there is no such record.
        """
        place = bisect_right(self._ends, index)
        packed, count, number = self._runs[place]
        envelope = self._decoded.get(packed)
        if envelope is None:
            envelope = self._decoded[packed] = _decode(packed)
        if not number:
            return envelope
        number += index - (self._ends[place] - count)
        attributes = {**envelope.attributes, envelope.numbered: number - 1}
        return replace(envelope, attributes=attributes, numbered="")


def facts_of(packed: bytes) -> dict[str, object]:
    """The fields of one record's envelope that are not empty, by name."""
    fields = asdict(EnvelopeRuns(packed, 1).of(0))
    return {name: value for name, value in fields.items() if value}


def _runs(packed: bytes, records: int) -> list[_Run]:
    """The runs of any form; `records` counts where the form does not."""
    if packed[:1] != _RUNS:
        return [_Run(packed, records)] if records else []
    stored = _decode_runs(memoryview(packed)[1:])
    return [_Run(stored.envelopes[place], count, number) for place, count, number in stored.runs]


def _form(runs: Iterable[_Run]) -> bytes:
    """The form of some runs; equal neighbours become one."""
    merged: list[_Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last is not None and last.envelope == run.envelope and _follows(last, run):
            merged[-1] = _Run(last.envelope, last.records + run.records, last.number)
        else:
            merged.append(run)
    if not merged:
        return b""
    if len(merged) == 1 and not merged[0].number:
        return merged[0].envelope
    places: dict[bytes, int] = {}
    stored = [
        (places.setdefault(run.envelope, len(places)), run.records, run.number) for run in merged
    ]
    return _RUNS + _encode(_Runs(list(places), stored))


def _follows(last: _Run, run: _Run) -> bool:
    return run.number == (last.number and last.number + last.records)
