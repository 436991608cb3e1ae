"""Signs deliveries with their senders' libraries: URL COUNT LIBRARY SECRET PUBLIC_URL.

Each delivery is tried, under the same id, until it is taken. SECRET of sendgrid is the private key;
its library verifies what is signed here.
"""

import base64
import http.client
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from urllib.parse import urlencode, urlsplit

address, count, library, secret, public_url = sys.argv[1:]
url = urlsplit(address)
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
Signer = Callable[[int], tuple[dict[str, str], str]]


def sign_with_standardwebhooks() -> Signer:
    from standardwebhooks import Webhook

    webhook = Webhook(secret)

    def sign(n: int) -> tuple[dict[str, str], str]:
        body, name, at = json.dumps({"n": n}), f"msg_{n}", datetime.now(UTC)
        signature = webhook.sign(msg_id=name, timestamp=at, data=body)
        return {**JSON, "webhook-id": name, "webhook-timestamp": str(int(at.timestamp())),
                "webhook-signature": signature, "X-Gitlab-Event": "Push Hook"}, body  # fmt: skip

    return sign


def sign_with_svix() -> Signer:
    from svix.webhooks import Webhook

    webhook = Webhook(secret)

    def sign(n: int) -> tuple[dict[str, str], str]:
        body, name, at = json.dumps({"n": n}), f"msg_{n}", datetime.now(UTC)
        signature = webhook.sign(msg_id=name, timestamp=at, data=body)
        return {**JSON, "svix-id": name, "svix-timestamp": str(int(at.timestamp())),
                "svix-signature": signature}, body  # fmt: skip

    return sign


def sign_with_stripe() -> Signer:
    import stripe

    def sign(n: int) -> tuple[dict[str, str], str]:
        body = json.dumps({"id": f"evt_{n}", "object": "event", "n": n})
        header = stripe.WebhookSignature.generate_signature_header(body, secret)
        assert stripe.WebhookSignature.verify_header(body, header, secret, 300)
        return {**JSON, "Stripe-Signature": header}, body

    return sign


def sign_with_slack() -> Signer:
    from slack_sdk.signature import SignatureVerifier

    verifier, began = SignatureVerifier(secret), str(int(time.time()))

    def sign(n: int) -> tuple[dict[str, str], str]:
        # Events have an id and are signed anew for each try; a command is tried once by Slack.
        event = n % 2 == 0
        body = json.dumps({"event_id": f"Ev{n}", "n": n}) if event else urlencode({"n": n})
        at = str(int(time.time())) if event else began
        signature = verifier.generate_signature(timestamp=at, body=body)
        return {**(JSON if event else FORM), "X-Slack-Request-Timestamp": at,
                "X-Slack-Signature": str(signature)}, body  # fmt: skip

    return sign


def sign_with_twilio() -> Signer:
    from twilio.request_validator import RequestValidator

    validator = RequestValidator(secret)

    def sign(n: int) -> tuple[dict[str, str], str]:
        fields = {"n": str(n), "From": "+14158675309", "Body": "caf\u00e9 & more"}
        signature = validator.compute_signature(public_url, fields)
        return {**FORM, "X-Twilio-Signature": signature,
                "I-Twilio-Idempotency-Token": f"token-{n}"}, urlencode(fields)  # fmt: skip

    return sign


def sign_with_sendgrid() -> Signer:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_der_private_key,
    )
    from sendgrid.helpers.eventwebhook import EventWebhook, EventWebhookHeader

    key = load_der_private_key(base64.b64decode(secret), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    library = EventWebhook(base64.b64encode(der).decode())

    def sign(n: int) -> tuple[dict[str, str], str]:
        body, at = json.dumps([{"sg_event_id": f"e{n}", "n": n}]) + "\r\n", str(int(time.time()))
        signature = key.sign((at + body).encode(), ec.ECDSA(SHA256()))
        shown = base64.b64encode(signature).decode()
        assert library.verify_signature(body, shown, at)
        return {**JSON, EventWebhookHeader.SIGNATURE: shown, EventWebhookHeader.TIMESTAMP: at}, body

    return sign


SIGNERS = {
    "standardwebhooks": sign_with_standardwebhooks,
    "svix": sign_with_svix,
    "stripe": sign_with_stripe,
    "slack-sdk": sign_with_slack,
    "twilio": sign_with_twilio,
    "sendgrid": sign_with_sendgrid,
}
sign = SIGNERS[library]()


def deliver(n: int) -> None:
    deadline = time.monotonic() + 150
    while True:
        headers, body = sign(n)
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=60)
        status = 0
        try:
            connection.request("POST", url.path, body.encode(), headers)
            status = connection.getresponse().status
        except OSError:
            pass
        except http.client.HTTPException:
            pass
        finally:
            connection.close()
        if 200 <= status < 300:
            return
        assert status in (0, 409, 503), status
        assert time.monotonic() < deadline
        time.sleep(0.05)


with ThreadPoolExecutor(4) as pool:
    for done, _ in enumerate(pool.map(deliver, range(int(count)))):
        if done == int(count) // 2:
            print("half", flush=True)
    # What was taken once is not taken again.
    list(pool.map(deliver, range(20)))
