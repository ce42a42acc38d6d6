"""The answers of a classifier to labelled texts, and their figures as tables, Markdown and JSON. Pure: no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from worker.printable import printable
from worker.training.classification_metrics import (
    Difference,
    Floats,
    Ids,
    Matrix,
    calibration_error,
    class_f1,
    confusion,
    macro_f1,
    macro_f1_difference,
)
from worker.training.dataset import CLASSES, Example

MOST_COLUMNS = 6
"""The most classes that a table has a column for; a terminal is too narrow for more."""


@dataclass(frozen=True)
class Predictions:
    """The answers of a classifier to the N ≥ 0 examples of a source.

    `probabilities` (N, K) has a column for each class. The predicted class is the one with the largest probability.
    """

    examples: Sequence[Example]
    probabilities: Floats

    @cached_property
    def truth(self) -> Ids:
        """The true class of each example."""
        return np.array([example.label for example in self.examples], np.intp)

    @cached_property
    def predicted(self) -> Ids:
        """The predicted class of each example."""
        best: Ids = self.probabilities.argmax(1)
        return best

    @cached_property
    def matrix(self) -> Matrix:
        """The confusion matrix."""
        return confusion(self.truth, self.predicted, self.probabilities.shape[1])

    @property
    def calibration_error(self) -> float:
        """How far the probability of the predicted class is from the share of such predictions that are right."""
        return calibration_error(self.probabilities.max(1), self.truth == self.predicted)

    def margins(self) -> Floats:
        """The true class's probability minus the largest other one, by example; negative if the prediction is wrong."""
        rows, others = np.arange(len(self.truth)), self.probabilities.copy()
        others[rows, self.truth] = -np.inf
        margins: Floats = self.probabilities[rows, self.truth] - others.max(1, initial=-np.inf)
        return margins


