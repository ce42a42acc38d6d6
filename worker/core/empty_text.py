"""Which texts are empty, that is, have no character that can be seen. Pure."""

import unicodedata
from functools import lru_cache
from typing import Final

_FILLERS: Final = frozenset("\u115f\u1160\u3164\uffa0")  # of Hangul: by category they are letters
_INVISIBLE: Final = frozenset(("Cc", "Cf", "Mn", "Me"))


def is_empty(text: str) -> bool:
    """Whether no character of a text can be seen: all are white space, controls, formats, marks or fillers."""
    return not text or (is_invisible(text[0]) and all(map(is_invisible, set(text))))


@lru_cache(maxsize=4096)
def is_invisible(char: str) -> bool:
    """Whether a character cannot be seen in a text."""
    return char.isspace() or char in _FILLERS or unicodedata.category(char) in _INVISIBLE
