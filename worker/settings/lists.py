"""The words of a list on their way through pydantic-settings, which would split them at commas and quotes."""

from typing import TypeGuard
from urllib.parse import quote, unquote

MARK = "quoted:"


def is_list_of_words(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def quoted(word: str) -> str:
    return MARK + quote(word, safe="", errors="surrogatepass")


def unquoted(words: list[str]) -> list[str]:
    """The words as they were before ``quoted``; those that did not go through it stay as they are."""
    return [
        unquote(word.removeprefix(MARK), errors="surrogatepass") if word.startswith(MARK) else word for word in words
    ]
