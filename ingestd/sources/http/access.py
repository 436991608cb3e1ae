"""Access control data from the settings and their files, read at the start and on SIGHUP."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.errors import ConfigError
from ingestd.host.sockets import is_local, show_socket
from ingestd.http.credentials import Tokens, read_tokens
from ingestd.http.settings import at_large
from ingestd.http.tls import make_context, read_authorities
from ingestd.registry import ENDPOINTS
from ingestd.sources.http.endpoints.base import EndpointContext

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.http.settings import HttpSettings
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
    context: ssl.SSLContext | None
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
    context = EndpointContext(settings, formats, default, problems)
    access = Access(
        tokens,
        {name: build(context) for name, build in ENDPOINTS.load_all().items()},
        make_context(settings.tls, problems, doubts),
        read_authorities(settings.tls),
        doubts,
    )
    if problems:
        raise ConfigError(problem="\n".join(problems))
    return access


def check_exposure(settings: HttpSettings, sockets: Sequence[socket.socket]) -> None:
    """Passed sockets are where they are, whatever `http.listen` says.

    Raises:
        ConfigError: nothing says who may come in, and more than this machine can reach one.
    """
    problems = [
        f"the passed socket {show_socket(sock)} {text}"
        for sock in sockets
        if (text := at_large(settings, local=is_local(sock)))
    ]
    if problems:
        raise ConfigError(problem="\n".join(problems))
