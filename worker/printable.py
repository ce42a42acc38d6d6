"""Makes text from files, brokers or records safe to print: no escape sequences, no line breaks."""

import json


def printable(text: str) -> str:
    r"""The text with each unprintable character escaped as in JSON (``\n``, ``\u001b``); spaces stay.

    A line of JSON stays valid and keeps its meaning. Text without such characters is returned as it is.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)
