"""Access control data from the settings and their files, read at the start and on SIGHUP."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.errors import ConfigError
from ingestd.host.sockets import is_local, show_socket
from ingestd.http.credentials import Tokens, read_tokens
from ingestd.http.routing import ALL_METHODS, BELOW, Resource
from ingestd.http.settings import at_large, secret_header
from ingestd.registry import ENDPOINTS, WITHOUT_TABLE
from ingestd.sources.http.endpoints.base import ANY, EndpointContext, EndpointSettings

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.http.settings import HttpSettings
    from ingestd.http.tls import SecuredContext
    from ingestd.sources.http.endpoints.base import Endpoint


class Access(NamedTuple):
    """Credentials, endpoints and TLS context, which a reload replaces together.

    Attributes:
        tokens: of all clients.
        endpoints: with their secrets, by name.
        context: TLS context; `None` without TLS.
        authorities: digests of the CAs of client certificates.
        doubts: what should be seen to and is no reason to refuse.
    """

    tokens: Tokens
    endpoints: Mapping[str, Endpoint]
    context: SecuredContext | None
    authorities: frozenset[bytes]
    doubts: Sequence[str]


def read_access(
    settings: HttpSettings,
    formats: Mapping[str, Format],
    default: str,
) -> Access:
    """Reads all files; for a thread, if something else is going on.

    Args:
        settings: that name the files.
        formats: of the records of each pipeline.
        default: the pipeline of requests that name none.

    Raises:
        ConfigError: with one line for everything that is wrong; no secret is quoted.
    """
    problems: list[str] = []
    doubts: list[str] = []
    tokens = read_tokens(settings.tokens, problems)
    access = Access(
        tokens,
        _endpoints(EndpointContext(settings, formats, default, problems)),
        *_tls(settings, problems, doubts),
        doubts,
    )
    problems += [
        f"endpoint {name}: {fault}"
        for name, endpoint in access.endpoints.items()
        for header in endpoint.keep_headers
        if (fault := secret_header(header))
    ]
    if problems:
        raise ConfigError(problem="\n".join(problems))
    return access


def _tls(
    settings: HttpSettings, problems: list[str], doubts: list[str]
) -> tuple[SecuredContext | None, frozenset[bytes]]:
    """The TLS context, and digests of the CAs of client certificates."""
    if not settings.tls.certificate:
        return None, frozenset()
    from ingestd.http.tls import make_context, read_authorities  # noqa: PLC0415  many do without

    return make_context(settings.tls, problems, doubts), read_authorities(settings.tls)


def _endpoints(context: EndpointContext) -> dict[str, Endpoint]:
    """Builds the endpoints that are in use, by name."""
    found: dict[str, Endpoint] = {}
    paths = {"/": "the page", "/openapi.json": "the description"}
    needed = WITHOUT_TABLE if context.settings.webhooks else WITHOUT_TABLE - {"webhooks"}
    for name in ENDPOINTS.names():
        own = context.settings.endpoints.get(name)
        if name in needed:
            found[name] = ENDPOINTS.load(name)(context)
        elif own is not None and own.pipeline:
            theirs = context._replace(default=own.pipeline, own=own)
            found[name] = ENDPOINTS.load(name)(theirs)
        for path in {spec.path for spec in found[name].routes} if name in found else ():
            if paths.setdefault(path, name) != name:
                text = f"its path {path} is that of {paths[path]}"
                context.problems.append(f"http.endpoints.{name}: {text}")
    return found


def routes_off(
    settings: HttpSettings, on: Mapping[str, Endpoint], formats: Mapping[str, Format], default: str
) -> dict[str, Resource[str]]:
    """The names of the endpoints that are off, by the paths that they would have."""
    found: dict[str, Resource[str]] = {}
    for name in ENDPOINTS.names():
        if name in on or name in WITHOUT_TABLE:
            continue
        try:
            kind = ENDPOINTS.load(name)
            own = (kind.settings or EndpointSettings)(pipeline=default)
            endpoint = kind(EndpointContext(settings, formats, default, [], own))
            paths = [spec.path_of(ANY) for spec in endpoint.routes]
            paths += [endpoint.prefix + BELOW] if endpoint.prefix else []
        except Exception:  # noqa: BLE001, S112  one of a package that is broken has no hint
            continue
        for path in paths:
            found.setdefault(path, Resource(ALL_METHODS, name))
    return found


def check_exposure(settings: HttpSettings, sockets: Sequence[socket.socket]) -> None:
    """Passed sockets are where they are, whatever `http.listen` says.

    Raises:
        ConfigError: no credentials of clients are set, and more than this machine can reach one.
    """
    problems = [
        f"the passed socket {show_socket(sock)} {text}"
        for sock in sockets
        if (text := at_large(settings, local=is_local(sock)))
    ]
    if problems:
        raise ConfigError(problem="\n".join(problems))
