"""A handler of the standard `logging` that sends log records to a daemon."""

from __future__ import annotations

import json
import logging
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ingestd.client.clients import Client
from ingestd.client.exchange import BufferFull, ClientClosed
from ingestd.client.sender import LOGGER

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT_MAX = 64 * 1024
"""Characters of a message or a traceback in a log record."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}
_traceback = logging.Formatter()


class LogHandler(logging.Handler):
    """Sends log records to a daemon as JSON objects.

    An object has `time` (UTC, ISO 8601), `level`, `logger`, `message`, and where there are such
    `exception`, `stack` and `extra`. The handler never raises, and does not send what its own
    client logs. It drops at the bound of the buffer, unless `full="block"`.

    Args:
        url: of the daemon.
        level: records below it are ignored.
        fields: members of each object, such as the name of the service.
        options: of its `Client`.

    Raises:
        TypeError, ValueError, OSError: an option is wrong, or a field is no JSON.
    """

    def __init__(
        self,
        url: str,
        *,
        level: int | str = logging.NOTSET,
        fields: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(level)
        self._local = threading.local()
        self._fields = dict(fields or {})
        _encode(self._fields)  # what is no JSON is told here, and not with each record
        # `logging.shutdown` closes it, after the records of other hooks at the end.
        self.client = Client(url, **{"full": "drop", "at_exit": False, **options})

    def handle(self, record: logging.LogRecord) -> bool:
        """Emits without the handler's lock: one that waits for room would keep `shutdown` out."""
        if record.name == LOGGER or self.client.runs_here():
            return False  # logged by its own client
        passed: Any = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record into the client's buffer."""
        if getattr(self._local, "emits", False):  # a value logs while it is made text
            return
        self._local.emits = True
        try:
            self.client.send(self._encoded(record))
        except (BufferFull, ClientClosed):
            pass
        except Exception:  # noqa: BLE001 - logging must not fail the application
            self.handleError(record)
        finally:
            self._local.emits = False

    def _encoded(self, record: logging.LogRecord) -> bytes:
        whole: dict[str, Any] = {
            **self._fields,
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:TEXT_MAX],
        }
        if record.exc_info and not record.exc_text:
            record.exc_text = _traceback.formatException(record.exc_info)
        if record.exc_text:
            whole["exception"] = record.exc_text[-TEXT_MAX:]
        if record.stack_info:
            whole["stack"] = record.stack_info[-TEXT_MAX:]
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if extra:
            whole["extra"] = extra
        try:
            text = _encode(whole)
        except (TypeError, ValueError, RecursionError):  # NaN, keys that are no text, circles
            whole["extra"] = {name: _text(value) for name, value in extra.items()}
            text = _encode(whole)
        return text.encode(errors="replace")  # file names may have lone surrogates

    def flush(self) -> None:
        """Sends what is there, within half of the client's `close_timeout`."""
        self.client.flush(self.client.close_timeout / 2)

    def close(self) -> None:
        """Sends what is there, within the other half, and drops the rest."""
        super().close()
        self.client.close(self.client.close_timeout / 2)


def _text(value: object) -> str:
    try:
        return str(value)[:TEXT_MAX]
    except Exception:  # noqa: BLE001 - of the application: one value is lost, and not the record
        return f"<{type(value).__name__} without a text>"


_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_text
).encode
