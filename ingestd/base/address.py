"""Addresses as people write them: `127.0.0.1:8080`, `[::1]:8080`, `localhost:0`."""

from __future__ import annotations

import ipaddress

from ingestd.base.errors import ConfigError

_PORT_MAX = 65535


def split_address(address: str) -> tuple[str, int]:
    """Host (IPv6 without its brackets) and port of `HOST:PORT`.

    No host is every interface; port 0 lets the kernel choose.

    Raises:
        ValueError: not of this form; the message says what is.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    readable = (
        colon
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


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `HOST:PORT`; of names only `localhost` is known."""
    host = split_address(address)[0]
    try:
        return is_loopback_ip(host)
    except ValueError:
        return host.lower() == "localhost"


def is_loopback_ip(host: str) -> bool:
    """Whether only this machine can reach an IP address, also one of IPv4 written as IPv6.

    Raises:
        ValueError: it is none.
    """
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def show_address(host: str, port: int) -> str:
    """`HOST:PORT`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_listen(text: str, setting: str) -> tuple[str, int]:
    """`split_address` for who is about to listen.

    Args:
        text: the setting's value.
        setting: its dotted name, for the message.

    Raises:
        ConfigError: it is no address.
    """
    try:
        return split_address(text)
    except ValueError as error:
        raise ConfigError(problem=f"{setting}: {error}") from None
