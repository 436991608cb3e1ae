from __future__ import annotations

from tests.pipeline.conftest import start

__all__ = ["start"]
