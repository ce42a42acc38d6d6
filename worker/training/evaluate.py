"""Asks a classifier about the rows of labelled CSV sources. Pure: no torch."""

from collections.abc import Callable, Collection, Mapping, Sequence

from worker.training.classification_metrics import Floats
from worker.training.dataset import CLASSES, Example, HoldOutBy, LabelledFile, is_held_out, read_source
from worker.training.evaluation_report import EvaluationReport, Predictions

Predict = Callable[[list[str]], Floats]
"""N texts → probabilities, N × K, columns as the classes."""


def read_rows(sources: Sequence[LabelledFile], *, held_out_by: Collection[HoldOutBy] = ()) -> dict[str, list[Example]]:
    """The rows of each source, by its name; with `held_out_by` only those that each of these rules holds out. Blocks.

    Raises ValueError where a source has no such row, and as `read_source` does.
    """
    rows = {}
    for source in sources:
        examples = read_source(source)
        rows[source.name] = [e for e in examples if all(is_held_out(e.text, by) for by in held_out_by)]
        if not rows[source.name]:
            raise ValueError(f"source {source.name!r} has no held-out row; evaluate all of its rows instead")
    return rows


def in_order(predict: Predict, labels: Sequence[str], classes: Sequence[str]) -> Predict:
    """`predict`, whose columns are as `labels`, with its columns in the order of `classes`.

    Raises ValueError where the two are not the same names.
    """
    if sorted(labels) != sorted(classes):
        raise ValueError(
            f"its labels are {', '.join(labels)}, and what it is compared with has {', '.join(classes)}; take two models "
            "with the same labels"
        )
    columns = [labels.index(name) for name in classes]
    return lambda texts: predict(texts)[:, columns]


def evaluate(
    predict: Predict, rows: Mapping[str, Sequence[Example]], classes: Sequence[str] = CLASSES
) -> EvaluationReport:
    """Measures `predict` on examples by source name. Blocks.

    `predict` is called once per source with all its texts, and batches them itself. Raises ValueError where it raises
    FloatingPointError.
    """
    predictions = {}
    for name, examples in rows.items():
        try:
            probabilities = predict([example.text for example in examples])
        except FloatingPointError:
            raise ValueError(
                f"source {name!r}: the model does not answer with finite numbers, so there is nothing to measure; its "
                "weights are damaged, or its training diverged"
            ) from None
        predictions[name] = Predictions(examples, probabilities)
    return EvaluationReport(predictions, classes)
