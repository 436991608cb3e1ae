"""Addresses as people write them: `127.0.0.1:8080`, `[::1]:8080`, `localhost:0`."""

from __future__ import annotations

_PORT_MAX = 65535


def split_address(address: str) -> tuple[str, int]:
    """Host (IPv6 without its brackets) and port of `HOST:PORT`; port 0 lets the kernel choose.

    Raises:
        ValueError: not of this form; the message says what is.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    readable = (
        colon
        and host
        and not any(c.isspace() or c in "[]/" for c in host)
        and bracketed == (":" in host)
        and port.isascii()
        and port.isdigit()
        and len(port) <= 5
    )
    if not readable or int(port) > _PORT_MAX:
        raise ValueError(
            f"{address[:60]!r} is not an address: HOST:PORT, like 127.0.0.1:8080 or [::1]:8080"
        )
    return host, int(port)
