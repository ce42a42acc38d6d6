"""Writes a model's answer to each row of an evaluation as CSV or JSON lines, the most confident errors first."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from worker.training.evaluation_report import EvaluationReport


def check_predictions_path(path: Path) -> None:
    """Raises ValueError with one sentence if ``path`` cannot be written to.

    It writes nothing, and leaves no file where there was none.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"--predictions {path} should end in {' or '.join(WRITERS)}, which says what is written")
    is_new = not os.path.lexists(path)
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"--predictions {path} cannot be written: {error.strerror or error}") from None


def check_no_source(path: Path, sources: Iterable[Path]) -> None:
    """Raises ValueError with one sentence where a file of predictions would overwrite a source."""
    if any(path.exists() and source.exists() and path.samefile(source) for source in sources):
        raise ValueError(f"--predictions {path} is a source, whose rows would be overwritten; name another file")


def write_predictions(path: Path, report: EvaluationReport, against: EvaluationReport | None = None) -> None:
    """Writes a row for each example: `source`, `text`, `label` (the true one), `predicted`, and each class's probability.

    If `against` is given, the report of another model on the same rows, a row also has `against`: that model's
    prediction. Rows are sorted by the probability of the true label minus the largest other one. So the most confident
    errors come first, and the most confident right answers last. Blocks on the disk; raises OSError.
    """
    WRITERS[path.suffix.lower()](path, _rows(report, against))


def _rows(report: EvaluationReport, against: EvaluationReport | None) -> Iterator[dict[str, Any]]:
    every, classes = report.together, report.classes
    others = against.together.predicted if against else None
    for place in np.argsort(every.margins(), kind="stable").tolist():
        example = every.examples[place]
        yield {
            "source": example.source,
            "text": example.text,
            "label": classes[example.label],
            "predicted": classes[every.predicted[place]],
            **({} if others is None else {"against": classes[others[place]]}),
            "probabilities": dict(zip(classes, every.probabilities[place].round(6).tolist(), strict=True)),
        }


def _write_csv(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = None
        for row in rows:
            probabilities = row.pop("probabilities")
            row |= {f"probability_{name}": value for name, value in probabilities.items()}
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)


def _write_json_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


WRITERS: dict[str, Callable[[Path, Iterator[dict[str, Any]]], None]] = {".csv": _write_csv, ".jsonl": _write_json_lines}
"""The function that writes a file, by the ending of its name."""
