"""Facts that a handler class can ask for: pipeline, data directory, format."""

from __future__ import annotations

import msgspec


class Context(msgspec.Struct, frozen=True):
    """Facts about the pipeline, for a handler class whose `__init__` has a parameter of this type.

    The annotation asks for it, not the parameter's name: nothing is ever filled in that a class
    did not ask for in so many words, and an option can't set it.

    Attributes:
        pipeline: the pipeline's name; `default` for the one without a name.
        record_format: `json`, `text` or `bytes`.
        data_dir: the daemon's data directory, the same for all pipelines.
    """

    pipeline: str = "default"
    record_format: str = "json"
    data_dir: str = "ingestd-data"
