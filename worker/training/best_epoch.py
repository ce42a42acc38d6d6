"""Chooses the epoch of a fine-tuning whose weights are kept, by macro-F1 on development rows, and says when to stop."""

from collections.abc import Callable

from torch import Tensor

from worker.training.optimisation import WeightMean


class BestEpoch:
    """The weights of one fine-tuning: `mean`, the running mean over its steps, or what that was after the best epoch."""

    def __init__(
        self,
        mean: WeightMean,
        steps: int,
        epochs: int,
        measure: Callable[[], float] | None = None,
        patience: int | None = None,
    ) -> None:
        """Chooses among `epochs` epochs, which have `steps` steps in all, and each as many as another.

        `measure`: macro-F1 with the weights that the model has now; None for nothing. `patience`: how many epochs in a
        row may be no better than the best one; None to keep the last epoch and never stop.
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
        """Adds the weights after a step, counted from 1, and measures their mean after the last of an epoch.

        Answers whether training should stop. Blocks for as long as measuring takes.
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
        """The first epoch with the best macro-F1, counted from 1. There is one after the first epoch."""
        return self.scores.index(max(self.scores)) + 1

    def weights(self) -> list[Tensor]:
        """The weights to keep: those after the best epoch, or without patience the mean as it is now."""
        return self._best or self.mean.values()
