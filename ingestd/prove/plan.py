"""Random decisions of a run: moments of the faults and bodies of the requests. Pure.

Every decision has a random generator of its own, seeded by the run's seed and the decision's place,
so a run that was interrupted goes on with the plan it had.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from ingestd.settings import Settings

SERVING_SECONDS_MAX = 1.5
"""A daemon that is ready lives no longer."""
_EARLY_SHARE = 0.25
EARLY_SPREAD = 1.1  # of the time to start: some early kills come just after it
_PAUSED_SHARE = 0.35
_GAP_MAX, _DOWN_MAX = 2.0, 3.0
_RECORDS_MAX = 100
_PAD_MAX = 256
_PAUSE_MAX = 0.04
_FRAME = len('{"client":255,"n":1099511627775,"pad":""}')
_TEXT = "the quick brown fox jumps over the lazy dog; " * (_PAD_MAX // 45 + 1)


class Kill(NamedTuple):
    """The moment of a kill.

    Attributes:
        early: counted from the start of the process; otherwise from its readiness.
        part: of the longest time there is, in [0, 1).
    """

    early: bool
    part: float

    def after(self, start_seconds: float) -> float:
        """Seconds from the start, or from readiness.

        Args:
            start_seconds: how long a start takes on this machine.
        """
        return self.part * (EARLY_SPREAD * start_seconds if self.early else SERVING_SECONDS_MAX)


class DaemonFault(NamedTuple):
    """A fault of one of several daemons.

    Attributes:
        how: `early` kills it while it starts, if it does; `replace` pauses it past its lease, gives
            its log a successor, and lets it go on.
        part: its moment, as in `Kill`.
        length: of a pause, in [0, 1) of the longest.
    """

    how: Literal["early", "kill", "pause", "replace"]
    part: float
    length: float


class ServerFault(NamedTuple):
    """A fault of servers.

    Attributes:
        pauses: instead of killing them.
        nodes: from 0.
        gap: seconds before it.
        length: seconds until they go on, or are started again.
    """

    pauses: bool
    nodes: tuple[int, ...]
    gap: float
    length: float


class ProofBounds(NamedTuple):
    """Bounds of one request, from the daemon's settings."""

    records: int
    pad: int


class Body(NamedTuple):
    """One request.

    Attributes:
        first: the number of its first record.
        count: of its records, which are numbered one by one.
        data: lines of JSON.
        pause: seconds to wait before it is sent.
    """

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    data: bytes
    pause: float


def kill_at(seed: int, place: int) -> Kill:
    """The kill at a place, from 0. The first one is late: the time to start is not known yet."""
    dice = random.Random(f"{seed} kill {place}")  # noqa: S311  a seed is the point
    early = dice.random() < _EARLY_SHARE and place > 0
    return Kill(early, dice.random())


def daemon_fault_at(seed: int, place: int) -> DaemonFault:
    """The fault of a daemon at a place, from 0."""
    dice = random.Random(f"{seed} daemon {place}")  # noqa: S311
    (how,) = dice.choices(("early", "kill", "pause", "replace"), (20, 40, 20, 20))
    return DaemonFault(how, dice.random(), dice.random())  # type: ignore[arg-type]  # one of these


def server_fault_at(seed: int, place: int, nodes: int) -> ServerFault:
    """The fault of servers at a place, from 0: mostly of one, at times of two or all of them."""
    dice = random.Random(f"{seed} server {place}")  # noqa: S311
    (count,) = dice.choices((1, min(2, nodes), nodes), (75, 15, 10))
    which = tuple(sorted(dice.sample(range(nodes), count)))
    pauses = dice.random() < _PAUSED_SHARE
    return ServerFault(pauses, which, dice.random() * _GAP_MAX, 0.1 + dice.random() * _DOWN_MAX)


def bounds_of(settings: Settings) -> ProofBounds:
    """The largest requests that fit the settings."""
    pad = min(_PAD_MAX, settings.record_bytes_max - _FRAME)
    body = min(settings.http.decompressed_bytes_max, settings.http.request_bytes_max)
    records = min(_RECORDS_MAX, settings.http.records_max, body // (_FRAME + max(pad, 0) + 1))
    return ProofBounds(max(1, records), max(0, pad))


def body_at(seed: int, client: int, first: int, bounds: ProofBounds) -> Body:
    """A client's request that begins with a number. Small ones are as likely as large ones."""
    dice = random.Random(f"{seed} client {client} from {first}")  # noqa: S311
    count = int(math.exp(dice.random() * math.log(bounds.records + 1)))
    pause = dice.random() * _PAUSE_MAX
    data = b"".join(
        b'{"client":%d,"n":%d,"pad":"%b"}\n'
        % (client, n, _TEXT[: dice.randint(0, bounds.pad)].encode())
        for n in range(first, first + count)
    )
    return Body(first, count, data, pause)
