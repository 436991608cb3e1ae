"""The sink `http` sends batches to an HTTP service, with the batch's id as `Idempotency-Key`.

A batch is one request. It is cut in halves, always at the same places, where it is larger than
`request_bytes_max` or where the answer refuses it whole (400, 413, 422); such a part has a key of
its own, made of the batch's id and its place. So the same records always come under the same key.
Only where another service than ingestd refuses a part without a look at it (429, 503, 401, …), that
and those behind it come again as another batch: else those before it would come again, too.

What is exactly once with another ingestd, and by what:

* A batch that comes again is the same request under the same key, and gets the answer that is
  stored with its records: the invalid records in it are the same, too, and are rejected again.
* A part of a batch that was split first asks for each ancestor: a request without a body under the
  ancestor's key. It can never be accepted, and 422 `idempotency-key-reused` says that the key is
  stored.
* An answer lists 100 invalid records at most. The others are found by requests that cannot be
  accepted either: with `Prefer: handling=strict` and one record that is known to be invalid.
"""

from __future__ import annotations

import gzip
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ingestd import __version__
from ingestd.base.record import Layout, Records
from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Seconds, Secret, Size
from ingestd.handlers.outcome import RetryRequest, SinkFinding
from ingestd.handlers.text import plain
from ingestd.http.signatures import signature_headers, signing_key
from ingestd.sinks.base import TlsOptions
from ingestd.sinks.connection import HttpAnswer, HttpConnection, target_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_MIB = 1024**2
_SOON = 5.0  # seconds after which a service that is down is asked again anyway
_FAILURES_IN_A_ROW = 3  # single records; then the other side is down
_OF_RECORDS = frozenset({400, 413, 422})
_LATER = frozenset({408, 425, 429, 502, 503, 504, 507})
_SERVER_BLOCKS = frozenset({501, 505, 511})
_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection"})
_CANONICAL = {name.lower(): name for name in ("User-Agent", "Content-Type")}
_BREAKS_TO_SPACES = bytes.maketrans(b"\n\r", b"  ")
_TYPES = {
    "ndjson": {"json": "application/x-ndjson", "text": "text/plain"},
    "array": {"json": "application/json", "text": "application/json"},
    "record": {
        "json": "application/json",
        "text": "text/plain",
        "bytes": "application/octet-stream",
    },
}
_HERE = Context()


class HttpFailed(Exception):  # noqa: N818  it names what happened
    """The service answered with an error that may be any record's; the try counts."""


class _Refused(Unavailable):
    """The service has not taken the request: 429, or 503."""


class HttpSinkOptions(TlsOptions, frozen=True, kw_only=True):
    """Options of the sink `http`."""

    url: Annotated[str, Meta(description="http or https URL; no secret belongs in it")]
    body: Annotated[
        Literal["auto", "ndjson", "array", "record"],
        Meta(
            description="ndjson: a record a line; array: one JSON array; record: a request for each"
            " record; auto: ndjson, with bytes record"
        ),
    ] = "auto"
    method: Annotated[
        Literal["POST", "PUT", "PATCH"], Meta(description="method of the requests")
    ] = "POST"
    content_type: Annotated[
        str | None, Meta(description="Content-Type; default what suits `body` and the format")
    ] = None
    compress: Annotated[
        Literal["none", "gzip", "zstd"], Meta(description="Content-Encoding of the requests")
    ] = "none"
    request_bytes_max: Annotated[
        Size, Meta(description="a batch is cut in halves until each body is at most this long")
    ] = Size(8 * _MIB)
    token: Annotated[
        Secret | None, Meta(description="sent as `Authorization: Bearer`, or as `token_header`")
    ] = None
    token_header: Annotated[
        str, Meta(description="header of the token; other than Authorization without `Bearer`")
    ] = "Authorization"  # noqa: S105  a name
    headers: Annotated[
        dict[str, str], Meta(description="further request headers; no secret belongs in them")
    ] = msgspec.field(default_factory=dict)
    idempotency_header: Annotated[
        str, Meta(description="header of the batch's id; empty for none")
    ] = "Idempotency-Key"
    on_conflict: Annotated[
        Literal["retry", "done"],
        Meta(description="done: an answer 409 without Retry-After means that it is there already"),
    ] = "retry"
    sign: Annotated[
        Secret | None,
        Meta(description="secret of Standard Webhooks signatures, `whsec_` and base64"),
    ] = None
    connect_timeout: Annotated[Seconds, Meta(description="timeout of connecting, TLS included")] = (
        Seconds(10)
    )
    timeout: Annotated[
        Seconds, Meta(description="timeout of a request, from its first byte to the whole answer")
    ] = Seconds(30)
    allow_private: Annotated[
        bool, Meta(description="allow private, loopback and other special addresses")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        target_of(self.url)
        named: set[str] = set()
        for name, value in self.headers.items():
            if not _is_header(name, value):
                raise ValueError(f"headers: {name!r} is not a header")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"headers: {name} is the client's own")
            if name.lower() in named | self._named_by_options():
                raise ValueError(f"headers: {name} is there twice, or an option sets it")
            named.add(name.lower())
        for option in ("token_header", "idempotency_header", "content_type"):
            value = getattr(self, option)
            if value and not _is_header("x" if option == "content_type" else value, value):
                raise ValueError(f"{option}: {value!r} is not possible in a header")
        if self.token is not None and not _is_header("x", self.token):
            raise ValueError("token: it is not possible in a header")
        if self.sign is not None:
            try:
                signing_key(self.sign)
            except ValueError as error:
                raise ValueError(f"sign: {error}") from None
        for option in ("connect_timeout", "timeout"):
            if not getattr(self, option):
                raise ValueError(f"{option}: it has to be longer than 0s")

    def _named_by_options(self) -> set[str]:
        """The headers, in lower case, that options set."""
        found = {self.idempotency_header.lower()}
        if self.content_type:
            found.add("content-type")
        if self.compress != "none":
            found.add("content-encoding")
        if self.token is not None:
            found.add(self.token_header.lower())
        if self.sign is not None:
            found |= {"webhook-id", "webhook-timestamp", "webhook-signature"}
        return found


