"""Loads the model for a command, in a process that is the worker's own."""

import logging
from typing import Any

from worker.core.sentiment import LabelSet
from worker.model.labels import LabelOptions, checkpoint_labels
from worker.model.loading import open_checkpoint
from worker.model.sentiment_model import SentimentModel
from worker.runtime.memory import keep_freed_blocks
from worker.settings.shared import CheckpointSettings, ModelSettings
from worker.settings.values import pairs, pairs_text


def load_from_settings(settings: ModelSettings) -> SentimentModel:
    """The model that the settings name. Blocks for up to seconds. Raises ModelError, BackendError."""
    prepare_process()
    return SentimentModel.load(
        settings.model,
        dtype=settings.dtype,
        backend=settings.backend,
        max_batch_tokens=settings.max_batch_tokens,
        **checkpoint_options(settings),
    )


def labels_from_settings(settings: CheckpointSettings) -> LabelSet:
    """The labels of the model that the settings name, by its config.json alone. Blocks. Raises ModelError."""
    options = checkpoint_options(settings)
    given = LabelOptions(**{name: options[name] for name in LabelOptions._fields})
    return checkpoint_labels(settings.model, open_checkpoint(settings.model, settings.revision).config, given).labels


def settings_for_another(settings: ModelSettings, model: str, revision: str | None) -> ModelSettings:
    """The same settings for another model to compare with: of ``model_labels`` those of labels that it has.

    Scores and thresholds are left out, for what is compared is labels. Blocks. Raises ModelError.
    """
    others = {"model": model, "revision": revision, "model_labels": None, "label_scores": None, "threshold": None}
    another = settings.model_copy(update=others)
    own = labels_from_settings(another).names
    renames = [pair for pair in pairs(settings.model_labels or "") if pair[0] in own]
    return another.model_copy(update={"model_labels": pairs_text(renames) or None})


def checkpoint_options(settings: CheckpointSettings) -> dict[str, Any]:
    """The arguments of ``SentimentModel.load`` that all commands with a model have settings for."""
    scores = settings.label_scores
    return {
        "revision": settings.revision,
        "model_labels": dict(pairs(settings.model_labels or "")),
        "label_scores": None if scores is None else {label: float(weight) for label, weight in pairs(scores)},
        "activation": settings.activation,
        "threshold": settings.threshold,
        "normalize": settings.normalize,
        "long_text": settings.long_text,
        "max_windows": settings.max_windows,
        "device": settings.device,
        "cpu_threads": settings.cpu_threads,
        "cuda_pass": settings.cuda_pass,
    }


def prepare_process() -> None:
    """Sets this process up for scoring, which SentimentModel.load leaves to whoever owns the process.

    Freed memory is kept, and the log lines of transformers and of the hub's client go where the worker's go.
    """
    keep_freed_blocks()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
