"""jaxpost: post-training for language models in JAX. Importing it imports nothing heavy (PEP 562)."""

__version__ = "0.1.0"
__all__ = ["Config", "run"]


def __getattr__(name: str):
    if name == "run":
        from jaxpost.train import run

        return run
    if name == "Config":
        from jaxpost.config import Config

        return Config
    raise AttributeError(f"module 'jaxpost' has no attribute {name!r}")
