"""Syslog messages as JSON objects: RFC 5424, RFC 3164, and what devices send in their place.

A block of messages is parsed by one pattern in one go, on bytes that were escaped for JSON before:
a message in a usual form costs one match and one format. A message that the pattern does not know
is taken apart by itself, from the left: what is understood becomes fields, the rest is `message`.
No message is refused, and nothing of one is lost: bytes that are not UTF-8 are replaced, and then
`raw_base64` has the message as it came.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import msgspec

from ingestd.base.bursts import let_loop_go_first
from ingestd.codecs.lines import BOM, whole_lines

if TYPE_CHECKING:
    from collections.abc import Callable

FACILITIES = (
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv",
    "ftp", "ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4",
    "local5", "local6", "local7",
)  # fmt: skip
"""Names by code (RFC 5424, 6.2.1, as rsyslog and syslog-ng write them)."""
SEVERITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
"""Names by code."""
_PIECE_BYTES = 64 * 1024
_CACHED_MAX = 4096
_CACHED_BYTES = 256
_LF = b"\\n"
_MONTH_NAMES = "JanFebMarAprMayJunJulAugSepOctNovDec"
_AHEAD = timedelta(days=31)
"""A time without a year that would be further ahead is of the year before."""
_BEHIND = timedelta(days=334)
"""One that would be further behind is of the next year: the sender's clock is ahead."""

_NO_PRIORITY = b'"facility":null,"facility_code":null,"severity":null,"severity_code":null'
_PRIORITIES = {
    b"%d" % (8 * f + s): (
        b'"facility":"%b","facility_code":%d,"severity":"%b","severity_code":%d'
        % (facility.encode(), f, severity.encode(), s)
    )
    for f, facility in enumerate(FACILITIES)
    for s, severity in enumerate(SEVERITIES)
}

_PRIORITY = r"<(19[01]|1[0-8]\d|[1-9]?\d)>"
_ISO = r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d(?:\.\d{1,9})?(?:Z|[+-][0-2]\d:[0-5]\d)"
_BSD = r"[A-Z][a-z][a-z] [ \d]\d [0-2]\d:[0-5]\d:[0-6]\d"
# On text that was escaped for JSON: a backslash is two, a quote has one before it.
_ELEMENTS = r"(?:\[(?:[^\]\\\n]++|\\[^\\\n]|\\\\(?:\\\\|\\\"|[^\\\n]))*+\])++"
# What `_TAG` takes, but for a mnemonic of Cisco's.
_NAME = r'(?!%)[^\s:\[\]<>"\\\'=(){}]{1,128}+(?:\[[^\]\s"\\]{0,128}+\])?+'
_USUAL = re.compile(
    rf"^(?:{_PRIORITY}(?:1 ({_ISO}|-) (\S+ \S+ \S+ \S+) (-|{_ELEMENTS})(?: (.*))?|"
    rf"({_BSD}|{_ISO}) ([\w.-]++ {_NAME}):(?: |(?![/:\d]))(.*))|(.+))$".encode(),
    re.MULTILINE,
)
_OBJECT5 = b'{"format":"rfc5424",%b,"timestamp":%b,%b,"structured_data":%b,"message":"%b"'
_OBJECT3 = b'{"format":"rfc3164",%b,"timestamp":%b,%b,"structured_data":{},"message":"%b"'
_NO_CONTROL = bytes([10, *range(32, 256)])
_ESCAPES = {bytes([n]): b"\\u%04x" % n for n in range(32)} | {b"\t": b"\\t", b"\r": b"\\r"}
_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
_check: Callable[[bytes], Any] = msgspec.json.Decoder(msgspec.Raw).decode
_unescape: Callable[[bytes], str] = msgspec.json.Decoder(str).decode

