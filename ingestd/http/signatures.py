"""Signatures of webhooks: the contract of a scheme, and what schemes share. No I/O.

A scheme reads the headers of a delivery (`SignedRequest`) and verifies the body as it came with
every key, in constant time; the sender of a request that does not fit is told so (401) and learns
nothing else. It knows how its secrets are written, whether the time is signed, where the sender's
id of a delivery is, and which headers name the event. `schemes.py` has them.

A header that a signature rests on may come once: of two values a proxy and this daemon could each
read another one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec

from ingestd.codecs.forms import FORM
from ingestd.config.units import UnquotedError
from ingestd.http import problem
from ingestd.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from multidict import MultiMapping

    from ingestd.http.settings import WebhookSettings

SECRET_BYTES_MIN = 16
"""Of a secret, decoded; Standard Webhooks asks for 24, GitHub and Stripe make longer ones."""
_SIGNATURES_MAX = 20
ID = re.compile(r"[!-~]{1,255}", re.ASCII)
SECONDS = re.compile(r"[0-9]{1,12}", re.ASCII)
TEXT = re.compile(r".*")


class SignedRequest(NamedTuple):
    """A delivery before anything of it is believed.

    Attributes:
        headers: of the request, in any case.
        wire: the body as it came.
        target: as the request line has it, query included.
    """

    headers: MultiMapping[str]
    wire: bytes
    target: str = ""

    @property
    def is_form(self) -> bool:
        """Returns True if its type is that of a form."""
        return media_type(self.headers.get("Content-Type", "")) == FORM


class Signed(NamedTuple):
    """The parts of a delivery's headers that its signature is about.

    Attributes:
        signatures: one of them has to fit, as they are written.
        signed: the bytes that are signed, in pieces.
        id: the sender's; empty if it is not in the headers.
        at: when it was signed, seconds since the epoch; `None` if that is not signed.
        id_signed: the id cannot be another one; else the same id may come with another body.
    """

    signatures: Sequence[str]
    signed: Sequence[bytes]
    id: str = ""
    at: float | None = None
    id_signed: bool = False


class Scheme:
    """One scheme. A subclass inherits the defaults.

    Args:
        settings: of the webhook.

    Attributes:
        own: settings that it reads beside those of all webhooks.
        timed: signs the time.
        forms: sends form bodies too.
        each: each element of an array is a record; else a delivery is one record.
        event_headers: what envelopes keep of its deliveries.
        status: of the answer: 202 with the numbers, or 200 or 204 with nothing, where the sender
            takes a body for something to show or to do.
    """

    own: ClassVar[Sequence[str]] = ()
    timed: bool = False
    forms: bool = False
    each: bool = False
    event_headers: Sequence[str] = ()
    status: int = 202
    algorithm: str = "sha256"
    encoding: str = "hex"

    def __init__(self, settings: WebhookSettings) -> None:
        self.settings = settings

    @classmethod
    def problems(cls, settings: WebhookSettings) -> Iterator[tuple[str, str]]:  # noqa: ARG003
        """Finds settings that cannot work: (key in the webhook's table, problem) for each."""
        return iter(())

    def key(self, secret: str) -> Any:
        """A secret as `verify` takes it.

        Raises:
            ValueError: it is none; the message does not quote it.
        """
        return long_enough(secret.encode())

    def read(self, request: SignedRequest) -> Signed:
        """Reads the headers.

        Raises:
            Problem: 401.
        """
        raise NotImplementedError

    def verify(self, request: SignedRequest, keys: Sequence[Any]) -> Signed:
        """Verifies the signature; the time is still to be compared.

        Args:
            request: the delivery.
            keys: as `key` made them; one of them has to fit.

        Raises:
            Problem: 401.
        """
        signed = self.read(request)
        if not fits(keys, signed, self.algorithm, self.encoding):
            raise forged()
        return signed

    def find_id(self, request: SignedRequest, signed: Signed) -> str:  # noqa: ARG002
        """Returns the sender's id of a verified delivery; empty if it has none.

        Raises:
            Problem: 400 if deliveries have an id in their body and this has none.
        """
        return signed.id

    def question(self, body: bytes) -> str:  # noqa: ARG002
        """Returns the text that a verified body asks to have back; empty if it is a record."""
        return ""


# -- what schemes share ----------------------------------------------------------------------------


def fits(keys: Sequence[bytes], signed: Signed, algorithm: str, encoding: str) -> bool:
    """Tells if one of the signatures was made with one of the keys; all of them are compared."""
    found = False
    for key in keys:
        mac = hmac.new(key, digestmod=algorithm)
        for part in signed.signed:
            mac.update(part)
        digest = mac.digest()
        right = base64.b64encode(digest) if encoding == "base64" else digest.hex().encode()
        for signature in signed.signatures:
            found |= hmac.compare_digest(right, signature.encode())
    return found


def single(headers: MultiMapping[str], name: str, form: re.Pattern[str]) -> str:
    """Returns a header that comes once, or not at all if the form allows that.

    Raises:
        Problem: 401.
    """
    values = headers.getall(name, ())
    if len(values) > 1:
        raise wrong(f"{name} comes more than once")
    value = values[0] if values else ""
    if not form.fullmatch(value):
        raise wrong(f"{name} is missing, or can't be read")
    return value


def media_type(content_type: str) -> str:
    """A media type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def readable(signatures: Sequence[str]) -> Sequence[str]:
    """Returns the signatures that can be compared; at least one, and not more than a few.

    Raises:
        Problem: 401.
    """
    signatures = [one for one in signatures if one and one.isascii()][:_SIGNATURES_MAX]
    if not signatures:
        raise wrong("there is none of a kind that is known here")
    return signatures


def after_prefix(prefix: str, shown: str) -> Sequence[str]:
    """Returns the one signature of a header that begins with a prefix.

    Raises:
        Problem: 401.
    """
    return readable([shown[len(prefix) :]] if shown.startswith(prefix) else [])


def long_enough(secret: bytes) -> bytes:
    """Returns a secret that cannot be guessed.

    Raises:
        ValueError: it could be; the message does not quote it.
    """
    if len(secret) < SECRET_BYTES_MIN:
        # The empty one above all, which a variable that is not set leaves behind its prefix.
        raise ValueError(f"{len(secret)} bytes, fewer than {SECRET_BYTES_MIN}: it could be guessed")
    return secret


def digest_of(*parts: bytes) -> str:
    """Returns an id for deliveries whose sender gives them none: that of their bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def wrong(detail: str) -> Problem:
    """Makes the 401 of a delivery."""
    scheme = {"WWW-Authenticate": 'Signature realm="ingestd"'}
    return Problem(problem.SIGNATURE_INVALID, detail, headers=scheme)


def forged() -> Problem:
    """Makes the 401 of a delivery whose signature does not fit."""
    return wrong("it was not made with a secret that is known here, or the body is another")


def check_time(at: float, now: float, tolerance: float) -> None:
    """Refuses a delivery that was signed too long ago, or too far ahead.

    Args:
        at: when, seconds since the epoch.
        now: the same of this machine.
        tolerance: seconds.

    Raises:
        Problem: 401.
    """
    if abs(now - at) > tolerance:
        when = "ago" if at < now else "ahead"
        raise wrong(f"it was made {abs(now - at):.0f} s {when}; tolerance is {tolerance:g} s")


def id_at(path: Sequence[str], body: bytes) -> str:
    """The id of an event, which is in the body and thereby signed.

    Raises:
        Problem: 400.
    """
    found: Any = body
    try:
        for name in path:
            found = msgspec.json.decode(found, type=dict[str, msgspec.Raw])[name]
        found = msgspec.json.decode(found, type=str | int)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        found = ""
    event_id = str(found)
    if not event_id:
        detail = f"the body is not an event: a JSON object with {'.'.join(path)}"
        raise Problem(problem.MALFORMED, detail)
    return event_id if ID.fullmatch(event_id) else digest_of(event_id.encode("utf-8", "replace"))


# -- our own ---------------------------------------------------------------------------------------

WHSEC = "whsec_"


def signing_key(secret: str) -> bytes:
    """The key of a secret as Standard Webhooks writes it: `whsec_` and base64.

    Raises:
        UnquotedError: it is none.
    """
    try:
        key = base64.b64decode(secret.removeprefix(WHSEC), validate=True)
    except ValueError:
        raise UnquotedError(f"should be {WHSEC} and base64") from None
    if len(key) < SECRET_BYTES_MIN:
        raise UnquotedError(f"has fewer than {SECRET_BYTES_MIN} bytes: it could be guessed")
    return key


def signature_headers(key: bytes, name: str, now: float, body: bytes) -> dict[str, str]:
    """Headers of https://www.standardwebhooks.com for a body as it is sent.

    Args:
        key: see `signing_key`.
        name: the delivery's id, the same for each of its tries.
        now: seconds since the epoch.
        body: the bytes.
    """
    at = str(int(now))
    mac = hmac.new(key, f"{name}.{at}.".encode(), hashlib.sha256)
    mac.update(body)
    signature = base64.b64encode(mac.digest()).decode()
    return {
        "webhook-id": name,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{signature}",
    }
