"""The handler for `logging`: what it sends, and what it never does to the application."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.client import Counts, LogHandler
from tests.client.test_client import RECORDS, THREAD, ended, script, spoilt, url_of
from tests.client.tools import Proxy, arrived, arrives, closed_port, restarting, until
from tests.daemon.harness import daemon, written

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    one = logging.Logger("shop.orders")  # noqa: LOG001 - in no tree: pytest's handlers see nothing
    yield one
    for handler in one.handlers:
        handler.close()


@pytest.mark.slow
def test_each_log_record_once(tmp_path: Path, logger: logging.Logger) -> None:
    with Proxy(spoilt) as proxy, restarting(proxy, tmp_path, *THREAD, after=30) as daemons:
        handler = LogHandler(proxy.url, batch_records=10, close_timeout=120)
        logger.addHandler(handler)
        for number in range(RECORDS):
            logger.info("order %d", number)
        assert handler.client.flush(120)
        assert handler.client.counts == Counts(RECORDS, RECORDS)
        until(lambda: len(daemons) == 2)
        wanted = [f"order {number}" for number in range(RECORDS)]
        arrives(tmp_path, daemons[-1], wanted, "message")
        assert arrived(tmp_path, "message") == wanted


def test_a_log_record_as_json(tmp_path: Path, logger: logging.Logger) -> None:
    class Order:
        def __str__(self) -> str:
            logger.error("a value that logs")  # inside of emit: not sent, and no recursion
            return "order 7"

    with daemon(*THREAD, cwd=tmp_path) as one:
        handler = LogHandler(
            url_of(one), fields={"service": "shop"}, level="INFO", close_timeout=120
        )
        logger.addHandler(handler)
        logger.debug("below the level")
        logger.warning("%s is late", "it", extra={"user": 7, "order": Order()})
        try:
            {}["bad"]
        except KeyError:
            logger.exception("failed", stack_info=True)
        logger.info("file \udcff", extra={"share": float("nan"), "pair": {(1, 2): 3}})
        handler.flush()
        one.until_settled()
        late, failed, odd = map(json.loads, written(tmp_path))
    assert late["time"].endswith("+00:00")
    del late["time"]
    assert late == {
        "service": "shop", "level": "WARNING", "logger": "shop.orders", "message": "it is late",
        "extra": {"user": 7, "order": "order 7"},
    }  # fmt: skip
    assert failed["exception"].endswith("KeyError: 'bad'")
    assert failed["stack"].startswith("Stack")
    assert odd["message"] == "file ?"
    assert odd["extra"] == {"share": "nan", "pair": "{(1, 2): 3}"}


def test_it_never_raises_and_never_blocks(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = LogHandler(f"http://127.0.0.1:{closed_port()}", buffer_bytes=2000, close_timeout=0.1)
    logger.addHandler(handler)
    logger.info("%d", "no number")
    assert "Logging error" in capsys.readouterr().err  # as with all handlers of logging
    for _ in range(1000):
        logger.info("x" * 100)
    counts = handler.client.counts
    assert counts.sent == 1000
    assert counts.dropped > 900
    handler.close()
    logger.info("after the end")
    assert handler.client.counts.pending == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("full", ["drop", "block"])
def test_its_own_client_may_log_into_it(full: Any, tmp_path: Path) -> None:
    """The root logger gets what the client logs, while its buffer is full of that same log."""
    text = """
import logging, sys
from ingestd.client import LogHandler
def tell(*told):
    logging.getLogger("app").error("a callback: %s", told)
handler = LogHandler(sys.argv[1], buffer_bytes=2000, batch_age=0, batch_records=1,
    full=sys.argv[2], close_timeout=1, on_invalid=tell, on_dropped=tell)
logging.basicConfig(level=logging.DEBUG, handlers=[handler])
import threading
def work():
    for n in range(50):
        logging.info("record %d", n)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
while handler.client.counts.pending < 5:
    pass
logging.shutdown()
print(handler.client.counts)
"""
    out = ended(script(text, f"http://127.0.0.1:{closed_port()}", full, cwd=tmp_path))
    counts = eval(out, {"Counts": Counts})
    assert counts.pending == counts.accepted == 0
    assert counts.sent == counts.dropped > 0


def test_the_end_of_the_interpreter_sends_the_last_line(tmp_path: Path) -> None:
    text = """
import atexit, logging, logging.config, sys
atexit.register(lambda: logging.error("the very last"))
logging.config.dictConfig({
    "version": 1,
    "handlers": {
        "d": {
            "class": "ingestd.client.LogHandler", "url": sys.argv[1], "batch_age": 3600,
            "close_timeout": 120,
        },
    },
    "root": {"handlers": ["d"], "level": "INFO"},
})
logging.info("first")
"""
    with daemon(*THREAD, cwd=tmp_path) as one:
        ended(script(text, url_of(one), cwd=tmp_path))
        arrives(tmp_path, one, ["first", "the very last"], "message")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_an_emit(tmp_path: Path, logger: logging.Logger) -> None:
    """The child logs, though the thread that held every lock is not there any more."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def __str__(self) -> str:
            inside.set()
            go_on.wait(300)
            return "slow"

    with daemon(*THREAD, cwd=tmp_path) as one:
        handler = LogHandler(url_of(one), close_timeout=120)
        logger.addHandler(handler)
        thread = threading.Thread(target=logger.info, args=(Slow(),))
        thread.start()
        assert inside.wait(60)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                logger.info("child")
                code = handler.client.close(60) != Counts(1, 1)
            finally:
                os._exit(code)
        go_on.set()
        thread.join(60)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        handler.flush()
        arrives(tmp_path, one, ["child", "slow"], "message")
    assert sys.exc_info() == (None, None, None)


def test_a_value_without_a_text_costs_itself_alone(logger: logging.Logger) -> None:
    class Broken:
        def __str__(self) -> str:
            raise AttributeError("text")

    dropped: list[bytes] = []
    handler = LogHandler(
        "http://127.0.0.1:1",
        close_timeout=0.1,
        on_dropped=lambda records, _: dropped.extend(records),
    )
    logger.addHandler(handler)
    logger.warning("late", extra={"order": Broken(), "digits": {1: 10**5000}, "user": 7})
    handler.close()
    (record,) = map(json.loads, dropped)
    assert record["message"] == "late"
    assert record["extra"] == {
        "order": "<Broken without a text>", "digits": "<dict without a text>", "user": "7",
    }  # fmt: skip


def test_fields_that_are_no_json_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="JSON"):
        LogHandler("http://127.0.0.1:1", fields={"share": float("nan")})
