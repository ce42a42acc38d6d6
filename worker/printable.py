"""Text from files, brokers or records, made safe to print: without escape sequences and line breaks."""

import json


def printable(text: str) -> str:
    r"""The text with each unprintable character escaped as in JSON (``\n``, ``\u001b``); spaces stay.

    A line of JSON stays valid and keeps its meaning. Text without such characters is returned as the same object.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)
