"""Text made fit to print: without escape sequences and line breaks, and numbers with their nouns."""

import json


def printable(text: str) -> str:
    r"""The text with each unprintable character escaped as in JSON (``\n``, ``\u001b``); spaces stay.

    A line of JSON stays valid and keeps its meaning. Text without such characters is returned as the same object.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def counted(number: int, noun: str) -> str:
    """A number with its noun, which takes an s where it is not one: ``1 partition``, ``2,000 partitions``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
