"""Origins: whose pages a browser lets read the answers of the http source."""

from __future__ import annotations

import re

ANY = "*"
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?",
    re.ASCII,
)
_USUAL_PORTS = {"http": ":80", "https": ":443"}


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as a browser writes them into `Origin`, or `*` alone; as they are.

    Raises:
        ValueError: one would never be matched, or would match what nobody means.
    """
    for origin in origins:
        if origin == ANY:
            if len(origins) > 1:
                raise ValueError('"*" means every origin and stands alone')
        elif origin == "null":
            raise ValueError('"null" is what every sandboxed frame and every local file says')
        elif not _ORIGIN.fullmatch(origin) or origin.endswith(_usual_port(origin)):
            raise ValueError(
                f"{origin[:80]!r} is no origin as browsers send it: scheme://host or"
                " scheme://host:port, in small letters, without the usual port and without a path"
            )
    return origins


def _usual_port(origin: str) -> str:
    return _USUAL_PORTS.get(origin.partition(":")[0], "//")


def is_foreign(origin: str, site: str, authority: str) -> bool:
    """Whether a browser sends a request for a page of another origin.

    Args:
        origin: `Origin`; empty if there is none.
        site: `Sec-Fetch-Site`; empty if there is none.
        authority: host and port that the request is for.
    """
    if origin:
        return origin.partition("://")[2].lower() != authority.lower()
    return site in ("cross-site", "same-site")
