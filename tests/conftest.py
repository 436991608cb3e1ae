"""What all tests share."""

from __future__ import annotations

import signal

from hypothesis import settings

# How long an example takes says how busy the machine is.
settings.register_profile("tests", settings.default, deadline=None)
settings.load_profile("tests")


def pytest_configure() -> None:
    """Takes SIGINT back, which a shell has its background jobs, and their children, ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names gzip data by its kind: the time of its making is in it, and ids have to stay the same.

    Processes that share the tests among them compare the ids that each has collected.
    """
    if isinstance(val, bytes) and val.startswith(b"\x1f\x8b"):
        return "gzip"
    return None
