"""Requests to the admin address are let in by where they come from and by their token."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.admin.access import AdminAccess, Need
from ingestd.admin.connection import AdminRequest
from ingestd.base.errors import ConfigError
from ingestd.http.credentials import hash_of
from ingestd.http.problem import Problem
from ingestd.settings import AdminSettings, Settings
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

READER = "reader-token-of-the-tests-0123456789"
ADMIN = "admin-token-of-the-tests-9876543210"
TOKENS = {
    "eye": {"hash": hash_of(READER)},
    "ops": {"hash": hash_of(ADMIN), "role": "admin"},
}
JSON = {"content-type": "application/json"}


def asked(
    need: Need, *, local: bool = True, settings: dict[str, Any] | None = None, **headers: str
) -> tuple[int, str]:
    """The status of a refusal and empty, or 0 and the name of the token that was shown."""
    made = AdminSettings(**{"tokens": TOKENS, **(settings or {})})
    access = AdminAccess(made, local=local)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = AdminRequest("GET", "/x", {"host": "127.0.0.1:8081", **named})
    try:
        access.check_page(request, need)
        return 0, access.authorize(request, need)
    except Problem as refused:
        return refused.kind.status, ""


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("settings", [{}, {"token_required": True}, {"tokens": {}}])
def test_probes_need_nothing(local: bool, settings: dict[str, Any]) -> None:
    assert asked(Need.PROBE, local=local, settings=settings) == (0, "")


def test_status_is_open_until_there_are_tokens() -> None:
    assert asked(Need.STATUS, local=False, settings={"tokens": {}}) == (0, "")
    assert asked(Need.STATUS, local=False) == (401, "")
    assert asked(Need.STATUS, local=True) == (0, "")


def test_reading_needs_a_token_beyond_this_machine() -> None:
    assert asked(Need.READ) == (0, "")
    assert asked(Need.READ, local=False) == (401, "")
    assert asked(Need.READ, local=False, settings={"tokens": {}}) == (401, "")
    assert asked(Need.READ, settings={"token_required": True}) == (401, "")
    named = ("forwarded", "x_forwarded_for", "x_forwarded_host", "x_real_ip")
    for name in (*named, "x_forwarded_proto", "x_forwarded_port", "via"):
        assert asked(Need.READ, **{name: "192.0.2.7"}) == (401, "")


@pytest.mark.parametrize("token", [READER, ADMIN])
def test_a_token_may_be_shown_in_each_way(token: str) -> None:
    name = "eye" if token == READER else "ops"
    assert asked(Need.READ, local=False, authorization=f"Bearer {token}") == (0, name)
    assert asked(Need.READ, local=False, x_api_key=token) == (0, name)
    assert asked(Need.READ, local=False, authorization=f"Bearer {token}x") == (401, "")
    assert asked(Need.READ, local=True, authorization="Bearer wrong") == (401, "")
    twice = f"Bearer {token}, Bearer {token}"
    assert asked(Need.READ, local=False, authorization=twice) == (401, "")


@pytest.mark.parametrize("local", [True, False])
def test_changing_needs_the_role_everywhere(local: bool) -> None:
    assert asked(Need.CHANGE, local=local, **JSON) == (401, "")
    assert asked(Need.CHANGE, local=local, authorization=f"Bearer {READER}", **JSON) == (403, "")
    assert asked(Need.CHANGE, local=local, authorization=f"Bearer {ADMIN}", **JSON) == (0, "ops")
    assert asked(Need.CHANGE, settings={"tokens": {}}, **JSON) == (401, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8081", "127.0.0.1.evil.example"])
@pytest.mark.parametrize("need", [Need.PROBE, Need.READ, Need.CHANGE])
def test_a_name_that_was_made_to_mean_this_machine_is_refused(host: str, need: Need) -> None:
    token = f"Bearer {ADMIN}"
    assert asked(need, host=host, authorization=token, **JSON) == (421, "")
    own = {"host": host, "origin": f"http://{host}", "sec_fetch_site": "same-origin"}
    assert asked(need, authorization=token, **own, **JSON) == (421, "")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"origin": "http://127.0.0.1:9999"},
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_pages_of_other_origins_read_and_change_nothing(
    headers: dict[str, str], local: bool
) -> None:
    token = {"authorization": f"Bearer {ADMIN}", **JSON}
    for need in (Need.READ, Need.CHANGE):
        assert asked(need, local=local, **headers, **token) == (403, "")


def test_a_link_is_followed_and_a_form_changes_nothing() -> None:
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert asked(Need.READ, **link) == (0, "")
    token = {"authorization": f"Bearer {ADMIN}"}
    assert asked(Need.CHANGE, **link, **token, **JSON) == (403, "")
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data", ""):
        assert asked(Need.CHANGE, content_type=kind, **token) == (415, "")
    assert asked(Need.CHANGE, content_type="application/json; charset=utf-8", **token) == (0, "ops")


@pytest.mark.parametrize(
    ("payloads", "local", "proxied", "shown"),
    [
        ("loopback", True, False, True),
        ("loopback", True, True, False),
        ("loopback", False, False, False),
        ("always", False, False, True),
        ("never", True, False, False),
    ],
)
def test_payloads_are_shown_on_this_machine(
    payloads: Any, local: bool, proxied: bool, shown: bool
) -> None:
    access = AdminAccess(AdminSettings(payloads=payloads), local=local)
    headers = {"x-forwarded-for": "192.0.2.7"} if proxied else {}
    assert access.shows_payloads(AdminRequest("GET", "/", headers)) is shown


def test_files_of_tokens_are_read_and_faults_named(tmp_path: Path) -> None:
    file = tmp_path / "ops"
    file.write_text(f"{hash_of(ADMIN)}\n")
    settings = AdminSettings(tokens={"ops": {"file": str(file), "role": "admin"}})
    request = AdminRequest("GET", "/", {"authorization": f"Bearer {ADMIN}"})
    assert AdminAccess(settings, local=False).authorize(request, Need.CHANGE) == "ops"
    both = AdminSettings(tokens={"a": {"hash": hash_of(ADMIN)}, "b": {"hash": hash_of(ADMIN)}})
    with pytest.raises(ConfigError, match=r"admin\.tokens\.b: has a token of admin\.tokens\.a too"):
        AdminAccess(both, local=True)
    with pytest.raises(ConfigError, match=r"admin\.tokens\.ops\.file: cannot read"):
        AdminAccess(AdminSettings(tokens={"ops": {"file": str(tmp_path / "no")}}), local=True)
    with pytest.raises(ValueError, match=r"admin\.tokens\.ops: needs one of token, hash and file"):
        Settings(admin={"tokens": {"ops": {"role": "admin"}}})
    with pytest.raises(ValueError, match=r"admin\.token_required: there is no token"):
        Settings(admin={"token_required": True})


@pytest.mark.slow
def test_tokens_of_operators_change_at_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "ops"
    file.write_text(f"{READER}\n")
    settings = ("--admin.tokens.ops.file", str(file), "--admin.token_required", "true")
    with daemon("--executor.kind", "thread", *settings, cwd=tmp_path) as one:
        assert one.request("GET", "/livez", admin=True)[0] == 200
        assert one.request("GET", "/metrics", admin=True)[0] == 200
        assert one.request("GET", "/v1/status", admin=True)[0] == 401
        for token in (READER, ADMIN):
            file.write_text(f"{token}\n")
            one.terminate(1)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                shown = {"Authorization": f"Bearer {token}"}
                if one.request("GET", "/v1/status", headers=shown, admin=True)[0] == 200:
                    break
            else:
                pytest.fail("the token is not known")
        old = {"Authorization": f"Bearer {READER}"}
        assert one.request("GET", "/v1/status", headers=old, admin=True)[0] == 401
