"""Moves texts through a sentiment model, from Kafka to Kafka."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.model.sentiment_model import SentimentModel

    __version__: str

__all__ = ["SentimentModel", "__version__"]


def __getattr__(name: str) -> object:
    """Imports ``SentimentModel`` and ``__version__`` when they are asked for, so that the package itself brings no torch."""
    if name == "SentimentModel":
        from worker.model.sentiment_model import SentimentModel  # noqa: PLC0415

        return SentimentModel
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            return version("sentiment-worker")  # as in pyproject.toml when it was installed
        except PackageNotFoundError:
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
