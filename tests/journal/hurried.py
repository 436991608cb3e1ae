"""`ingestd` whose journal tries again at once where it would wait: hours of tries in seconds."""

from __future__ import annotations

import sys

from ingestd.__main__ import main
from ingestd.host import nats
from ingestd.journal import log

nats.RECONNECT_SECONDS = log.RETRY_SECONDS = 0.001

if __name__ == "__main__":
    sys.exit(main())
