"""Asks a model of transformers about texts, as training has it or as it was read from a folder."""

from typing import Any

import torch

from worker.core.sentiment import to_probabilities
from worker.training.classification_metrics import Floats
from worker.training.optimisation import most_tokens, padded, token_ids
from worker.training.progress import Progress
from worker.training.training_run import TrainingRun


def probabilities(run: TrainingRun, tokenizer: Any, model: Any, stage: str, texts: list[str]) -> Floats:
    """N texts → probabilities, N × K, in float32 and without dropout; the model's mode stays as it is. Blocks.

    Draws no random number, so that a training goes on as if it had not been asked. `stage`: as the progress is reported.
    Raises FloatingPointError where a logit is not finite.
    """
    was_training, size = model.training, run.options.batch_texts
    rows = token_ids(tokenizer, texts, most_tokens(tokenizer, model))
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    logits = torch.empty(len(rows), model.config.num_labels)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), size):
            places = order[start : start + size]
            ids = padded([rows[place] for place in places], tokenizer.pad_token_id, run.device)
            logits[places] = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits.cpu()
            run.report(Progress(stage, min(start + size, len(order)), len(order)))
    model.train(was_training)
    if not logits.isfinite().all():
        raise FloatingPointError
    return to_probabilities(logits.numpy())
