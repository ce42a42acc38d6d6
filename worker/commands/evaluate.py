"""``sentiment-worker evaluate``: macro-F1 of a model on labelled CSV files."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import orjson
import rich

from worker.errors import WrongSetting
from worker.settings.commands import CorpusSettings, EvaluateSettings
from worker.training.dataset import CLASSES, Example, LabelledFile, parse_sources
from worker.training.evaluate import evaluate, in_order, read_rows
from worker.training.evaluation_report import Comparison, EvaluationReport
from worker.training.predictions_file import check_no_source, check_predictions_path, write_predictions

if TYPE_CHECKING:
    from worker.model.sentiment_model import SentimentModel

Rows = dict[str, list[Example]]


def run(settings: EvaluateSettings) -> int:
    """Reads the files, loads the model, and prints the figures. Blocks; returns the exit code. Raises UserError."""
    if settings.predictions:
        with faults_as_wrong_settings():
            check_predictions_path(settings.predictions)
    from worker.commands.load_model import (  # noqa: PLC0415 - `train` does without
        labels_from_settings,
        load_from_settings,
        settings_for_another,
    )

    classes = labels_from_settings(settings).names if settings.source else CLASSES
    sources = labelled_sources(settings, classes)
    with faults_as_wrong_settings():  # what is wrong with a file is said before a model is loaded
        if settings.predictions:
            check_no_source(settings.predictions, [source.path for source in sources])
        rows = read_rows(sources, held_out_by=settings.held_out_rules() if settings.held_out_only else ())

    model, against = load_from_settings(settings), None
    if settings.against:  # loaded before anything is measured, which may take long
        against = load_from_settings(settings_for_another(settings, settings.against, settings.against_revision))
    report = _measure(model, rows, classes)
    comparison = Comparison(report, _measure(against, rows, classes), (model.name, against.name)) if against else None
    _print(settings, model.name, report, comparison)
    if settings.predictions:
        _write_predictions(settings, report, comparison)
    return 0


def _measure(model: "SentimentModel", rows: Rows, classes: Sequence[str]) -> EvaluationReport:
    """The model's report on the rows. Raises WrongSetting."""
    try:
        predict = in_order(lambda texts: model.get_sentiment(texts, "proba"), model.labels.names, classes)
    except ValueError as error:
        raise WrongSetting(f"model {model.name}: {error}") from None
    with faults_as_wrong_settings():
        return evaluate(predict, rows, classes)


def _print(settings: EvaluateSettings, name: str, report: EvaluationReport, comparison: Comparison | None) -> None:
    if settings.format == "json":
        figures = {"model": name, **report.as_json()}
        if comparison:
            figures["against"] = comparison.as_json()
        # UTF-8, whatever the terminal's locale
        sys.stdout.buffer.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")
        sys.stdout.buffer.flush()
        return
    rich.print(report.table())
    if comparison:
        rich.print(comparison.table())


def _write_predictions(settings: EvaluateSettings, report: EvaluationReport, comparison: Comparison | None) -> None:
    assert settings.predictions
    try:
        write_predictions(settings.predictions, report, comparison.against if comparison else None)
    except OSError as error:
        raise WrongSetting(f"--predictions {settings.predictions} cannot be written: {error.strerror}") from None


def labelled_sources(settings: CorpusSettings, classes: Sequence[str] = CLASSES) -> list[LabelledFile]:
    """The labelled files that the settings name, not read yet. Raises WrongSetting."""
    with faults_as_wrong_settings():
        return parse_sources(settings.source, settings.label_map, settings.text_column, settings.label_column, classes)


@contextmanager
def faults_as_wrong_settings() -> Iterator[None]:
    """Raises WrongSetting for the ValueError of one sentence by which worker.training says what is wrong with its input."""
    try:
        yield
    except ValueError as error:
        raise WrongSetting(str(error)) from error
