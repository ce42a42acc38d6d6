"""``sentiment-worker evaluate``: macro-F1 of a model on labelled CSV files."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import orjson
import rich

from worker.errors import WrongSetting
from worker.settings.commands import CorpusSettings, EvaluateSettings
from worker.training.dataset import CLASSES, LabelledFile, parse_sources, read_source


def run(settings: EvaluateSettings) -> int:
    """Reads the files, loads the model, and prints the figures. Blocks; returns the exit code. Raises UserError."""
    from worker.commands.load_model import labels_from_settings, load_from_settings  # noqa: PLC0415 - `train` does without

    classes = labels_from_settings(settings).names if settings.source else CLASSES
    sources = labelled_sources(settings, classes)
    with faults_as_wrong_settings():
        for source in sources:
            read_source(source)  # what is wrong with a file is said before a model is loaded
    from worker.training.evaluate import evaluate  # noqa: PLC0415

    model = load_from_settings(settings)
    by = settings.rows_held_out_by(settings.model)
    with faults_as_wrong_settings():
        report = evaluate(model.get_sentiment, sources, held_out_only=settings.held_out_only, hold_out_by=by)
    if settings.format == "json":
        report_json = orjson.dumps({"model": model.name, **report.as_json()}, option=orjson.OPT_INDENT_2)
        sys.stdout.buffer.write(report_json + b"\n")  # UTF-8, whatever the terminal's locale
    else:
        rich.print(report.table())
    return 0


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
