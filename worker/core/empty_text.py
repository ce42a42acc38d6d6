"""Which texts are empty, that is, have no character that can be seen. Pure."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Final

_FIRST: Final = 32  # characters, of which nearly always one can be seen
_FILLERS: Final = frozenset("\u115f\u1160\u3164\uffa0")  # of Hangul: letters by category
_INVISIBLE: Final = frozenset(("Cc", "Cf", "Mn", "Me"))
_UNUSUAL: Final = re.compile("[^!-~¡-¬®-\u02ff\u0370-\u0482]")  # what usual texts begin with can be seen


def is_empty(text: str) -> bool:
    """Whether no character of a text can be seen: all are white space, controls, formats, marks or fillers."""
    return all(map(_is_invisible, set(text[:_FIRST]))) and all(map(_is_invisible, set(text)))


@lru_cache(maxsize=4096)
def _is_invisible(char: str) -> bool:
    return char.isspace() or char in _FILLERS or unicodedata.category(char) in _INVISIBLE


def any_empty(texts: Sequence[str]) -> bool:
    """Whether one of N texts is empty. Looks at their first characters, and further where one of these is invisible."""
    try:
        firsts = "".join(map(itemgetter(0), texts))
    except IndexError:  # it has no character at all
        return True
    invisible = set(filter(_is_invisible, firsts)) if _UNUSUAL.search(firsts) else set()
    return bool(invisible) and any(is_empty(text) for text in texts if text[0] in invisible)
