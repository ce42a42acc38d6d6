"""The command line: finds the command, reads its settings, hands over. Imports no more than the command needs."""

import sys
from collections.abc import Callable, Sequence

HELP = """usage: sentiment-worker COMMAND [options]

Scores the sentiment of Russian texts, from Kafka to Kafka.

  run        read events from Kafka, publish their sentiment, commit
  classify   score texts from arguments, a file or standard input; no Kafka
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
    try:
        code = COMMANDS[name](arguments)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        _refuse(str(error))
    sys.exit(code)


def _run(argv: Sequence[str]) -> int:
    from worker import logs
    from worker.settings import RunSettings, load, unknown_variables

    settings = load(RunSettings, argv, "sentiment-worker run")
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables(RunSettings):
        logs.log.warning("the variable %s sets nothing", name)
    from worker import service

    return service.run(settings)


def _classify(argv: Sequence[str]) -> int:
    from worker import logs
    from worker.settings import ClassifySettings, load

    settings = load(ClassifySettings, argv, "sentiment-worker classify")
    logs.configure(settings.log_level, settings.log_format)
    from worker import classify

    return classify.run(settings)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"run": _run, "classify": _classify}


def _is_users_mistake(error: Exception) -> bool:
    """WrongSetting and ModelError, without importing torch for a command that did not."""
    return any(kind.__name__ in ("WrongSetting", "ModelError") for kind in type(error).__mro__)


def _refuse(sentence: str) -> None:
    print(f"sentiment-worker: {sentence}", file=sys.stderr)
    sys.exit(2)
