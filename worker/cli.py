"""The command line: finds the command, reads its settings, hands over. Imports no more than the command needs."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from worker.settings.base import Settings

AnySettings = TypeVar("AnySettings", bound="Settings")

INTERRUPTED, READER_GONE = 130, 141  # 128 and the number of the signal that ends other programs then

HELP = """usage: sentiment-worker COMMAND [options]

Scores the sentiment of Russian texts, from Kafka to Kafka.

  run        read events from Kafka, publish their sentiment, commit
  classify   score texts from arguments, a file or standard input; no Kafka
  check      settings, model, brokers, topics and permissions, without consuming
  bench      this machine's speed with a model, and the settings to use
  replay     send dead letters back to the topics that they came from
  demo       the real worker with real reviews, on an embedded broker
  evaluate   macro-F1 of a model on labelled CSV files
  train      a checkpoint from labelled CSV files
  schema     the schema of results or dead letters, in JSON Schema or Avro

  COMMAND --help    the command's options
  --version         this version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process: 0 done or drained, 1 failed while running, 2 wrong usage or settings.

    It is 130 after Ctrl-C, and 141 where the reader of the output has gone; ``run`` handles both by itself.
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
    """Gives the process the standard streams and the home folder that commands and libraries expect, where it has none.

    A closed standard stream is opened on /dev/null: else the next file or socket would get its number, and native code
    aborts then. Characters that the output's encoding lacks are replaced.
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
        os.environ["HOME"] = os.devnull  # below it nobody can create a folder


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

    # For `train`: torch's threads would wait for each other by spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return COMMANDS[name](arguments)
    except UserError as error:
        _explain(str(error), error.exit_code)
        return error.exit_code
    except SystemExit as end:  # argparse's after --help, rich's where the reader of its output has gone
        return READER_GONE if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)


def _configured(kind: "type[AnySettings]", argv: Sequence[str], command: str) -> "AnySettings":
    """A command's settings. From here on logs, and the sentence of the WrongSetting that it may raise, go where they say."""
    from worker.settings.shared import LogSettings
    from worker.settings.sources import load, unknown_variables
    from worker.telemetry import logs

    _log_as_asked(argv)
    settings = load(kind, argv, f"sentiment-worker {command}")
    if isinstance(settings, LogSettings):
        logs.configure(settings.log_level, settings.log_format)
        if command != "check":  # which prints them as lines of its own
            for sentence in unknown_variables(kind):
                logs.log.warning("%s", sentence)
    return settings


def _log_as_asked(argv: Sequence[str]) -> None:
    """Configures logs as the flag or the variable says, before settings are read. Any other format counts as auto."""
    from worker.telemetry import logs

    words = [*argv, ""]
    formats = [value for word, value in pairwise(words) if word == "--log-format"]
    formats += [word.partition("=")[2] for word in words if word.startswith("--log-format=")]
    asked = [os.environ.get("WORKER_LOG_FORMAT", ""), *formats][-1]
    logs.configure("warning", asked if asked in ("console", "json") else "auto")


def _run(argv: Sequence[str]) -> int:
    # Until the worker has a handler of its own: Linux does not end a container's process 1 that has none.
    signal.signal(signal.SIGTERM, lambda *_: _end(0))
    from worker.settings.run import RunSettings

    settings = _configured(RunSettings, argv, "run")
    from worker.commands import run as service

    return service.run(settings)


def _check(argv: Sequence[str]) -> int:
    from worker.errors import WrongSetting
    from worker.settings.run import RunSettings
    from worker.settings.sources import unknown_variables
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


def _command(name: str, kind: str, argv: Sequence[str]) -> int:
    """Runs ``worker.commands.NAME`` with the settings of the class ``kind``; it is imported once they are right."""
    from worker.settings import commands

    configured = _configured(getattr(commands, kind), argv, name)
    code: int = import_module(f"worker.commands.{name}").run(configured)
    return code


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "check": _check,
    "classify": partial(_command, "classify", "ClassifySettings"),
    "bench": partial(_command, "bench", "BenchSettings"),
    "replay": partial(_command, "replay", "ReplaySettings"),
    "demo": partial(_command, "demo", "DemoSettings"),
    "evaluate": partial(_command, "evaluate", "EvaluateSettings"),
    "train": partial(_command, "train", "TrainSettings"),
    "schema": partial(_command, "schema", "SchemaSettings"),
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
