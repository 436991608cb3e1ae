"""What is where: paths, and the methods that each takes. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ingestd.sources.http import problem
from ingestd.sources.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

T_co = TypeVar("T_co", covariant=True)

RECORDS = "/v1/records"
WEBHOOKS = "/v1/webhooks"
ANY_PIPELINE = f"{RECORDS}/"
"""What stands for the pipelines that do not exist. They take what the others take: whether there
is one is not for everybody to know, so that is said later."""
SERVER = "*"
"""The target of an `OPTIONS` that asks about the server and not about a resource (RFC 9110)."""

READ = ("GET", "HEAD", "OPTIONS")
WRITE = ("POST", "OPTIONS")
ASK = ("OPTIONS",)


class Resource(NamedTuple, Generic[T_co]):
    """What a path names.

    Attributes:
        methods: what may be done with it, in the order of `Allow`.
        what: the thing itself, for whoever does it.
    """

    methods: tuple[str, ...]
    what: T_co

    @property
    def allow(self) -> str:
        """The value of `Allow`."""
        return ", ".join(self.methods)


def find(table: Mapping[str, Resource[T_co]], method: str, target: str) -> Resource[T_co]:
    """The resource that a request is for; one look-up for who writes its path alone.

    Args:
        table: the resources by path, `*` for the server as a whole.
        method: of the request.
        target: as the request line has it: a path with or without a query, or a whole URL.

    Raises:
        Problem: 404, or 405 with `Allow`.
    """
    resource = table.get(target)
    if resource is None:
        path = path_of(target, method)
        if path not in table and path.startswith(ANY_PIPELINE):
            path = ANY_PIPELINE
        resource = table.get(path)
        if resource is None:
            detail = f"records go to {RECORDS} or {RECORDS}/{{pipeline}}"
            raise Problem(problem.NOT_FOUND, detail)
    if method not in resource.methods:
        detail = f"{method[:20]} is not among {resource.allow}"
        raise Problem(problem.METHOD, detail, headers={"Allow": resource.allow})
    return resource


def path_of(target: str, method: str) -> str:
    """The path of a request's target, without the query, as it was written.

    A URL without a path means `/`, and the server as a whole to `OPTIONS` (RFC 9112, 3.2.4).
    """
    path = target.partition("#")[0].partition("?")[0]
    if path[:1] == "/":
        return path
    _, is_url, rest = path.partition("://")
    if not is_url:
        return path
    _, slash, path = rest.partition("/")
    return slash + path or (SERVER if method == "OPTIONS" else "/")