@dataclass(frozen=True)
class EvaluationReport:
    """The figures of a classifier, computed from its predictions by source."""

    predictions: Mapping[str, Predictions]
    classes: Sequence[str] = CLASSES

    @cached_property
    def together(self) -> Predictions:
        """All sources' predictions."""
        return Predictions(
            [example for each in self.predictions.values() for example in each.examples],
            np.concatenate([np.zeros((0, len(self.classes))), *(e.probabilities for e in self.predictions.values())]),
        )

    @property
    def overall(self) -> Matrix:
        """All sources' rows in one confusion matrix."""
        return self.together.matrix

    @property
    def macro_f1(self) -> float:
        """Macro-F1 over the rows of all sources together."""
        return macro_f1(self.overall)

    def remarks(self) -> list[str]:
        """A sentence for each source that has no row of some class, because its macro-F1 is a mean over fewer classes."""
        said = []
        for name, each in self.predictions.items():
            missing = _missing(each.matrix, self.classes)
            if missing:
                present = len(self.classes) - len(missing)
                said.append(
                    f"The macro F1 of {name} is over {present} of {len(self.classes)} classes: "
                    f"it has no row of {', '.join(missing)}."
                )
        return said

    def markdown(self) -> str:
        """The model card's table: `| Source | Macro F1 |`, one line per source; remarks below it."""
        lines = ["| Source | Macro F1 |", "| ----------- | ----------- |"]
        lines += [f"| {name} | {macro_f1(each.matrix):.4f} |" for name, each in self.predictions.items()]
        return "\n".join([*lines, *(f"\n{remark}" for remark in self.remarks())])

    def table(self) -> Group:
        """For `rich.print`: macro-F1 per source and overall, F1 per class, the confusion matrix of all rows, remarks."""
        few = len(self.classes) <= MOST_COLUMNS
        scores = Table("Source", title="Macro F1")
        for heading in ("Macro F1", "Calibration error", "Texts", *(self.classes if few else ())):
            scores.add_column(_shown(heading), justify="right")
        for name, each in self.predictions.items():
            scores.add_row(*_score_cells(name, each, few))
        scores.add_section()
        scores.add_row(*_score_cells("overall", self.together, few))
        remarks: Iterable[RenderableType] = map(_shown, self.remarks())
        return Group(scores, self._confusion_table() if few else self._class_table(), *remarks)

    def _confusion_table(self) -> Table:
        counts = Table("true \\ predicted", title="Confusion matrix")
        for name in self.classes:
            counts.add_column(_shown(name), justify="right")
        for name, row in zip(self.classes, self.overall, strict=True):
            counts.add_row(_shown(name), *(f"{count:,}" for count in row))
        return counts

    def _class_table(self) -> Table:
        table = Table("Class", title="F1 per class")
        for heading in ("F1", "Texts"):
            table.add_column(heading, justify="right")
        for name, score, texts in zip(self.classes, class_f1(self.overall), self.overall.sum(1), strict=True):
            table.add_row(_shown(name), _four_decimals(score), f"{int(texts):,}")
        return table

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, six decimals: `{"classes", "sources": {name: figures}, "overall": figures}`."""
        return {
            "classes": list(self.classes),
            "sources": {name: self._figures(each) for name, each in self.predictions.items()},
            "overall": self._figures(self.together),
        }

    def _figures(self, predictions: Predictions) -> dict[str, Any]:
        matrix = predictions.matrix
        return {
            "macro_f1": _number(macro_f1(matrix)),
            "f1": {name: _number(score) for name, score in zip(self.classes, class_f1(matrix), strict=True)},
            "missing_classes": _missing(matrix, self.classes),
            "calibration_error": _number(predictions.calibration_error),
            "texts": int(matrix.sum()),
            "confusion": matrix.tolist(),
        }


@dataclass(frozen=True)
class Comparison:
    """Two reports on the same rows: that of a model, and that of another one (`against`) that it is compared with."""

    ours: EvaluationReport
    against: EvaluationReport
    names: tuple[str, str]
    """Of the two models."""

    @cached_property
    def by_source(self) -> dict[str, Difference]:
        """Macro-F1 of the model minus that of the other one, on the rows of each source."""
        return {name: _difference(each, self.against.predictions[name]) for name, each in self.ours.predictions.items()}

    @cached_property
    def overall(self) -> Difference:
        """The same over the rows of all sources together."""
        return _difference(self.ours.together, self.against.together)

    def table(self) -> Group:
        """For `rich.print`: both models' macro-F1, and the difference with its interval, per source and overall."""
        table = Table("Source", title="Difference of macro F1, with its 95 % interval")
        for heading in ("Model", "Against", "Difference", "From", "To"):
            table.add_column(heading, justify="right")
        for name, difference in self.by_source.items():
            matrices = [report.predictions[name].matrix for report in (self.ours, self.against)]
            table.add_row(_shown(name), *_difference_cells(matrices, difference))
        table.add_section()
        table.add_row("overall", *_difference_cells([self.ours.overall, self.against.overall], self.overall))
        return Group(table, _shown(self.verdict()))

    def verdict(self) -> str:
        """One sentence: whether the interval of all rows together leaves a doubt about which model is better."""
        model, other = self.names
        _, low, high = self.overall
        if low > 0:
            return f"{model} is better than {other} on these rows: the interval is above 0."
        if high < 0:
            return f"{model} is worse than {other} on these rows: the interval is below 0."
        return f"These rows do not say which of {model} and {other} is better: the interval holds 0."

    def as_json(self) -> dict[str, Any]:
        """The other model's name and figures; in `sources` and `overall`, `difference` and its `interval`, too."""
        figures = self.against.as_json()
        for name, difference in self.by_source.items():
            figures["sources"][name] |= _difference_figures(difference)
        figures["overall"] |= _difference_figures(self.overall)
        return {"model": self.names[1], **figures}


def _difference(ours: Predictions, theirs: Predictions) -> Difference:
    return macro_f1_difference(ours.truth, ours.predicted, theirs.predicted, ours.probabilities.shape[1])


def _difference_cells(matrices: Iterable[Matrix], difference: Difference) -> list[str]:
    return [*(_four_decimals(macro_f1(matrix)) for matrix in matrices), *(f"{value:+.4f}" for value in difference)]


def _difference_figures(difference: Difference) -> dict[str, Any]:
    value, *interval = map(_number, difference)
    return {"difference": value, "interval": interval}


def _missing(matrix: Matrix, classes: Sequence[str]) -> list[str]:
    return [name for name, texts in zip(classes, matrix.sum(1), strict=True) if not texts]


def _score_cells(name: str, predictions: Predictions, with_classes: bool) -> list[str]:
    matrix = predictions.matrix
    classes = [_four_decimals(score) for score in class_f1(matrix)] if with_classes else []
    figures = [_four_decimals(macro_f1(matrix)), _four_decimals(predictions.calibration_error)]
    return [_shown(name), *figures, f"{int(matrix.sum()):,}", *classes]


def _shown(name: str) -> str:
    return escape(printable(name))


def _four_decimals(score: float) -> str:
    return "–" if np.isnan(score) else f"{score:.4f}"


def _number(score: float) -> float | None:
    return None if np.isnan(score) else round(float(score), 6)
