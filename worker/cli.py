"""The command line: finds the command, reads its settings, hands over. Imports no more than the command needs."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from worker.settings import LogSettings

Logging = TypeVar("Logging", bound="LogSettings")

INTERRUPTED, READER_GONE = 130, 141  # 128 and the number of the signal that ends other programs then

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
    """Runs one command and ends the process: 0 done or drained, 1 failed while running, 2 wrong usage or settings.

    130 after Ctrl-C, 141 where whoever reads the output has gone; run has answers of its own to both.
    """
    _fit_environment()
    try:
        code = _answer(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = READER_GONE
    except OSError as error:
        if error.strerror is None:  # not the system's
            raise
        code = 1
        _explain(f"{error.filename or 'cannot read or write'}: {error.strerror}", code)
    _end(code)


def _fit_environment() -> None:
    """Gives the process what commands and libraries count on, as far as it was started without.

    Standard streams: the next file or socket would get the number of one that is closed, and native code aborts then.
    What a terminal cannot show is replaced. Without HOME and an entry in passwd nothing can be kept at home.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = os.devnull  # no folder, and nobody can make one of it


def _answer(arguments: list[str]) -> int:
    """The exit code of one command, run to its end. Raises KeyboardInterrupt and OSError."""
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        from worker import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        _log_as_asked(arguments)
        _explain(f"{name!r} is no command; `sentiment-worker --help` lists them", 2)
        return 2
    from worker.errors import UserError

    # for `train`, where torch's threads would wait for each other by spinning; a worker's pass on a CPU takes one thread
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return COMMANDS[name](arguments)
    except UserError as error:
        _explain(str(error), error.exit_code)
        return error.exit_code
    except SystemExit as end:  # argparse's after --help, rich's where the reader of its output has gone
        return READER_GONE if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)


def _configured(kind: type[Logging], argv: Sequence[str], command: str) -> Logging:
    """A command's settings. Logs are as they say from here on, and so is what a WrongSetting, which it raises, says."""
    from worker.settings import load, unknown_variables
    from worker.telemetry import logs

    _log_as_asked(argv)
    settings = load(kind, argv, f"sentiment-worker {command}")
    logs.configure(settings.log_level, settings.log_format)
    if command != "check":  # which prints them as lines of its own
        for sentence in unknown_variables(kind):
            logs.log.warning("%s", sentence)
    return settings


def _log_as_asked(argv: Sequence[str]) -> None:
    """Sends logs where the flag or the variable says, before settings are read; what is neither format is as auto."""
    from worker.telemetry import logs

    words = [*argv, ""]
    formats = [value for word, value in pairwise(words) if word == "--log-format"]
    formats += [word.partition("=")[2] for word in words if word.startswith("--log-format=")]
    asked = [os.environ.get("WORKER_LOG_FORMAT", ""), *formats][-1]
    logs.configure("warning", asked if asked in ("console", "json") else "auto")


def _run(argv: Sequence[str]) -> int:
    # Until the service has handlers of its own: for a container's process 1 the system's default is to miss the signal.
    signal.signal(signal.SIGTERM, lambda *_: _end(0))
    from worker.settings import RunSettings

    settings = _configured(RunSettings, argv, "run")
    from worker.commands import run as service

    return service.run(settings)


def _check(argv: Sequence[str]) -> int:
    from worker.errors import WrongSetting
    from worker.settings import RunSettings, unknown_variables
    from worker.telemetry import logs

    try:
        settings = _configured(RunSettings, argv, "check")
    except WrongSetting as error:
        from worker.commands import check

        return check.refused(error)
    logs.configure("error", settings.log_format)
    for sentence in unknown_variables(RunSettings):
        print(f"warn  settings     {sentence}")
    from worker.commands import check

    return check.run(settings)


def _classify(argv: Sequence[str]) -> int:
    from worker.settings import ClassifySettings

    settings = _configured(ClassifySettings, argv, "classify")
    from worker.commands import classify

    return classify.run(settings)


def _bench(argv: Sequence[str]) -> int:
    from worker.settings import BenchSettings

    settings = _configured(BenchSettings, argv, "bench")
    from worker.commands import bench

    return bench.run(settings)


def _replay(argv: Sequence[str]) -> int:
    from worker.settings import ReplaySettings

    settings = _configured(ReplaySettings, argv, "replay")
    from worker.commands import replay

    return replay.run(settings)


def _demo(argv: Sequence[str]) -> int:
    from worker.settings import DemoSettings, load

    _log_as_asked(argv)
    settings = load(DemoSettings, argv, "sentiment-worker demo")
    from worker.commands import demo

    return demo.run(settings)


def _evaluate(argv: Sequence[str]) -> int:
    from worker.settings import EvaluateSettings

    settings = _configured(EvaluateSettings, argv, "evaluate")
    from worker.commands import evaluate

    return evaluate.run(settings)


def _train(argv: Sequence[str]) -> int:
    from worker.settings import TrainSettings, load

    _log_as_asked(argv)
    settings = load(TrainSettings, argv, "sentiment-worker train")
    from worker.commands import train

    return train.run(settings)


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


def _explain(sentence: str, code: int) -> None:
    from worker.telemetry.logs import explain_exit

    explain_exit(sentence, code)


def _end(code: int) -> NoReturn:
    """Ends without the interpreter's own shutdown, which aborts while a thread is inside of native code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
