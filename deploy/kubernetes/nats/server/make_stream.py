"""Makes the stream that records come by, with three replicas, unless it is there.

The servers are asked for a minute; a stream that is there with other settings is left as it is.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import nats
from nats.errors import Error
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError

NAME = os.environ.get("STREAM", "RECORDS")
SUBJECTS = os.environ.get("SUBJECTS", "records.>").split()
REPLICAS = int(os.environ.get("REPLICAS", "3"))
SECONDS = 60.0
DUPLICATE_WINDOW = 3600.0
"""For so long a message that is published again under its Nats-Msg-Id is known."""


async def make(servers: list[str], password: str) -> str:
    """Makes the stream; returns what there is now."""
    client = await nats.connect(
        servers, user="ingestd", password=password, connect_timeout=5, max_reconnect_attempts=2
    )
    try:
        stream = client.jetstream(timeout=10)
        try:
            found = await stream.stream_info(NAME)
        except NotFoundError:
            found = await stream.add_stream(
                StreamConfig(
                    name=NAME,
                    subjects=SUBJECTS,
                    num_replicas=REPLICAS,
                    duplicate_window=DUPLICATE_WINDOW,
                )
            )
        config = found.config
        return f"stream {config.name}: {config.num_replicas} replicas, {config.subjects}"
    finally:
        await client.close()


async def keep_making(servers: list[str], password: str) -> int:
    """Tries until it is there, or the time is over; returns an exit code."""
    end = asyncio.get_running_loop().time() + SECONDS
    while True:
        try:
            print(await make(servers, password))
        except (OSError, TimeoutError, Error) as error:
            if asyncio.get_running_loop().time() > end:
                print(f"not made: {error}", file=sys.stderr)
                return 1
            await asyncio.sleep(1)
        else:
            return 0


if __name__ == "__main__":
    addresses = os.environ["INGESTD_NATS__SERVERS"].split(",")
    secret = Path(os.environ["PASSWORD_FILE"]).read_text(encoding="utf-8").strip()
    sys.exit(asyncio.run(keep_making(addresses, secret)))
