"""The command line: finds the command, reads its settings, hands over. Imports no more than the command needs."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from worker.corpus import Source
    from worker.settings import CorpusSettings, LogSettings

Answer = TypeVar("Answer")

HELP = """usage: sentiment-worker COMMAND [options]

Scores the sentiment of Russian texts, from Kafka to Kafka.

  run        read events from Kafka, publish their sentiment, commit
  classify   score texts from arguments, a file or standard input; no Kafka
  check      settings, model, brokers, topics and permissions, without consuming
  bench      this machine's speed with a model, and the settings to use
  replay     send dead letters back to the topics that they came from
  demo       the whole thing on an embedded broker
  evaluate   macro-F1 of a model on labelled CSV files
  train      a checkpoint from labelled CSV files

  COMMAND --help    the command's options
  --version         this version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process: 0 done or drained, 1 failed while running, 2 wrong usage or settings."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        print(HELP, end="")
        sys.exit(0)
    if name == "--version":
        from worker.service import worker_version

        print(worker_version())
        sys.exit(0)
    if name not in COMMANDS:
        _refuse(f"{name!r} is no command; `sentiment-worker --help` lists them")
    from worker.settings import UsersMistake

    # for `train`, where torch's threads would wait for each other by spinning; a worker's pass on a CPU takes one thread
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = COMMANDS[name](arguments)
    except KeyboardInterrupt:
        code = 130
    except UsersMistake as error:
        _refuse(str(error), error.exit_code)
    _end(code)


def _run(argv: Sequence[str]) -> int:
    # Until the service has handlers of its own: for a container's process 1 the system's default is to miss the signal.
    signal.signal(signal.SIGTERM, lambda *_: _end(0))
    from worker.settings import RunSettings, load

    settings = load(RunSettings, argv, "sentiment-worker run")
    _begin_logs(settings)
    from worker import service

    return service.run(settings)


def _check(argv: Sequence[str]) -> int:
    from worker import logs
    from worker.settings import RunSettings, WrongSetting, load, unknown_variables

    try:
        settings = load(RunSettings, argv, "sentiment-worker check")
    except WrongSetting as error:
        from worker import check

        return check.refused(error)
    logs.configure("error", settings.log_format)
    for sentence in unknown_variables(RunSettings):
        print(f"warn  settings     {sentence}")
    from worker import check

    return check.run(settings)


def _classify(argv: Sequence[str]) -> int:
    from worker.settings import ClassifySettings, load

    settings = load(ClassifySettings, argv, "sentiment-worker classify")
    _begin_logs(settings)
    from worker import classify

    return classify.run(settings)


def _bench(argv: Sequence[str]) -> int:
    from worker.settings import BenchSettings, load

    settings = load(BenchSettings, argv, "sentiment-worker bench")
    _begin_logs(settings)
    from worker import bench

    return bench.run(settings)


def _replay(argv: Sequence[str]) -> int:
    from worker.settings import ReplaySettings, load

    settings = load(ReplaySettings, argv, "sentiment-worker replay")
    _begin_logs(settings)
    from worker import replay

    return replay.run(settings)


def _demo(argv: Sequence[str]) -> int:
    from worker.settings import DemoSettings, load

    settings = load(DemoSettings, argv, "sentiment-worker demo")
    from worker import demo

    return demo.run(settings)


def _evaluate(argv: Sequence[str]) -> int:
    import orjson
    import rich

    from worker.corpus import read_source
    from worker.settings import EvaluateSettings, load

    settings = load(EvaluateSettings, argv, "sentiment-worker evaluate")
    _begin_logs(settings)
    sources = _sources(settings)
    _or_refuse(lambda: [read_source(source) for source in sources])  # before a model is loaded for nothing
    from worker.evaluation import evaluate
    from worker.model import SentimentModel

    model = SentimentModel.load_as_set(settings)
    by = settings.rows_held_out_by(settings.model)
    report = _or_refuse(
        lambda: evaluate(model.get_sentiment, sources, held_out_only=settings.held_out_only, hold_out_by=by)
    )
    if settings.format == "json":
        print(orjson.dumps({"model": model.name, **report.as_json()}, option=orjson.OPT_INDENT_2).decode())
    else:
        rich.print(report.table())
    return 0


def _train(argv: Sequence[str]) -> int:
    import rich

    from worker.settings import TrainSettings, load

    settings = load(TrainSettings, argv, "sentiment-worker train")
    sources = _sources(settings)
    from worker.training import ProgressView, train

    with ProgressView() as view:
        result = _or_refuse(lambda: train(settings, sources, view))
    rich.print(result.report.table())
    print(f"{result.folder}, after {result.seconds:.0f} s")
    return 130 if result.interrupted else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "check": _check,
    "classify": _classify,
    "bench": _bench,
    "replay": _replay,
    "demo": _demo,
    "evaluate": _evaluate,
    "train": _train,
}


def _begin_logs(settings: "LogSettings") -> None:
    """Has logs as they are set, and warns of variables that set nothing."""
    from worker import logs
    from worker.settings import unknown_variables

    logs.configure(settings.log_level, settings.log_format)
    for sentence in unknown_variables(type(settings)):
        logs.log.warning("%s", sentence)


def _sources(settings: "CorpusSettings") -> "list[Source]":
    from worker.corpus import parse_sources

    return _or_refuse(
        lambda: parse_sources(settings.source, settings.label_map, settings.text_column, settings.label_column)
    )


def _or_refuse(work: Callable[[], Answer]) -> Answer:
    """The data commands say what is wrong with their input by a ValueError of one sentence."""
    from worker.settings import WrongSetting

    try:
        return work()
    except ValueError as error:
        raise WrongSetting(str(error)) from error


def _refuse(sentence: str, code: int = 2) -> NoReturn:
    print(f"sentiment-worker: {sentence}", file=sys.stderr)
    _end(code)


def _end(code: int) -> NoReturn:
    """Ends without the interpreter's own shutdown, which aborts while a thread is inside of native code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
