"""The command line's words, made fit for argparse; what is no flag is refused by its name alone."""

import re
from collections.abc import Iterable, Sequence

from worker.errors import WrongSetting
from worker.settings.base import POSITIONAL, SECRETS, Settings, quoted, takes_list
from worker.settings.sentences import flag_of, suggestion

FLAG = re.compile(r"--[A-Za-z_-]+")
NEGATIVE = re.compile(r"-[.0-9]")  # numbers, in the place of flags


def arguments_for_argparse(kind: type[Settings], argv: Sequence[str], prog: str) -> list[str]:
    """The command line with a flag and its value as one word, the words of lists quoted: argparse leaves them as they are.

    Raises WrongSetting for what is no flag of ``kind``, by its name alone: the rest of it may be a secret.
    """
    flags, arguments, rest = _flags(kind), list[str](), iter(argv)
    positional = next((name for name in POSITIONAL if name in kind.model_fields), None)
    for word in rest:
        flag, equals, value = word.partition("=")
        if word == "--" and "texts" in kind.model_fields:
            return [*arguments, word, *map(quoted, rest)]
        if flag not in flags and not word.startswith("--") and positional:
            arguments.append(quoted(word) if takes_list(kind, positional) else word)
            continue
        if flag not in flags:
            raise WrongSetting(_no_flag(flag, [*flags, *map(flag_of, SECRETS)], prog))
        name = flags[flag]
        if name is None and equals:
            raise WrongSetting(f"{flag} takes no value; `{prog} --help` lists the flags")
        if name and not equals:
            value = next(rest, "--")
            if value.startswith("-") and value != "-" and not NEGATIVE.match(value):
                raise WrongSetting(f"{flag} needs a value; `{prog} --help` lists the flags")
        if name and takes_list(kind, name):
            value = quoted(value)
        arguments.append(f"{flag}={value}" if name else flag)
    return arguments


def _flags(kind: type[Settings]) -> dict[str, str | None]:
    """Each flag with the name of the setting that its value is of; None for those without a value."""
    flags: dict[str, str | None] = {"-h": None, "--help": None}
    for name, field in kind.model_fields.items():
        if name in (*SECRETS, *POSITIONAL):
            continue
        is_switch = field.annotation is bool
        for each in (name, field.alias or name):
            flags[flag_of(each)] = None if is_switch else name
            if is_switch:
                flags[flag_of(f"no_{each}")] = None
    return flags


def _no_flag(word: str, flags: Iterable[str], prog: str) -> str:
    """What is printed of the word is what can be a flag's name: any other may be a secret."""
    name = FLAG.match(word)
    what = f"{name[0]} is no flag" if name else "the command line has a word that is no flag"
    return f"{what}{suggestion(name[0] if name else word, flags, flag_of)}; `{prog} --help` lists the flags"
