"""Texts → token ids, by the fastest tokenizer that gives the same ids as the checkpoint's own. Every call here blocks.

There are two:

- nanotoken (extra ``fast``), for WordPiece alone, 20 to 30 times as fast as the other. It is taken if it is installed,
  reads the checkpoint's tokenizer and gives the same ids for odd texts and the shipped reviews;
- the library ``tokenizers``.

A tokenizer of transformers that is plain Python is called as it is (``worker.model.torch.wrapped_tokenizer``).
"""

import importlib.util
import logging
import os
import re
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, takewhile
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.model.reviews import read_reviews

log = logging.getLogger(__name__)

Ids = NDArray[np.int32]

NO_MAXIMUM: Final = 2**31  # numbers from here on say that there is no maximum, as transformers' 1e30 does
CUT: Final = 16  # tokens to which texts are cut where two tokenizers are compared
CACHED_WORDS: Final = 1 << 17  # in a cache of nanotoken, per thread and level: at most some 16 MB each
ODD_TEXTS: Final = (
    "", " ", "Ё", "и\u0306 е\u0308", "[CLS] внутри [SEP][MASK]", "слово" * 60, "a\u200bб\u00a0в\u2028г\x00д\ufeff",
    "日本語のテキスト", "😀👍🏽 :)", "ПРИВЕТ, МИР!!!", "ﬁ №5 ½ café", "«кавычки» — тире…", "\t\n\r\v\f",
    "שלום مرحبا हिन्दी", "##на",
)  # fmt: skip


MARKS: Final = 30  # the longest run of combining marks that is composed: Python's NFC is quadratic on them
STRESSED: Final = re.compile("(?<=[аеёиоуыэюяАЕЁИОУЫЭЮЯ])\u0301")


class TokenizerPanicked(Exception):
    """The tokenizer's Rust code panicked on a text."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises TokenizerPanicked for a panic of Rust, which is a BaseException that no handler of errors would see.

    Its message is left out, for it may quote a text.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # each extension has a class of its own, and exports none
            raise
        raise TokenizerPanicked from None


class Encode(Protocol):
    """N texts → the token ids of each, special tokens among them, cut to ``max_length`` tokens if that is given.

    A call blocks; several threads may call at once.
    """

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]: ...


def normalize_text(text: str) -> str:
    """A text in NFC and without stress marks (U+0301 directly behind a Russian vowel).

    A run of more than 30 combining marks stays as it is; the text before and behind it is normalized.
    """
    if not _has_long_run(text):
        return _composed(text)
    marks = "".join(map(re.escape, filter(unicodedata.combining, set(text))))
    pieces = re.split(f"([{marks}]{{{MARKS + 1},}})", text)
    pieces[::2] = map(_composed, pieces[::2])
    return "".join(pieces)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", STRESSED.sub("", text) if "\u0301" in text else text)


def _has_long_run(text: str) -> bool:
    """Whether more than 30 combining marks follow each other. Samples each 31st character, which such a run covers."""
    sample = list(map(unicodedata.combining, text[MARKS :: MARKS + 1]))
    if not any(sample):
        return False
    for place in (place for place, is_mark in enumerate(sample) if is_mark):
        middle = MARKS + place * (MARKS + 1)
        before = takewhile(unicodedata.combining, reversed(text[middle - MARKS : middle]))
        behind = takewhile(unicodedata.combining, text[middle + 1 : middle + MARKS + 1])
        if sum(1 for _ in before) + 1 + sum(1 for _ in behind) > MARKS:
            return True
    return False


def with_normalization(encode: Encode) -> Encode:
    """An Encode that normalizes each text before ``encode``."""
    return lambda texts, max_length=None, /: encode(list(map(normalize_text, texts)), max_length)


@dataclass(frozen=True, kw_only=True)
class CheckpointTokenizer:
    """A checkpoint's tokenizer, whichever library has read its files.

    ``encode``: ids as that library gives them. ``backend``: a ``tokenizers.Tokenizer`` that gives the same; None for a
    tokenizer in plain Python. ``model_max_length``: tokens of a text at most, special ones among them, as the files state
    it; None if they state none. ``padding``, ``unknown``: ids of these tokens; None if there is none. ``special``: ids of
    all special tokens. ``highest``: the highest id of a token. ``truncation_side``: where long texts are cut, ``left`` or
    ``right``. ``shortest``: number of tokens of the empty text. ``closing``: number of special tokens behind a text.
    """

    encode: Encode
    backend: Any
    model_max_length: int | None
    padding: int | None
    unknown: int | None
    special: frozenset[int]
    highest: int
    truncation_side: str
    shortest: int
    closing: int

    @classmethod
    def of_backend(cls, backend: Any, *, truncation_side: str, **fields: Any) -> "CheckpointTokenizer":
        """From a ``tokenizers.Tokenizer``, which says itself what ``fields`` do not state."""
        encode = BareTokenizer(backend, truncation_side)
        (shortest,) = encode([""])
        return cls(
            encode=encode,
            backend=backend,
            truncation_side=truncation_side,
            highest=max(backend.get_vocab().values(), default=0),
            shortest=len(shortest),
            closing=count_closing(backend.encode("а").special_tokens_mask),
            **fields,
        )


def count_closing(mask: Sequence[int]) -> int:
    """The number of special tokens behind a text, by the mask (1 is special) of one with a token."""
    return list(mask)[::-1].index(0) if 0 in mask else 0


def stated_maximum(maximum: float | None) -> int | None:
    """The most tokens of a text, as a tokenizer's files state it; None for no number, and for one that stands for none."""
    return None if maximum is None or maximum >= NO_MAXIMUM else int(maximum)


