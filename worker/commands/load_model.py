"""Loads the model for a command, in a process that is the worker's own."""

import logging

from worker.model.sentiment_model import SentimentModel
from worker.runtime.memory import keep_freed_blocks
from worker.settings.shared import ModelSettings


def load_from_settings(settings: ModelSettings) -> SentimentModel:
    """The model that the settings name. Blocks for up to seconds. Raises ModelError, BackendError."""
    prepare_process()
    return SentimentModel.load(
        settings.model,
        revision=settings.revision,
        activation=settings.activation,
        normalize=settings.normalize,
        long_text=settings.long_text,
        max_windows=settings.max_windows,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        cpu_threads=settings.cpu_threads,
        max_batch_tokens=settings.max_batch_tokens,
    )


def prepare_process() -> None:
    """Sets this process up for scoring, which SentimentModel.load leaves to whoever owns the process.

    Freed memory is kept, and the log lines of transformers and of the hub's client go where the worker's go.
    """
    keep_freed_blocks()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
