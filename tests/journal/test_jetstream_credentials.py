"""Files of credentials: users of an account whose JWT expires, and is replaced."""

from __future__ import annotations

import base64
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import JournalFailed
from ingestd.host.nats import CredentialsFile, NatsAccess, close_nats, connect_nats
from tests.journal.on_nats import accept, crash, records, refused, tries
from tests.nats import running

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
nkeys = pytest.importorskip("nkeys", reason="needs nkeys: pip install nkeys")
pytestmark = pytest.mark.slow


BOUNDS = (
    "subs", "data", "payload", "imports", "exports", "conn", "leaf",
    "mem_storage", "disk_storage", "streams", "consumer",
)  # fmt: skip


class Issuer:
    """An operator, an account, and files of credentials for a user of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._operator = _key(nkeys.PREFIX_BYTE_OPERATOR)
        self._system, self._account = (_key(nkeys.PREFIX_BYTE_ACCOUNT) for _ in range(2))
        self._user = _key(nkeys.PREFIX_BYTE_USER)

    def config(self) -> str:
        """Of a server that knows the accounts by itself; JetStream needs one of the system too."""
        bounds = dict.fromkeys(BOUNDS, -1)
        none = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), 0)
        keys = [key.public_key.decode() for key in (self._system, self._account)]
        accounts = [
            _token(self._operator, key, "account", {"limits": bounds | more})
            for key, more in ((self._system, none), (self._account, {}))
        ]
        loaded = ", ".join(f"{key}: {token}" for key, token in zip(keys, accounts, strict=True))
        operator = _token(self._operator, self._operator, "operator")
        return (
            f"operator: {operator}\nsystem_account: {keys[0]}\n"
            f"resolver: MEMORY\nresolver_preload: {{ {loaded} }}\n"
        )

    def write(self, seconds: float) -> None:
        """Writes the file anew, for a user who is one for so long."""
        token = _token(
            self._account, self._user, "user", dict.fromkeys(("subs", "data", "payload"), -1),
            exp=int(time.time() + seconds),
        )  # fmt: skip
        self.file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{self._user.seed.decode()}\n"
            "------END USER NKEY SEED------\n"
        )


def _key(kind: int) -> Any:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), kind))


def _token(issuer: Any, subject: Any, kind: str, own=(), **more: int) -> str:
    """A JWT as NATS has them: signed with the key of an operator or an account."""
    claims = {
        "jti": kind, "iat": int(time.time()), "iss": issuer.public_key.decode(), "name": kind,
        "sub": subject.public_key.decode(), "nats": {**dict(own), "type": kind, "version": 2},
        **more,
    }  # fmt: skip
    parts = [
        _base64(json.dumps(one).encode()) for one in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)
    ]
    return ".".join([*parts, _base64(issuer.sign(".".join(parts).encode()))])


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def test_a_file_of_credentials_expires_and_is_written_anew(tmp_path: Path, open_) -> None:
    """A JWT of an account; while it is replaced the file is there without one."""
    (tmp_path / "nats").mkdir()
    issuer = Issuer(tmp_path / "user.creds")
    access = {"credentials": str(issuer.file)}
    with running(tmp_path / "nats", config=issuer.config()) as cluster:
        issuer.write(3600)
        began = time.monotonic()
        await accept(await open_(cluster, "measured", **access), b"1")
        # Long enough for the first record, whatever a machine takes for that.
        issuer.write(5 + 10 * (time.monotonic() - began))
        journal = await open_(cluster, "jwt", **access)
        await accept(journal, b"1")
        await refused(journal)
        issuer.file.write_text("")
        await tries(journal, 3)  # with what has no JWT
        await refused(journal)
        issuer.write(3600)
        await accept(journal, b"2")
        assert await records(journal) == [b"1", b"2"]
        await crash(journal)
        assert await records(await open_(cluster, "jwt", **access)) == [b"1", b"2"]
        access_of_others = NatsAccess(cluster.urls, credentials=str(issuer.file))
        await close_nats(await connect_nats(access_of_others, "a source or a sink"))
        for wrong in ("", "-----BEGIN NATS USER JWT-----\n"):
            issuer.file.write_text(wrong)
            with pytest.raises(JournalFailed, match="no file of credentials"):
                await open_(cluster, "jwt", **access)
            with pytest.raises(OSError, match="no file of credentials"):
                await connect_nats(access_of_others, "a source or a sink")


def test_a_file_of_credentials_may_have_other_lines_and_ends_of_lines(tmp_path: Path) -> None:
    issuer = Issuer(tmp_path / "user.creds")
    issuer.write(60)
    plain = str(CredentialsFile(str(issuer.file)))
    text = issuer.file.read_text()
    assert [line for line in plain.splitlines() if line] == [
        line for line in text.splitlines() if line
    ]
    issuer.file.write_bytes(b"# a note\r\n" + text.replace("\n", "\r\n").encode())
    assert str(CredentialsFile(str(issuer.file))) == plain
