"""Webhooks that their senders' own libraries sign, as `docs/clients/webhooks.md` sets them up."""

from __future__ import annotations

import base64
import re
import tomllib
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.clients.harness import Receiver, check, python_client, report
from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SECRET = "a secret of the tests, 32 bytes."
WHSEC = "whsec_" + base64.b64encode(SECRET.encode()).decode()
BLOCKS = re.findall(
    r"(?ms)^```toml\n(.*?)^```$", (ROOT / "docs" / "clients" / "webhooks.md").read_text()
)


def pair() -> tuple[str, str]:
    """A private key and its public one, each as base64 of DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(private).decode(), base64.b64encode(public).decode()


@pytest.mark.parametrize(
    ("library", "name", "what"),
    [
        ("standardwebhooks", "gitlab", "deliveries with a signing token of GitLab"),
        ("svix", "clerk", "deliveries with Svix's names"),
        ("stripe", "stripe", "events"),
        ("slack-sdk", "slack", "events and commands"),
        ("twilio", "twilio", "forms"),
        ("sendgrid", "sendgrid", "deliveries of an event, which the library verifies too"),
    ],
)
def test_a_senders_library_signs(tmp_path: Path, library: str, name: str, what: str) -> None:
    client = python_client(library, "webhooks_client.py")
    (block,) = [one for one in BLOCKS if f"[http.webhooks.{name}]" in one]
    (table,) = tomllib.loads(block)["http"]["webhooks"].values()
    theirs = ours = WHSEC if table["secret"].startswith("whsec_") else SECRET
    if name == "sendgrid":
        theirs, ours = pair()
    (tmp_path / "ingestd.toml").write_text(block.replace(table["secret"], ours))
    with Receiver(tmp_path) as receiver:
        more = (library, theirs, table.get("public_url", ""))
        address = f"{receiver.url}/v1/webhooks/{name}"
        records = receiver.deliver(client, *more, address=address)
    check([int(record["n"]) for record in records], once=True)
    report("webhooks", client, f"1,000 {what}; exactly once")
