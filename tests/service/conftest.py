from tests.pipeline.conftest import start

__all__ = ["start"]
