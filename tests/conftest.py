"""What all tests share."""

from __future__ import annotations

import gc
import logging
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Generator

# How long an example takes says how busy the machine is.
settings.register_profile("tests", settings.default, deadline=None)
settings.load_profile("tests")


class WithoutTraceback(logging.Filter):
    """Tells the error of a record without its traceback.

    asyncio's finalizers log errors that nobody asked for, at any place where garbage is collected.
    A traceback is formatted with a parse of its source, and CPython 3.11 ends a parse that another
    one meets with a SystemError (https://github.com/python/cpython/issues/106905).
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = f"{record.getMessage()}\n{record.exc_info[1]!r}", ()
            record.exc_info = None
        return True


def pytest_configure() -> None:
    """Sets what finalizers log, and SIGINT, which a shell has its background jobs ignore."""
    logging.getLogger("asyncio").addFilter(WithoutTraceback())
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Collects no garbage while a failure is told.

    pytest parses the source of what failed. A finalizer that formats a traceback, as that of a task
    whose error nobody asked for, parses too, and CPython 3.11 then ends the outer parse with a
    SystemError (https://github.com/python/cpython/issues/106905), which ends the whole run.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if collects:
            gc.enable()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names gzip data by its kind: the time of its making is in it, and ids have to stay the same.

    Processes that share the tests among them compare the ids that each has collected.
    """
    if isinstance(val, bytes) and val.startswith(b"\x1f\x8b"):
        return "gzip"
    return None
