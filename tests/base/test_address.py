from __future__ import annotations

import pytest

from ingestd.base.errors import ConfigError
from ingestd.config.network import parse_listen


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("localhost:0", "localhost", 0),
        ("[::1]:65535", "::1", 65535),
        (":8080", "", 8080),
    ],
)
def test_where_to_listen(text: str, host: str, port: int) -> None:
    assert parse_listen(text, "admin.listen") == (host, port)


@pytest.mark.parametrize(
    "text", ["", ":", "8080", "host", "host:", "::1:80", "[::1]", "h:65536", "h:-1", "h: 1", ":x"]
)
def test_what_is_no_address_is_named_with_its_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^admin\.listen: .* HOST:PORT"):
        parse_listen(text, "admin.listen")