# -- forms of messages that are looked at by themselves, as text; `\d` is no digit of another script
_PRIORITY_FORM = re.compile(_PRIORITY, re.ASCII)
_ISO_TEXT = (
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?: ?(?:Z|z|UTC|GMT|[+-]\d\d:?\d\d))?"
)
_ISO_FORM = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)([.,]\d{1,9})?(?: ?(Z|z|UTC|GMT|[+-]\d\d:?\d\d))?",
    re.ASCII,
)
_ISO_SENT = re.compile(_ISO, re.ASCII)
_HEADER5 = re.compile(r"\d{1,2} ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ", re.ASCII)
_EPOCH = re.compile(r"1 (\d{10})(\.\d{1,9})? (\S+) ", re.ASCII)
_LEAD = re.compile(r"(?:([0-9]{1,10}): ?)?(?:([\w.-]+): )?:? ?[*.]?")
_TIME = re.compile(
    rf"(?:(?P<iso>{_ISO_TEXT})|"
    r"(?:(?P<before>\d{4}) )?(?P<month>[A-Z][a-z]{2}) {1,2}(?P<day>\d{1,2})"
    r"(?: (?P<behind>\d{4}))? (?P<clock>\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?: (?P<last>\d{4})(?=[ :]))?"
    r"(?: (?P<zone>UTC|GMT|Z|[+-]\d\d:?\d\d|[A-Z]{2,5}(?=:)))?)(?::? |:?$)",
    re.ASCII,
)
# Possessive: the time is linear in a message that is nothing but colons.
_HOST = re.compile(r"([\w.-]++|[0-9a-fA-F:.]++(?<=[0-9a-fA-F]))(?: :)? (?=[^ \t-\r])")
_TAG = re.compile(
    r"([^\s:\[\]<>\"'=(){}]{1,128})(?:\[([^\]\s]{0,128})\])?:(?: |$|(?=[^/:0-9]))", re.ASCII
)
_MNEMONIC = re.compile(r":? ?%([A-Za-z]\w*(?:-\w+)*-[0-7]-\w+)(?:: ?| |$)")
_ELEMENT = re.compile(r'\[([^\s=\]"\[]+)((?: +[^\s=\]"]+="(?:[^"\\]++|\\.)*+")*+) *\]', re.DOTALL)
_PARAM = re.compile(r'([^\s=\]"]+)="((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_QUOTED = re.compile(r'\\(["\\\]])')
_FIELDS = ("timestamp", "hostname", "appname", "procid", "msgid", "structured_data", "message")

Elements = dict[str, dict[str, str | list[str]]]
"""Structured data: the parameters of each element, by its id and their names; a list of values
where a name is there more than once."""


class MessageParser:
    """Parses messages of one source; on any thread.

    Args:
        zone: of times that name none, by its IANA name; empty for that of this machine.
        now: seconds since the epoch.
    """

    def __init__(self, zone: str, now: Callable[[], float]) -> None:
        self._zone: tzinfo | None = ZoneInfo(zone) if zone else None
        self._now = now
        self._hour = 0
        self._stamps: dict[bytes, bytes] = {}
        self._heads: dict[bytes, bytes] = {}

    def parse(self, block: bytes, stand_in: bytes = b"") -> list[bytes]:
        """Returns a JSON object for each line, without its closing brace.

        Args:
            block: messages, each ended by LF and not empty.
            stand_in: a control character that stands for LF in them; empty if none does.
        """
        hour = int(self._now() // 3600)
        if hour != self._hour:
            self._hour, self._stamps = hour, {}  # another day may make another year of a time
        found: list[bytes] = []
        for piece in whole_lines(block, _PIECE_BYTES):
            if len(self._heads) > _CACHED_MAX:
                self._heads = {}
            if len(self._stamps) > _CACHED_MAX:
                self._stamps = {}
            found += self._parse(piece, stand_in)
            let_loop_go_first()
        return found

    def _parse(self, block: bytes, stand_in: bytes) -> list[bytes]:
        marked = False
        if not block.isascii():
            try:
                block.decode()
            except UnicodeDecodeError:
                return [self._unreadable(line, stand_in) for line in block[:-1].split(b"\n")]
            marked = BOM in block
        block = block.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\t", b"\\t")
        if _holds_controls(block):
            escapes = {**_ESCAPES, stand_in: _LF}
            for code in set(block.translate(None, _NO_CONTROL)):
                one = bytes([code])
                block = block.replace(one, escapes[one])
        found: list[bytes] = []
        add, heads, stamps = found.append, self._heads, self._stamps
        # One call, one look for what is known and one format for each message of a usual form.
        lines: list[bytes] = []  # only if one of a usual form has to be looked at by itself
        for pri, time5, names5, data, text, time3, names3, text3, other in _USUAL.findall(block):
            if time5:
                elements = b"{}" if data == b"-" else _structured(data)
                if elements:
                    head = heads.get(names5) or self._head(names5, *names5.split(b" "))
                    add(_OBJECT5 % (
                        _PRIORITIES[pri], b"null" if time5 == b"-" else b'"%b"' % time5, head,
                        elements, text[3:] if marked and text[:3] == BOM else text,
                    ))  # fmt: skip
                else:
                    lines = lines or block.split(b"\n")
                    add(self._again(lines[len(found)]))
            elif time3:
                stamp = stamps.get(time3) or self._stamp(time3)
                if stamp:
                    head = heads.get(names3) or self._head(names3, *_parts_of(names3))
                    add(_OBJECT3 % (_PRIORITIES[pri], stamp, head, text3))
                else:
                    lines = lines or block.split(b"\n")
                    add(self._again(lines[len(found)]))
            else:
                add(self._again(other))
        return found

    def _again(self, escaped: bytes) -> bytes:
        """Makes the object of a message that is escaped already."""
        return self._unusual(_unescape(b'"%b"' % escaped))

    def _head(self, names: bytes, host: bytes, app: bytes, process: bytes, kind: bytes) -> bytes:
        values = [b"null" if one == b"-" else b'"%b"' % one for one in (host, app, process, kind)]
        head = b'"hostname":%b,"appname":%b,"procid":%b,"msgid":%b' % tuple(values)
        if len(names) <= _CACHED_BYTES:
            self._heads[names] = head
        return head

    def _stamp(self, time: bytes) -> bytes:
        """The JSON of a time in a usual form; empty if there is no such time."""
        if time[4:5] == b"-":
            return b'"%b"' % time
        text = time.decode()
        found = self._moment(None, text[:3], text[4:6], text[7:], None)
        if not found:
            return b""
        self._stamps[time] = stamp = b'"%b"' % found.encode()
        return stamp

    # -- messages by themselves ----------------------------------------------------------------

    def _unreadable(self, line: bytes, stand_in: bytes) -> bytes:
        """Makes the object of a message that may be no UTF-8."""
        try:
            line.decode()
        except UnicodeDecodeError:
            line = line.replace(stand_in, b"\n") if stand_in else line
            raw = base64.b64encode(line)
            return b'%b,"raw_base64":"%b"' % (self._unusual(line.decode(errors="replace")), raw)
        return self._parse(line + b"\n", stand_in)[0]

    def _unusual(self, text: str) -> bytes:
        """Makes the object of any message."""
        found = self.understand(text)
        priority = found["priority"]
        return b'{"format":"%b",%b,%b' % (
            found["format"].encode(),
            _NO_PRIORITY if priority is None else _PRIORITIES[priority.encode()],
            _encode({name: found[name] for name in _FIELDS})[1:-1],
        )

    def understand(self, text: str) -> dict[str, Any]:
        """Takes a message apart, from the left, as far as it is understood."""
        priority = _PRIORITY_FORM.match(text)
        rest = text[priority.end() :] if priority else text
        found = priority and (self._rfc5424(rest) or self._epoch(rest))
        if not found:
            found = self._rfc3164(rest, tagged=priority is not None)
        return {
            **dict.fromkeys(_FIELDS),
            "format": "rfc3164" if priority else "other",
            "priority": priority and priority[1],
            "structured_data": {},
            **found,
        }

    def _rfc5424(self, rest: str) -> dict[str, Any] | None:
        found = _HEADER5.match(rest)
        if found is None:
            return None
        time, host, app, process, kind = map(_unless_nil, found.groups())
        stamp = time
        if time and not _ISO_SENT.fullmatch(time) and (stamp := self._iso(time)) is None:
            return None
        rest = rest[found.end() :]
        elements: dict[str, Any] | None = {}
        if rest == "-" or rest.startswith("- "):
            rest = rest[2:]
        elif rest.startswith("["):
            elements, end = parse_elements(rest)
            rest = rest[end:].removeprefix(" ") if end else rest
        return {
            "format": "rfc5424",
            "timestamp": stamp,
            "hostname": host,
            "appname": app,
            "procid": process,
            "msgid": kind,
            "structured_data": elements,
            "message": rest.removeprefix("\ufeff"),
        }

    def _epoch(self, rest: str) -> dict[str, Any] | None:
        """Seconds since the epoch, as Meraki has them: `1 1563249630.774247831 NAME text`."""
        found = _EPOCH.match(rest)
        if found is None:
            return None
        at = datetime.fromtimestamp(int(found[1]), UTC).isoformat().replace("+00:00", "")
        return {
            "timestamp": f"{at}{found[2] or ''}Z",
            "hostname": found[3],
            "message": rest[found.end() :],
        }

    def _rfc3164(self, rest: str, *, tagged: bool) -> dict[str, Any]:
        """Time, host and tag, as far as they are there; times and hosts of Cisco's devices too."""
        known: dict[str, Any] = {}
        lead = _LEAD.match(rest)
        time = _TIME.match(rest, lead.end() if lead else 0)
        stamp = self._time_of(time) if time else None
        if lead and (stamp or _MNEMONIC.match(rest, lead.end())):
            if lead[1]:
                known["structured_data"] = {"cisco": {"sequence": lead[1]}}
            if lead[2]:
                known["hostname"] = lead[2]
            rest = rest[lead.end() :]
            time = _TIME.match(rest)
        if time is not None and stamp:
            known["timestamp"] = stamp
            rest = rest[time.end() :]
            host = _HOST.match(rest)
            if host and "hostname" not in known:
                known["hostname"] = _unless_nil(host[1])
                rest = rest[host.end() :]
        mnemonic = _MNEMONIC.match(rest)
        tag = _TAG.match(rest) if tagged or stamp else None
        if mnemonic:
            known["msgid"] = mnemonic[1]
            rest = rest[mnemonic.end() :]
        elif tag:
            known["appname"], known["procid"] = _unless_nil(tag[1]), _unless_nil(tag[2])
            rest = rest[tag.end() :]
        return {**known, "message": rest}

    # -- times ---------------------------------------------------------------------------------

    def _time_of(self, found: re.Match[str]) -> str | None:
        """The time in a match of `_TIME`; `None` if there is no such time."""
        if found["iso"]:
            return self._iso(found["iso"])
        year = found["before"] or found["behind"] or found["last"]
        return self._moment(year, found["month"], found["day"], found["clock"], found["zone"])

    def _iso(self, text: str) -> str | None:
        """A time of ISO 8601 in the form of RFC 3339; `None` if there is no such time."""
        found = _ISO_FORM.fullmatch(text)
        if found is None:
            return None
        day, clock, fraction, zone = found.groups()
        try:
            at = datetime.fromisoformat(f"{day}T{clock}")
        except ValueError:
            return None
        return self._written(at, fraction, zone)

    def _moment(
        self, year: str | None, month: str, day: str, clock: str, zone: str | None
    ) -> str | None:
        """A time as devices write it; without a year it is the one that is nearest to now."""
        now = datetime.fromtimestamp(self._now(), self._zone).replace(tzinfo=None)
        place = _MONTH_NAMES.find(month)
        clock, _, fraction = clock.partition(".")
        if place % 3:
            return None
        for guess in (int(year),) if year else (now.year, now.year - 1, now.year + 1):
            try:
                at = datetime.fromisoformat(f"{guess:04}-{place // 3 + 1:02}-{int(day):02}T{clock}")
            except ValueError:
                continue
            if year or -_BEHIND < at - now < _AHEAD:
                return self._written(at, f".{fraction}" if fraction else None, zone)
        return None

    def _written(self, at: datetime, fraction: str | None, zone: str | None) -> str:
        """A time in the form of RFC 3339; digits of the second are as they came."""
        if zone in ("Z", "z", "UTC", "GMT"):
            offset = "Z"
        elif zone and zone[0] in "+-":
            offset = zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"
        else:
            offset = self._offset(at).replace("+00:00", "Z")[:6]
        return f"{at.isoformat()}{(fraction or '').replace(',', '.')}{offset}"

    def _offset(self, at: datetime) -> str:
        """The offset of local time in the form of ISO 8601."""
        if self._zone:
            return at.replace(tzinfo=self._zone).isoformat()[19:]
        try:
            return at.astimezone().isoformat()[19:]
        except (ValueError, OverflowError):
            return "Z"  # of the first and the last year, which clocks have that are not set


def _holds_controls(escaped: bytes) -> bool:
    """Tells if lines hold control characters; JSON has none in strings.

    Asking msgspec takes a twentieth of a search for one of them.
    """
    try:
        _check(b'"%b"' % escaped.replace(b"\n", b" "))
    except msgspec.DecodeError:
        return True
    return False


def _parts_of(names: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Host, tag, process and nothing, of `host tag[process]`."""
    host, _, tag = names.partition(b" ")
    tag, _, process = tag.partition(b"[")
    return host, tag, process[:-1] or b"-", b"-"


def _unless_nil(name: str | None) -> str | None:
    return None if name == "-" else name or None


def _structured(escaped: bytes) -> bytes:
    """The JSON of structured data; empty if it is malformed."""
    if len(escaped) <= _CACHED_BYTES:
        return _structured_known(escaped)
    return _structured_known.__wrapped__(escaped)


@lru_cache(1024)
def _structured_known(escaped: bytes) -> bytes:
    text = _unescape(b'"%b"' % escaped)
    elements, end = parse_elements(text)
    return _encode(elements) if end == len(text) else b""


def parse_elements(text: str) -> tuple[Elements, int]:
    """Reads structured data at the beginning of a text (RFC 5424, 6.3).

    Returns:
        The elements by id, each with its parameters by name, and a list of values where a name is
        there more than once; and how many characters they took, 0 if the data is malformed.
    """
    elements: Elements = {}
    at = 0
    while found := _ELEMENT.match(text, at):
        params = elements.setdefault(found[1], {})
        for name, written in _PARAM.findall(found[2]):
            value = _QUOTED.sub(r"\1", written)
            before = params.get(name)
            if before is None:
                params[name] = value
            elif isinstance(before, list):
                before.append(value)
            else:
                params[name] = [before, value]
        at = found.end()
    if at < len(text) and text[at] != " ":
        return {}, 0
    return elements, at
