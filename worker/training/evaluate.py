"""Macro-F1 of a classifier on labelled CSV sources, in the form of the model card's table. Pure: no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from worker.printable import printable
from worker.training.dataset import CLASSES, Example, HoldOutBy, LabelledFile, is_held_out, read_source

Matrix = NDArray[np.int64]
"""A square confusion matrix: rows are the true classes, columns the predicted ones, both in the order of the classes."""

Predict = Callable[[list[str]], Sequence[str | None]]
"""N texts → N labels, each one of the classes (`CLASSES` in upper or lower case)."""


def confusion(truth: Iterable[int], predicted: Iterable[int], classes: int = len(CLASSES)) -> Matrix:
    """Counts of (true class, predicted class), from the class ids of N texts and those predicted for them."""
    matrix = np.zeros((classes, classes), np.int64)
    for true, guess in zip(truth, predicted, strict=True):
        matrix[true, guess] += 1
    return matrix


def class_f1(matrix: Matrix) -> NDArray[np.float64]:
    """F1 of each class, 2·TP / (2·TP + FP + FN), the harmonic mean of precision and recall; NaN without a true row.

    van Rijsbergen, Information Retrieval, 2nd ed. 1979, chapter 7 (F = 1 − E with equal weights).
    """
    hits = matrix.diagonal().astype(np.float64)
    true, predicted = matrix.sum(1), matrix.sum(0)
    return np.where(true > 0, 2 * hits / np.maximum(true + predicted, 1), np.nan)


def macro_f1(matrix: Matrix) -> float:
    """The mean F1 of the classes that have true rows (a source may lack one); NaN without any row.

    The mean of F1s, not the F1 of mean precision and recall: Opitz and Burst, "Macro F1 and Macro F1", 2019.
    """
    scores = class_f1(matrix)
    present = ~np.isnan(scores)
    return float(scores[present].mean()) if present.any() else float("nan")


@dataclass(frozen=True)
class EvaluationReport:
    """The figures of a classifier: a confusion matrix per source, in the order of the sources."""

    matrices: Mapping[str, Matrix]
    classes: Sequence[str] = CLASSES

    @property
    def overall(self) -> Matrix:
        """All sources' rows in one confusion matrix."""
        return sum(self.matrices.values(), np.zeros((len(self.classes), len(self.classes)), np.int64))

    @property
    def macro_f1(self) -> float:
        """Macro-F1 over the rows of all sources together."""
        return macro_f1(self.overall)

    def markdown(self) -> str:
        """The model card's table: `| Source | Macro F1 |`, one line per source."""
        lines = ["| Source | Macro F1 |", "| ----------- | ----------- |"]
        lines += [f"| {name} | {macro_f1(matrix):.4f} |" for name, matrix in self.matrices.items()]
        return "\n".join(lines)

    def table(self) -> Group:
        """For `rich.print`: macro-F1 per source and overall, then the confusion matrix of all rows."""
        scores = Table("Source", title="Macro F1")
        for heading in ("Macro F1", "Texts", *map(_shown, self.classes)):
            scores.add_column(heading, justify="right")
        for name, matrix in self.matrices.items():
            scores.add_row(*_score_cells(name, matrix))
        scores.add_section()
        scores.add_row(*_score_cells("overall", self.overall))
        counts = Table("true \\ predicted", title="Confusion matrix")
        for name in self.classes:
            counts.add_column(_shown(name), justify="right")
        for name, row in zip(self.classes, self.overall, strict=True):
            counts.add_row(_shown(name), *(f"{count:,}" for count in row))
        return Group(scores, counts)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, six decimals: `{"classes", "sources": {name: figures}, "overall": figures}`."""
        return {
            "classes": list(self.classes),
            "sources": {name: _figures(matrix, self.classes) for name, matrix in self.matrices.items()},
            "overall": _figures(self.overall, self.classes),
        }


def _score_cells(name: str, matrix: Matrix) -> list[str]:
    scores = [macro_f1(matrix), *class_f1(matrix)]
    shown = ["–" if np.isnan(score) else f"{score:.4f}" for score in scores]
    return [_shown(name), shown[0], f"{int(matrix.sum()):,}", *shown[1:]]


def _shown(name: str) -> str:
    return escape(printable(name))


def _figures(matrix: Matrix, classes: Sequence[str]) -> dict[str, Any]:
    f1 = {name: _number(score) for name, score in zip(classes, class_f1(matrix), strict=True)}
    return {
        "macro_f1": _number(macro_f1(matrix)),
        "f1": f1,
        "texts": int(matrix.sum()),
        "confusion": matrix.tolist(),
    }


def _number(score: float) -> float | None:
    return None if np.isnan(score) else round(float(score), 6)


def evaluate(
    predict: Predict, sources: Sequence[LabelledFile], *, held_out_only: bool = False, hold_out_by: HoldOutBy = "exact"
) -> EvaluationReport:
    """Measures `predict` on every source, or on its held-out rows alone. Blocks.

    `predict` is called once per source with all its texts, and batches them itself. Raises ValueError where a source has
    no held-out row, and as `read_source` and `evaluate_examples` do.
    """
    rows = {source.name: read_source(source) for source in sources}
    if held_out_only:
        rows = {name: [e for e in examples if is_held_out(e.text, hold_out_by)] for name, examples in rows.items()}
    for name, examples in rows.items():
        if not examples:
            raise ValueError(f"source {name!r} has no held-out row; evaluate all of its rows instead")
    return evaluate_examples(predict, rows, sources[0].classes if sources else CLASSES)


def evaluate_examples(
    predict: Predict, rows: Mapping[str, Sequence[Example]], classes: Sequence[str] = CLASSES
) -> EvaluationReport:
    """Measures `predict` on examples by source name. Blocks.

    Raises ValueError where `predict` gives a label that is none of the classes, or raises FloatingPointError.
    """
    matrices = {}
    for name, examples in rows.items():
        try:
            labels = predict([example.text for example in examples])
        except FloatingPointError:
            raise ValueError(
                f"source {name!r}: the model does not answer with finite numbers, so there is nothing to measure; its "
                "weights are damaged, or its training diverged"
            ) from None
        predicted = (_class_id(label, classes) for label in labels)
        matrices[name] = confusion((e.label for e in examples), predicted, len(classes))
    return EvaluationReport(matrices, classes)


def _class_id(label: str | None, classes: Sequence[str]) -> int:
    for each in () if label is None else (label, label.lower()):
        if each in classes:
            return classes.index(each)
    raise ValueError(f"the model gives the label {label!r}; it must be one of {', '.join(classes)}")