def choose_encode(tokenizer: CheckpointTokenizer) -> Encode:
    """The fastest Encode with the ids of a checkpoint's tokenizer. Blocks for some 100 ms.

    nanotoken's ids are compared with the tokenizer's on the odd texts, which have what tokenizers are known to treat
    differently, and for usual words on each fourth of the shipped reviews: all would take 50 ms more at each start.

    Raises TokenizerPanicked where the tokenizer panics, and so does the returned Encode.
    """
    _outlive_forks()
    reviews = read_reviews()[::4]
    compared: list[tuple[list[str], int | None]] = [
        ([*ODD_TEXTS, *reviews], None),
        ([*ODD_TEXTS, *reviews[:20], " ".join(reviews[:20])], CUT),
    ]
    wanted = [tokenizer.encode(texts, length) for texts, length in compared]
    if tokenizer.backend is None or importlib.util.find_spec("nanotoken") is None:
        return tokenizer.encode
    try:
        with panics_as_errors():
            encode = WordPieceTokenizer(tokenizer.backend, tokenizer.truncation_side)
            ids = [encode(texts, length) for texts, length in compared]
    except Exception as error:  # noqa: BLE001 - it takes some tokenizers only, and the other is left
        log.debug("nanotoken does not take this tokenizer", extra={"error": type(error).__name__})
        return tokenizer.encode
    if not all(map(are_same, ids, wanted)):
        log.info("nanotoken gives other ids than tokenizers for this tokenizer, and is not used")
        return tokenizer.encode
    log.info("texts are tokenized by nanotoken")
    return encode


@cache
def _outlive_forks() -> None:
    """Has a forked child tokenize without threads: it lacks those in the pool of ``tokenizers``, and would hang."""
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class BareTokenizer:
    """The library ``tokenizers``. ``backend``: a ``tokenizers.Tokenizer``; ``side``: where long texts are cut."""

    def __init__(self, backend: Any, side: str) -> None:
        self._tokenizer = backend
        self._side = side
        self._lock = threading.Lock()  # each call sets the maximum length at the backend

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with self._lock, panics_as_errors():
            if max_length is None:
                self._tokenizer.no_truncation()
            else:
                self._tokenizer.enable_truncation(max_length, direction=self._side)
            self._tokenizer.no_padding()
            encoded = self._tokenizer.encode_batch_fast(list(texts))
        return _rows([each.ids for each in encoded])


class WordPieceTokenizer:
    """nanotoken, for WordPiece tokenizers; for others, its loader raises."""

    def __init__(self, backend: Any, side: str) -> None:
        import nanotoken  # noqa: PLC0415 - an extra

        nanotoken.set_cache_entries(CACHED_WORDS)
        self._tokenizer = nanotoken.Tokenizer.from_json(backend.to_str()).backend
        self._side = side

    def __call__(self, texts: Sequence[str], max_length: int | None = None, /) -> list[Ids]:
        with panics_as_errors():
            flat, offsets = self._tokenizer.encode_batch(list(texts), max_length=max_length, truncation_side=self._side)
        ids, bounds = flat.view(np.int32), offsets.tolist()
        return [ids[begin:end] for begin, end in pairwise(bounds)]


def _rows(lists: Sequence[Sequence[int]]) -> list[Ids]:
    return [np.array(each, dtype=np.int32) for each in lists]


def are_same(some: Sequence[Ids], others: Sequence[Ids]) -> bool:
    """Whether two answers of an Encode are equal."""
    return len(some) == len(others) and all(map(np.array_equal, some, others))
