"""Chooses the epoch of a fine-tuning whose weights are kept, by macro-F1 on development rows, and when to stop training."""

from collections.abc import Callable

from torch import Tensor

from worker.training.optimisation import WeightMean


class BestEpoch:
    """Keeps the weights of one fine-tuning: the running mean over its steps, or what that was after the best epoch."""

    def __init__(
        self,
        mean: WeightMean,
        steps: int,
        epochs: int,
        measure: Callable[[], float] | None = None,
        patience: int | None = None,
    ) -> None:
        """The fine-tuning has `steps` steps in `epochs` epochs of equal length.

        `measure` returns the macro-F1 of the model's present weights; with None nothing is measured. Training stops
        after `patience` epochs in a row without a better macro-F1; with None the last epoch is kept, and training never
        stops early.
        """
        self.mean = mean
        self.steps = steps
        self.scores: list[float] = []
        """Macro-F1 after each epoch."""
        self._epoch_steps = steps // epochs
        self._measure = measure
        self._patience = patience
        self._best: list[Tensor] | None = None

    def stepped(self, step: int) -> bool:
        """Adds the weights after step `step`, counted from 1. After the last step of an epoch it measures their mean.

        Returns whether training should stop. Blocks while it measures.
        """
        self.mean.add(step)
        if self._measure is None or step % self._epoch_steps:
            return False
        with self.mean.in_place():
            self.scores.append(self._measure())
        if self._patience is None:
            return False
        if self.best_epoch == len(self.scores):
            self._best = self.mean.values()
        return len(self.scores) - self.best_epoch >= self._patience

    @property
    def best_epoch(self) -> int:
        """The first epoch with the best macro-F1, counted from 1. At least one epoch has to be measured."""
        return self.scores.index(max(self.scores)) + 1

    def weights(self) -> list[Tensor]:
        """The weights to keep: with patience those after the best epoch, else the mean as it is now."""
        return self._best or self.mean.values()
