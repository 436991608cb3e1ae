from __future__ import annotations

# As the entry point has them, also where the package is installed without it.
from ingestd.testing.plugin import ingestd_async_harness, ingestd_harness

__all__ = ["ingestd_async_harness", "ingestd_harness"]
