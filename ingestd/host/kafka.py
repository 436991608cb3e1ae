"""Clients of Kafka: the configuration that those of a source and of a sink have in common."""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple

CONNECT_SECONDS = 5.0
"""Bound of a connection, and of a question that needs no work."""
# librdkafka would write to standard error; what matters of it is told by `error_cb` or a failure.
LOGGER = logging.getLogger("ingestd.kafka")
"""Logger of librdkafka's clients, which goes nowhere."""
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False
_SECRET = re.compile(r"password|passphrase|secret|key\.pem$|oauthbearer\.config$")


class KafkaAccess(NamedTuple):
    """Brokers and credentials; a text is empty where there is none.

    Attributes:
        brokers: `HOST:PORT` of brokers, with commas between them.
        security: `security.protocol`.
        sasl_mechanism: the mechanism of authentication, used with `sasl_…`.
        username: the name, with `sasl_…`.
        password: the password of the name.
        tls_files: authorities, a client certificate and its key, in PEM.
    """

    brokers: str
    security: str
    sasl_mechanism: str
    username: str
    password: str
    tls_files: tuple[str, str, str]

    def config(self) -> dict[str, Any]:
        """Returns librdkafka's properties of any client."""
        config: dict[str, Any] = {
            "bootstrap.servers": self.brokers, "client.id": "ingestd",
            "security.protocol": self.security, "reconnect.backoff.max.ms": 1000,
            "socket.connection.setup.timeout.ms": int(CONNECT_SECONDS * 1000),
        }  # fmt: skip
        if self.security.startswith("sasl"):
            config["sasl.mechanism"] = self.sasl_mechanism
            config["sasl.username"], config["sasl.password"] = self.username, self.password
        ca, certificate, key = self.tls_files
        # A file may have both the certificate and its key.
        for name, path in (("ca", ca), ("certificate", certificate), ("key", key or certificate)):
            if path:
                config[f"ssl.{name}.location"] = path
        return config


def property_problem(name: str) -> str:
    """Returns why one of librdkafka's properties can't be set as one; empty if it can.

    Properties are shown with the settings, and secrets have options of their own or files.
    """
    if _SECRET.search(name):
        return f"{name} would be shown; no secret belongs there"
    return ""
