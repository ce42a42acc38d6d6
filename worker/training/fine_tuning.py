"""Trains a model to classify texts, on rows balanced by source and class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.training.best_epoch import BestEpoch
from worker.training.classification_metrics import macro_f1
from worker.training.dataset import Counts, Example, draw
from worker.training.evaluation_report import Predictions
from worker.training.optimisation import (
    Batch,
    WeightMean,
    assign,
    copies,
    hidden_tokens,
    most_tokens,
    optimise,
    padded,
    shuffled_batches,
    token_ids,
)
from worker.training.prediction import probabilities
from worker.training.progress import Progress
from worker.training.training_run import Diverged, TrainingRun


class FineTuning:
    """Trains one model to classify, in place, once or several times from the same start."""

    def __init__(
        self,
        run: TrainingRun,
        tokenizer: Any,
        model: Any,
        examples: Sequence[Example],
        counts: Counts,
        development: Sequence[Example] = (),
    ) -> None:
        """`examples`: to train on, drawn by `counts`. `development`: to measure on after each epoch; empty for nothing."""
        options = run.options
        model.to(run.device)
        limit = min(options.max_tokens, most_tokens(tokenizer, model))
        self._run = run
        self._tokenizer = tokenizer
        self._model = model
        self._parameters = list(model.parameters())
        self._examples = examples
        self._counts = counts
        self._development = development
        self._rows = token_ids(tokenizer, [example.text for example in examples], limit)
        self._labels = torch.tensor([example.label for example in examples], device=run.device)
        self._masking = options.token_masking if tokenizer.mask_token_id is not None else 0.0

    def train(self) -> bool:
        """Fine-tunes the model, and leaves it with the running mean of its weights. Blocks for minutes to hours.

        With `fine_tunings` above 1 that is done so many times, each time from the weights that the model has now and with
        other random numbers, and the mean of the results is left (Wortsman et al., "Model soups", ICML 2022). Answers
        whether KeyboardInterrupt ended it early; raises it if no step had ended yet. Raises Diverged.
        """
        times = self._run.options.fine_tunings
        start, results = copies(self._parameters), list[list[Tensor]]()
        for number in range(1, times + 1):
            assign(self._parameters, start)
            stage = f"fine-tuning {number} of {times}" if times > 1 else "fine-tuning"
            best, stopped = self._train_once(stage)
            unfinished = stopped and best.mean.steps < best.steps
            if not unfinished or (best.mean.steps and not results):
                results.append(best.weights())
            if stopped:
                break
        if not results:
            raise KeyboardInterrupt
        interrupted = unfinished or len(results) < times
        if interrupted:
            kept = (
                f"the mean of the finished ones ({len(results)}) is kept"
                if number > 1
                else "the weights so far are kept"
            )
            self._run.note(
                f"{stage.capitalize()} was interrupted after {best.mean.steps} of {best.steps} steps; {kept}."
            )
        assign(self._parameters, _mean(results))
        if self._development and len(results) > 1:
            self._note(f"Mean of {len(results)} fine-tunings: development macro F1 {self._development_f1():.4f}.")
        return interrupted

    def _train_once(self, stage: str) -> tuple[BestEpoch, bool]:
        """The weights that one fine-tuning ends with, and whether there was a KeyboardInterrupt."""
        options = self._run.options
        rate = options.learning_rate or (5e-4 if options.base is None else 3e-5)
        batches = [batch for _ in range(options.epochs) for batch in self._drawn_batches()]
        mean = WeightMean(self._parameters, options.averaging)

        def measure() -> float:
            score = self._development_f1()
            self._note(f"{stage.capitalize()}, epoch {len(best.scores) + 1}: development macro F1 {score:.4f}.")
            return score

        best = BestEpoch(mean, len(batches), options.epochs, measure if self._development else None, options.patience)
        self._model.train()
        stopped = False
        try:
            optimise(self._run, self._parameters, batches, self._loss, rate, stage, best.stepped)
        except KeyboardInterrupt:
            stopped = True
        if options.patience and best.scores:
            self._note(f"{stage.capitalize()}: the weights after epoch {best.best_epoch} are kept.")
        return best, stopped

    def _drawn_batches(self) -> list[Batch]:
        """One epoch's batches, of rows that are drawn anew and balanced by the counts."""
        drawn = draw(self._examples, self._counts, self._run.rng)
        lengths = [len(self._rows[place]) for place in drawn]
        batches = shuffled_batches(lengths, self._run.options.batch_texts, self._run.rng)
        return [[drawn[at] for at in batch] for batch in batches]

    def _loss(self, batch: Batch) -> Tensor:
        tokenizer, consistency = self._tokenizer, self._run.options.consistency
        ids = padded([self._rows[place] for place in batch], tokenizer.pad_token_id, self._run.device)
        wanted = self._labels[batch]
        if consistency:
            ids, wanted = ids.repeat(2, 1), wanted.repeat(2)
        seen = (ids != tokenizer.pad_token_id).long()
        if self._masking:
            ids = ids.masked_fill(hidden_tokens(ids, tokenizer, self._masking), tokenizer.mask_token_id)
        logits = self._model(input_ids=ids, attention_mask=seen).logits.float()
        loss = _label_loss(logits, wanted)
        return loss + consistency * _disagreement(logits) if consistency else loss

    def _development_f1(self) -> float:
        """Macro-F1 on the development rows with the weights that the model has now. Blocks. Raises Diverged."""
        texts = [example.text for example in self._development]
        try:
            answers = probabilities(self._run, self._tokenizer, self._model, "development rows", texts)
        except FloatingPointError:
            raise Diverged(
                "the training diverged: a logit of the model is no finite number; nothing was written"
            ) from None
        return macro_f1(Predictions(self._development, answers).matrix)

    def _note(self, sentence: str) -> None:
        """Puts a sentence into the model card, and shows it."""
        self._run.notes.append(sentence)
        self._run.report(Progress("development rows", 1, 1, line=sentence))


def _mean(results: Sequence[list[Tensor]]) -> list[Tensor]:
    """The mean of each weight over results of the same shapes; one result is left as it is, to its last bit."""
    return results[0] if len(results) == 1 else [torch.stack(each).mean(0) for each in zip(*results, strict=True)]


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
