"""Reads bodies of Elasticsearch's `_bulk`: pairs of lines, an action and its document. No I/O.

https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk

A document that is created or indexed is a record; what its action says (`_index`, `_id`, `routing`)
goes in front of it, as one field. Nothing is changed or deleted: those actions fail by themselves.

Records stay bytes. Two ways cut the usual bodies as a whole: `_cut_same`, where all action lines
are the same, and `_cut_usual`, where each has an id or an index of its own, as clients write them.
`_walk` reads any body line by line, and alone decides what is wrong. All three read a body in
the same way: what one of the first two does not find exactly as it should be is left to the next.

A document that is created under a name of its client's (`_id`) is accepted once. One that is
indexed is a version of that name, and may be what an earlier version was: only where that is asked
for is one with the same name and content accepted once.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from ingestd.base.append import ID_BYTES, SenderIds
from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.json import DEPTH_MAX, is_deeper
from ingestd.codecs.lines import KEPT_BYTES, Parsed, json_fault, parse_canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUICK_LINES = 2000
"""A body of so many lines is cut in a millisecond or two."""
LISTED_MAX = 100
"""Failed actions whose reasons are told, and invalid records that are listed, for one pipeline."""
INDEX_CHARACTERS_MAX = 255
ID_CHARACTERS_MAX = 512

_LINES_TOGETHER = 256
_WHITESPACE = b" \t\r"
_OPERATIONS = ("index", "create", "update", "delete")
_TAKEN = ("index", "create")
_USUAL = frozenset({b'{"index":{', b'{"create":{'})
_NO_ID = (None, "")
_CREATED = b"201}}"
_encode = msgspec.json.encode


class BulkError(ValueError):
    """A body that cannot be read any further; its text is for the client."""


class TooManyDocuments(ValueError):  # noqa: N818
    """A body with more documents than its bound."""


class BulkPart(NamedTuple):
    """The records of a body that go to one pipeline.

    Attributes:
        to: its name; empty for that of the endpoint.
        parsed: the records.
        ids: of those that the client named; `None` if it named none.
        places: of the records among the items of the answer.
    """

    to: str
    parsed: Parsed
    ids: SenderIds | None
    places: Sequence[int]


class Bulk(NamedTuple):
    """A body as it was read.

    Attributes:
        parts: one a pipeline; none if nothing is a record.
        answer: to it, if all parts are accepted.
        items: of that answer, one an action, where there are several parts.
    """

    parts: Sequence[BulkPart]
    answer: bytes
    items: Sequence[bytes] = ()


def make_answer(items: bytes, *, errors: bool) -> bytes:
    """The body of an answer; clients look for the very words."""
    return b'{"took":0,"errors":%b,"items":[%b]}' % (b"true" if errors else b"false", items)


def fail(item: bytes, status: int, kind: str, reason: str) -> bytes:
    """The item of an action that failed after all, from that of one that was done."""
    error = {"type": kind, "reason": reason} if reason else {"type": kind}
    return b'%b%d,"error":%b}}' % (item.removesuffix(_CREATED), status, _encode(error))


def _name(item: bytes, document: bytes) -> bytes:
    """The id of a record, from its item, and the document where that may be changed under an id."""
    return blake2b(item + document, digest_size=ID_BYTES).digest()


def ids_of(names: Sequence[bytes]) -> SenderIds | None:
    """The ids of records by their names, `ID_BYTES` long or empty; `None` if there are none."""
    known = frozenset(names) - {b""}
    return SenderIds(tuple(names), known) if known else None


# -- actions ---------------------------------------------------------------------------------------


class _ActionLine(msgspec.Struct):
    index: Raw | UnsetType = UNSET
    create: Raw | UnsetType = UNSET
    update: Raw | UnsetType = UNSET
    delete: Raw | UnsetType = UNSET


class _Metadata(msgspec.Struct):
    index: str | None = msgspec.field(default=None, name="_index")
    id: str | int | float | None = msgspec.field(default=None, name="_id")


class _UsualLine(msgspec.Struct):
    index: _Metadata | None = None
    create: _Metadata | None = None


_read_line = msgspec.json.Decoder(_ActionLine).decode
_read_metadata = msgspec.json.Decoder(_Metadata).decode
_read_usual = msgspec.json.Decoder(_UsualLine).decode_lines


class _Action(NamedTuple):
    """An action line as it was read.

    Attributes:
        op: its operation.
        to: the pipeline of its document.
        has_id: it names the document.
        before: what stands in the record in place of the document's first brace.
        item: its item of the answer, up to the status.
    """

    op: str
    to: str
    has_id: bool
    before: bytes
    item: bytes


class BulkReader:
    """Reads bodies that were sent to one path.

    Args:
        index: of the path; empty if it has none.
        field: of records, for what their actions say; empty if they have none.
        find: gives the pipeline of an index; empty for that of the endpoint.
        bounds: gives for a pipeline the bytes of a record, and how deeply it is nested, at most.
        records_max: actions of a body at most.
        names_versions: an indexed document has an id as well, of its name and content.
    """

    def __init__(
        self,
        index: str,
        field: str,
        *,
        find: Callable[[str], str],
        bounds: Callable[[str], tuple[int, int]],
        records_max: int,
        names_versions: bool = False,
    ) -> None:
        self._index = index
        self._path_index = b'"_index":%b,' % _encode(index) if index else b""
        self._field = b"{%b:{" % _encode(field) if field else b""
        self._find = find
        self._bounds = bounds
        self._records_max = records_max
        self._names_versions = names_versions

    def read(self, body: bytes) -> Bulk:
        """Reads any body.

        Raises:
            BulkError: where one action line ends and the next begins can't be told.
            TooManyDocuments: there are more than the bound.
        """
        if b"\r\n" in body:
            body = body.replace(b"\r\n", b"\n")
        if bulk := self._cut_same(body):
            return bulk
        if body.count(b"\n") > 2 * self._records_max + 1:
            raise TooManyDocuments
        return self._cut_usual(body) or self._walk(body)

    def read_quickly(self, body: bytes) -> Bulk | None:
        """Reads a body if that takes a few milliseconds at most."""
        bulk = self._cut_same(body)
        if bulk is None and body.count(b"\n") <= min(QUICK_LINES, 2 * self._records_max):
            bulk = self._cut_usual(body)
        return bulk

    def _action(self, line: bytes) -> _Action:
        """Reads an action line.

        Raises:
            BulkError: it is none, and why.
        """
        try:
            read = _read_line(line)
            (op,) = [name for name in _OPERATIONS if getattr(read, name) is not UNSET]
            said = bytes(getattr(read, op))
            metadata = _read_metadata(said)
            line.decode()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            wanted = "an object with one of index, create, update and delete is expected"
            raise BulkError(wanted) from None
        if is_deeper(line, DEPTH_MAX):  # the answer repeats it, in more levels
            raise BulkError(f"it is nested deeper than {DEPTH_MAX} levels")
        members = said.strip()[1:-1].strip()
        if metadata.index is None:
            members = (self._path_index + members).removesuffix(b",")
        index = metadata.index or self._index
        if _is_long(metadata):
            raise BulkError("its _index or its _id is too long")
        item = b'{"%b":{%b%b"status":' % (op.encode(), members, b"," if members else b"")
        before = self._field + members + b"}," if self._field and members else b"{"
        return _Action(op, self._find(index), metadata.id not in _NO_ID, before, item)

    # -- as a whole ----------------------------------------------------------------------------

    def _cut_same(self, body: bytes) -> Bulk | None:
        """Cuts a body of good documents behind the same action line each; `None` of any other.

        Wherever that line and the brace of a document are, the record's beginning is put. What
        was put stands at the beginnings of lines and never twice in a row: as often as there are
        lines afterwards, it was at each first line of a pair.
        """
        end = body.find(b"\n")
        line = b"\n%b\n{" % body[:end]
        if end < 0 or not body.startswith(line[1:]):
            return None
        second = body.find(b"\n", end + 1)
        if 0 <= second < len(body) - 1 and not body.startswith(line, second):
            return None
        try:
            action = self._action(body[:end])
        except BulkError:
            return None
        put = b"\n" + action.before
        if action.op not in _TAKEN or action.has_id or len(line) == len(put):
            return None
        body = b"\n%b%b" % (body, b"" if body.endswith(b"\n") else b"\n")
        payload = body.replace(line, put)[1:]
        parsed = parse_canonical(payload, *self._bounds(action.to))
        if parsed is None or parsed.total > self._records_max:
            return None
        count = parsed.total
        if len(body) - 1 - len(payload) != count * (len(line) - len(put)):
            return None
        answer = make_answer(b",".join([action.item + _CREATED] * count), errors=False)
        return Bulk((BulkPart(action.to, parsed, None, range(count)),), answer)

    def _cut_usual(self, body: bytes) -> Bulk | None:
        """Cuts a body of good documents with action lines as most clients write them.

        All are of one operation and without white space, `{"index":{…}}`, with no braces between
        these: so each line is one value, and what is between the braces stands in the record and in
        the answer as it came. Returns `None` of any other body.
        """
        lines = body.split(b"\n")
        if not lines[-1]:
            lines.pop()
        said, documents = lines[::2], lines[1::2]
        count = len(said)
        if not count or count != len(documents) or count > self._records_max:
            return None
        del lines
        start = said[0][: said[0].find(b":") + 2]
        metadata = _read_metadata_of(said, start)
        if metadata is None or any(document[:1] != b"{" for document in documents):
            return None
        indexes = {one.index for one in metadata}
        if None in indexes and len(indexes) > 1 and self._path_index:
            return None  # the path's stands before some lines alone
        more = self._path_index if None in indexes else b""
        before = start + more
        members = [line[len(start) : -2] for line in said]
        items = [b'%b%b,"status":201}}' % (before, one) for one in members]
        names: Sequence[bytes] = ()
        if self._names_versions or start != b'{"index":{':
            names = _names_of(metadata, items, documents, grows=start == b'{"index":{')
        if self._field:
            before = self._field + more
            documents = [
                b"%b%b},%b" % (before, one, document[1:])
                for one, document in zip(members, documents, strict=True)
            ]
        targets = {index: self._find(index or self._index) for index in indexes}
        to = [targets[one.index] for one in metadata] if len(set(targets.values())) > 1 else []
        parts = self._parts(names, documents, to or [targets.popitem()[1]])
        if parts is None:
            return None
        return Bulk(parts, make_answer(b",".join(items), errors=False), items if to else ())

    def _parts(
        self, names: Sequence[bytes], records: Sequence[bytes], to: Sequence[str]
    ) -> Sequence[BulkPart] | None:
        """Records by pipeline; `None` if one is not good, or a name comes twice."""
        groups: dict[str, Sequence[int]] = {to[0]: range(len(records))}
        if len(to) > 1:
            places: dict[str, list[int]] = {}
            for place, name in enumerate(to):
                places.setdefault(name, []).append(place)
            groups = dict(places)
        parts = []
        for name, mine in groups.items():
            some, ids = records, names
            if len(groups) > 1:
                some = [records[place] for place in mine]
                ids = names and [names[place] for place in mine]
            parsed = parse_canonical(b"\n".join([*some, b""]), *self._bounds(name))
            known = ids_of(ids)
            if parsed is None or parsed.total != len(some):
                return None
            if known is not None and len(known.known) + ids.count(b"") < len(some):
                return None
            parts.append(BulkPart(name, parsed, known, mine))
        return parts

    # -- line by line --------------------------------------------------------------------------

    def _walk(self, body: bytes) -> Bulk:
        """Reads a body line by line."""
        walk = _Walk(self._bounds, names_versions=self._names_versions)
        known: dict[bytes, _Action] = {}
        lines = enumerate(body.split(b"\n"), 1)
        for number, line in lines:
            if not number % _LINES_TOGETHER:
                let_loop_go_first()
            if not line.strip(_WHITESPACE):
                continue
            action = known.get(line)
            if action is None:
                try:
                    action = known[line] = self._action(line)
                except BulkError as error:
                    text = f"Malformed action/metadata line [{number}]: {error}"
                    raise BulkError(text) from None
            if len(walk.items) >= self._records_max:
                raise TooManyDocuments
            if action.op == "delete":
                walk.refuse(action)
                continue
            document = next(lines, (0, b""))[1].strip(_WHITESPACE)
            if not document:
                raise BulkError(f"the action of line [{number}] has no document behind it")
            if action.op == "update":
                walk.refuse(action)
            else:
                walk.take(action, document)
        if not walk.items:
            raise BulkError("request body is required")
        return walk.bulk()


def _read_metadata_of(said: Sequence[bytes], start: bytes) -> list[_Metadata] | None:
    """Metadata of action lines; `None` if not all of them are as `_cut_usual` has them."""
    count = len(said)
    together = b"\n%b\n" % b"\n".join(said)
    if (
        start not in _USUAL
        or together.count(b"\n" + start) != count
        or together.count(b"}}\n") != count
        or together.count(b"}") != 2 * count
        or b"{}" in together
    ):
        return None
    try:
        read = _read_usual(together)
        if not together.isascii():
            together.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if b"[" in together and is_deeper(together, DEPTH_MAX):
        return None
    if start == b'{"index":{':
        metadata = [one.index for one in read]
    else:
        metadata = [one.create for one in read]
    found = [one for one in metadata if one is not None]
    return found if len(found) == count and not any(map(_is_long, found)) else None


def _is_long(metadata: _Metadata) -> bool:
    if metadata.index is not None and len(metadata.index) > INDEX_CHARACTERS_MAX:
        return True
    return len(str(metadata.id)) > ID_CHARACTERS_MAX


def _names_of(
    metadata: Sequence[_Metadata],
    items: Sequence[bytes],
    documents: Sequence[bytes],
    *,
    grows: bool,
) -> Sequence[bytes]:
    """Names of documents, as `_name` makes them; nothing if clients call none by a name."""
    if all(one.id in _NO_ID for one in metadata):
        return ()
    return [
        b"" if one.id in _NO_ID else _name(item, document if grows else b"")
        for one, item, document in zip(metadata, items, documents, strict=True)
    ]


class PartBuilder:
    """Collects the records of a body that go to one pipeline.

    Attributes:
        records: the good ones.
        names: what their sender calls them, see `ids_of`.
        known: these.
        places: see `BulkPart`.
    """

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.names: list[bytes] = []
        self.known: set[bytes] = set()
        self.places: list[int] = []
        self._refused: list[InvalidRecord] = []
        self._unlisted = 0

    @property
    def total(self) -> int:
        """Good and invalid records so far."""
        return len(self.records) + len(self._refused) + self._unlisted

    def refuse(self, reason: str, detail: str, record: bytes) -> None:
        """Adds an invalid record; many of them are only counted."""
        if len(self._refused) < LISTED_MAX:
            one = InvalidRecord(self.total, reason, detail, record[:KEPT_BYTES])
            self._refused.append(one)
        else:
            self._unlisted += 1

    def parsed(self) -> Parsed:
        """The records."""
        if any(b"\n" in record for record in self.records):
            records = Records.sized(self.records)
        else:
            records = Records.lines(self.records)
        return Parsed(records, self._refused, self._unlisted)


class _Walk:
    """Collects what line by line became of a body.

    Args:
        bounds: see `BulkReader`.
        names_versions: see `BulkReader`.

    Attributes:
        items: of the answer.
    """

    def __init__(self, bounds: Callable[[str], tuple[int, int]], *, names_versions: bool) -> None:
        self.items: list[bytes] = []
        self._names_versions = names_versions
        self._bounds = bounds
        self._errors = 0
        self._groups: dict[str, PartBuilder] = {}

    def _fail(self, action: _Action, status: int, kind: str, reason: str) -> None:
        self._errors += 1
        # The answer must not become many times as long as the body.
        listed = reason if self._errors <= LISTED_MAX else ""
        self.items.append(fail(action.item, status, kind, listed))

    def refuse(self, action: _Action) -> None:
        """An action that is not done here."""
        reason = f"[{action.op}] is not supported: documents are only added"
        self._fail(action, 400, "illegal_argument_exception", reason)

    def take(self, action: _Action, document: bytes) -> None:
        """A document that is to be added."""
        record_bytes_max, depth_max = self._bounds(action.to)
        group = self._groups.setdefault(action.to, PartBuilder())
        record = _put_before(action.before, document)
        if len(record) > record_bytes_max:
            detail = f"{len(record)} bytes, more than record_bytes_max = {record_bytes_max}"
            group.refuse("too_large", detail, record)
            self._fail(action, 413, "content_too_long_exception", detail)
            return
        if detail := json_fault(record, depth_max):
            detail = json_fault(document, depth_max) or detail
        elif document[:1] != b"{":
            detail = "the document is not an object"
        if detail:
            group.refuse("malformed", detail, record)
            self._fail(action, 400, "document_parsing_exception", f"failed to parse: {detail}")
            return
        item = action.item + _CREATED
        name = b""
        if action.has_id and (self._names_versions or action.op == "create"):
            name = _name(item, document if action.op == "index" else b"")
        group.places.append(len(self.items))
        self.items.append(item)
        if name and name in group.known:
            return  # it comes again in one body, and is one record
        group.known.add(name)
        group.names.append(name)
        group.records.append(record)

    def bulk(self) -> Bulk:
        """The whole."""
        answer = make_answer(b",".join(self.items), errors=self._errors > 0)
        parts = [
            BulkPart(to, group.parsed(), ids_of(group.names), group.places)
            for to, group in self._groups.items()
        ]
        return Bulk(parts, answer, self.items if len(parts) > 1 else ())


def _put_before(before: bytes, document: bytes) -> bytes:
    """A document with what stands in place of its first brace; as it is if it is no object."""
    if before == b"{" or document[:1] != b"{":
        return document
    rest = document[1:].lstrip(_WHITESPACE)
    if rest[:1] == b"}":
        return before.removesuffix(b",") + rest
    return before + document[1:]