class HttpSink:
    """Sends each batch in a request and waits for the answer.

    Any number of these, in threads and processes, may send to one service; each keeps a connection.
    """

    def __init__(self, options: HttpSinkOptions, context: Context = _HERE) -> None:
        self._options = options
        self._format = context.record_format
        self._body = options.body
        if self._body == "auto":
            self._body = "record" if self._format == "bytes" else "ndjson"
        types = _TYPES[self._body]
        if self._format not in types:
            raise ValueError(f'body: "{self._body}" cannot hold bytes; take "record"')
        self._headers = {
            "User-Agent": f"ingestd/{__version__}",
            "Content-Type": options.content_type or types[self._format],
        }
        for name, value in options.headers.items():  # in any case they take the place of the two
            self._headers[_CANONICAL.get(name.lower(), name)] = value
        if options.compress != "none":
            self._headers["Content-Encoding"] = options.compress
        if options.token is not None:
            bearer = options.token_header.lower() == "authorization"
            self._headers[options.token_header] = ("Bearer " if bearer else "") + options.token
        self._signing = None if options.sign is None else signing_key(options.sign)
        self._client = HttpConnection(
            target_of(options.url),
            connect_timeout=options.connect_timeout,
            timeout=options.timeout,
            allow_private=options.allow_private,
            truncates=True,  # what an API tells after its status is its own
            tls=options.tls_files,
        )
        self._ingestd: bool | None = None  # not known yet

    def __call__(self, batch: Batch[bytes]) -> None:
        """Sends the batch, whole or in parts.

        Raises:
            Unavailable: the service is down or overloaded, and perhaps says when to come again.
            Blocked: the service, the path or the token is wrong.
            HttpFailed: the service has an error.
        """
        if batch.lineage and self._is_stored(batch):
            return
        count = batch.records.count
        one_by_one = self._body == "record"
        left = [(i, 1) for i in reversed(range(count))] if one_by_one else [(0, count)]
        settled, in_a_row = 0, 0
        failed: list[tuple[int, int, Exception]] = []
        while left:
            first, size = left.pop()
            try:
                if self._settle(batch, first, size):
                    settled, in_a_row = settled + 1, 0
                    continue
            except (Unavailable, HttpFailed, Blocked) as error:
                if not one_by_one and not (settled and self._goes_on_from(error)):
                    raise  # each part has its key: those that are there cost a look next time
                in_a_row += 1
                failed.append((first, size, error))
                if not one_by_one or in_a_row == _FAILURES_IN_A_ROW or isinstance(error, Blocked):
                    failed += [(*part, error) for part in left]
                    left = []
                continue
            half = (size + 1) // 2
            left += [(first + half, size - half), (first, half)]
        if failed and not settled:
            raise failed[0][2]
        for first, size, why in failed:
            after, at_fault = getattr(why, "after", None), isinstance(why, HttpFailed)
            text = plain(str(why))
            for place in range(first, first + size):
                batch.adopt(RetryRequest(place, after, text, not at_fault))

    def _goes_on_from(self, error: Exception) -> bool:
        """Tells if the parts behind one that failed come again without those before it.

        Another ingestd knows those before it by their keys. Others would get them with each try,
        and none behind them as long as a limit of theirs has no room for all.
        """
        return isinstance(error, Blocked | _Refused) and not self._ingestd

    def check(self) -> Iterator[SinkFinding]:
        """Findings: the service answers, has the path, takes the token and keeps keys."""
        options, target = self._options, self._client.target
        if options.token is not None and not target.secure and not options.allow_private:
            yield SinkFinding("warning", "the token is sent without encryption: take https")
        if self._is_ingestd():
            answer = self._send(b"", "ingestd-check")
            if answer.problem not in {"empty", "malformed"}:
                self._refuse(answer)
            yield SinkFinding("info", f"{target.shown} is an ingestd, which keeps keys")
            return
        answer = self._client.send("OPTIONS", b"", self._headers)
        if answer.status in {401, 403, 404, 410} or answer.status // 100 == 3:
            self._refuse(answer)
        yield SinkFinding(
            "info",
            f"{target.shown} answers ({answer.status} to OPTIONS); exactly once if it keeps"
            f" {options.idempotency_header or 'the record ids'}",
        )

    def close(self) -> None:
        """Closes the connection; the next batch opens it again."""
        self._client.close()

    # -- one request ---------------------------------------------------------------------------

    def _settle(self, batch: Batch[bytes], first: int, count: int) -> bool:
        """Sends some records under their key; False if they have to come in halves."""
        raw = self._rendered(batch.records.part(first, count))
        if len(raw) > self._options.request_bytes_max and count > 1:
            return False
        answer = self._send(raw, self._key(batch, first, count))
        status, problem = answer.status, answer.problem
        if status // 100 == 2:
            self._reject_listed(batch, first, count, answer)
            return True
        if problem == "idempotency-key-reused" and answer.retry_after is None:
            # It was sent with other options, or another version compressed it.
            self._ingestd = True
            self._reject_unlisted(batch, first, count)
            return True
        if status == 409 and answer.retry_after is None and self._options.on_conflict == "done":
            return True
        if status not in _OF_RECORDS or problem.startswith("idempotency-"):
            self._refuse(answer)
        if problem in {"malformed", "record-too-large"}:  # no record of it can be accepted
            listed, why = dict(_listed(answer.document)), str(answer)
            for i in range(count):
                batch.reject(first + i, listed.get(i, why))
            return True
        if count > 1:
            return False
        batch.reject(first, str(answer))
        return True

    def _key(self, batch: Batch[bytes], first: int, count: int) -> str:
        if self._body == "record":
            return batch.ids[first]
        return batch.id if count == batch.records.count else f"{batch.id}.{first}+{count}"

    def _send(self, raw: bytes, key: str, more: Mapping[str, str] | None = None) -> HttpAnswer:
        headers, options = dict(self._headers), self._options
        if options.compress == "gzip":
            raw = gzip.compress(raw, 6, mtime=0)  # the same bytes whenever it is sent
        elif options.compress == "zstd":
            raw = zstd.compress(raw)
        if key and options.idempotency_header:
            headers[options.idempotency_header] = f'"{key}"'
        if self._signing is not None:
            headers |= signature_headers(self._signing, key or "ingestd", time.time(), raw)
        return self._client.send(options.method, raw, headers | dict(more or {}))

    def _rendered(self, records: Records) -> bytes:
        if self._body == "record":
            return records.items()[0]
        if self._format == "json":
            if records.layout is not Layout.LINES:
                records = Records.lines([self._line(item) for item in records.items()])
            if self._body == "ndjson":
                return records.payload
            return b"[%b]" % records.payload[:-1].replace(b"\n", b",")
        if self._body == "ndjson":
            return records.payload
        return b"[%b]" % b",".join([self._line(item) for item in records.items()])

    def _line(self, item: bytes) -> bytes:
        """A record as a line of its own."""
        if self._format == "json":
            return item.translate(_BREAKS_TO_SPACES)
        return (
            item if self._body == "ndjson" else msgspec.json.encode(item.decode(errors="replace"))
        )

    def _refuse(self, answer: HttpAnswer) -> None:
        """Raises what an answer means that is about no record."""
        status, told = answer.status, f"{self._client.target.shown}: {answer}"
        after = answer.retry_after
        if status == 409 or answer.problem.startswith("idempotency-key-"):
            raise Unavailable(told)  # another try of it is in progress, which is soon over
        kind = _Refused if status in {429, 503} else Unavailable
        if after is not None and status >= 400 and (status == 429 or after > _SOON):
            raise kind(told, after)
        if status in _LATER or status > 511:
            raise kind(told)
        if status >= 500 and status not in _SERVER_BLOCKS:
            raise HttpFailed(told)
        if status // 100 == 3:
            told += ": redirects are not followed; write the URL it leads to"
        raise Blocked(told)

    # -- what another ingestd says -------------------------------------------------------------

    def _is_ingestd(self) -> bool:
        """Tells if the service is an ingestd, by its answer to a GET, which it has none for.

        A proxy in front of an ingestd that is away tells nothing, so it is asked again then.
        """
        if self._ingestd is None:
            answer = self._client.send("GET", b"", {"User-Agent": self._headers["User-Agent"]})
            if answer.problem:
                self._ingestd = True
            elif answer.status in _LATER:
                self._refuse(answer)
            elif answer.status < 500 and answer.status != 404:
                self._ingestd = False
        return bool(self._ingestd)

    def _is_stored(self, batch: Batch[bytes]) -> bool:
        """Tells if an ancestor of a batch was accepted; then rejects what was invalid in it."""
        if self._body == "record" or not self._is_ingestd():
            return False
        for name in batch.lineage:
            answer = self._ask(name)
            if answer.problem == "idempotency-key-reused" and answer.retry_after is None:
                self._reject_unlisted(batch, 0, batch.records.count)
                return True
            if answer.problem not in {"empty", "malformed"}:
                self._refuse(answer)
        return False

    def _ask(self, name: str) -> HttpAnswer:
        """The answer to a request without a body under a key; waits while another one has it."""
        for wait in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
            answer = self._send(b"", name)
            if not answer.problem.startswith("idempotency-key-") or answer.retry_after is None:
                return answer
            # Parts of one batch ask at the same time, or a request of the batch is not done yet.
            time.sleep(wait)
        raise Unavailable(f"{self._client.target.shown}: {answer}")

    def _reject_listed(
        self, batch: Batch[bytes], first: int, count: int, answer: HttpAnswer
    ) -> None:
        """Rejects the records that a 2xx of another ingestd calls invalid."""
        document = answer.document
        invalid, accepted = document.get("invalid"), document.get("accepted")
        if not isinstance(invalid, int) or not isinstance(accepted, int):
            self._ingestd = False
            return
        self._ingestd = True
        if invalid + accepted != count:
            return
        listed = [one for one in _listed(document) if one[0] < count]
        for i, why in listed:
            batch.reject(first + i, why)
        if 0 < len(listed) < invalid:
            last = listed[-1][0]
            known = batch.records.part(first + last, 1)
            self._reject_unlisted(batch, first + last + 1, count - last - 1, known)

    def _reject_unlisted(
        self, batch: Batch[bytes], first: int, count: int, known: Records | None = None
    ) -> None:
        """Finds the invalid records among accepted ones, and rejects them.

        Args:
            batch: all records.
            first: the first of them that may be invalid.
            count: of them.
            known: a record that is invalid, so that nothing of the request can be accepted.
        """
        kind = "json" if self._body == "array" else self._format
        if known is None and kind != "json":
            return  # no record of text or bytes is invalid for what is in it
        # A record is invalid by a bound of the receiver, perhaps, which another start may raise.
        last = b"{" if known is None or kind == "json" else self._line(known.items()[0])
        # As lines: a record that is not JSON would be the end of an array.
        headers = {"Prefer": "handling=strict", "Content-Type": _TYPES["ndjson"][kind]}
        end = first + count
        while first < end:
            some = [self._line(item) for item in batch.records.part(first, end - first).items()]
            answer = self._send(Records.lines([*some, last]).payload, "", headers)
            listed = [one for one in _listed(answer.document) if one[0] < end - first]
            if answer.status != 400 or not _listed(answer.document):
                self._refuse(answer)
            for i, why in listed:
                batch.reject(first + i, why)
            if len(_listed(answer.document)) > len(listed) or not listed:
                return  # the last one is the known one: there are no more
            first += listed[-1][0] + 1


def _is_header(name: str, value: str) -> bool:
    token = name.replace("-", "").replace("_", "")
    return token.isascii() and token.isalnum() and value.isprintable() and value.isascii()


def _listed(document: dict[str, Any]) -> Sequence[tuple[int, str]]:
    """Invalid records of an answer, in order: place in the body, and reason."""
    errors = document.get("errors")
    return sorted(
        (one["index"], f"{one.get('reason', '')}: {one.get('detail', '')}")
        for one in (errors if isinstance(errors, list) else [])
        if isinstance(one, dict) and isinstance(one.get("index"), int) and one["index"] >= 0
    )
