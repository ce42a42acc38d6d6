"""What comes from a file, a broker or a record, made safe to print: no escape sequence, no line of its own."""

import json


def printable(text: str) -> str:
    r"""The text with each character that cannot be seen as JSON escapes it (``\n``, ``\u001b``); a space stays.

    A line of JSON stays valid, and means the same. Only text with such characters is copied.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)
