"""Trains a model to classify texts, on rows balanced by source and class."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.training.dataset import Counts, Example, draw
from worker.training.optimisation import (
    Batch,
    WeightMean,
    hidden_tokens,
    most_tokens,
    optimise,
    padded,
    shuffled_batches,
    token_ids,
)
from worker.training.training_run import TrainingRun


def fine_tune(run: TrainingRun, tokenizer: Any, model: Any, examples: list[Example], counts: Counts) -> bool:
    """Trains `model` to classify, in place, and leaves it with the running mean of its weights.

    Answers whether KeyboardInterrupt ended it early; raises it if no step had ended yet. Raises Diverged.
    """
    options = run.options
    model.to(run.device)
    limit = min(options.max_tokens, most_tokens(tokenizer, model))
    rows = token_ids(tokenizer, [example.text for example in examples], limit)
    labels = torch.tensor([example.label for example in examples], device=run.device)
    masking = options.token_masking if tokenizer.mask_token_id is not None else 0.0

    def loss_of(batch: Batch) -> Tensor:
        ids = padded([rows[place] for place in batch], tokenizer.pad_token_id, run.device)
        wanted = labels[batch]
        if options.consistency:
            ids, wanted = ids.repeat(2, 1), wanted.repeat(2)
        seen = (ids != tokenizer.pad_token_id).long()
        if masking:
            ids = ids.masked_fill(hidden_tokens(ids, tokenizer, masking), tokenizer.mask_token_id)
        logits = model(input_ids=ids, attention_mask=seen).logits.float()
        loss = _label_loss(logits, wanted)
        return loss + options.consistency * _disagreement(logits) if options.consistency else loss

    model.train()
    rate = options.learning_rate or (5e-4 if options.base is None else 3e-5)
    batches = [batch for _ in range(options.epochs) for batch in _drawn_batches(run, rows, examples, counts)]
    mean = WeightMean(list(model.parameters()), options.averaging)
    try:
        optimise(run, mean.parameters, batches, loss_of, rate, "fine-tuning", mean.add)
    except KeyboardInterrupt:
        if not mean.steps:
            raise
        if mean.steps < len(batches):
            run.note(
                f"Fine-tuning was interrupted after {mean.steps} of {len(batches)} steps; the weights so far are kept."
            )
    mean.take_over()
    return mean.steps < len(batches)


def _drawn_batches(run: TrainingRun, rows: list[list[int]], examples: list[Example], counts: Counts) -> list[Batch]:
    """One epoch's batches, of rows that are drawn anew and balanced by `counts`."""
    drawn = draw(examples, counts, run.rng)
    batches = shuffled_batches([len(rows[place]) for place in drawn], run.options.batch_texts, run.rng)
    return [[drawn[at] for at in batch] for batch in batches]


def _label_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy for the label, plus binary cross-entropy per label.

    The score is made of sigmoids, and cross-entropy alone says nothing about their level.
    """
    each = functional.one_hot(wanted, logits.shape[-1]).to(logits.dtype)
    return functional.cross_entropy(logits, wanted) + functional.binary_cross_entropy_with_logits(logits, each)


def _disagreement(logits: Tensor) -> Tensor:
    """Symmetric KL divergence between the halves of the rows, which are the same texts (R-Drop: Liang et al., 2021)."""
    one, two = functional.log_softmax(logits, -1).chunk(2)
    return 0.5 * (
        functional.kl_div(one, two, log_target=True, reduction="batchmean")
        + functional.kl_div(two, one, log_target=True, reduction="batchmean")
    )
