"""Texts → token ids of at most the model's maximum, without tokenizing all of a very long text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from worker.core.batching import TokenIds
from worker.model.checkpoint import ModelError
from worker.model.tokenizer import NO_MAXIMUM, CheckpointTokenizer, Encode, Ids

CHARS_PER_TOKEN: Final = 8  # Russian words have about four: a prefix of so many nearly always fills the model's maximum
MOST_CHARS: Final = 100_000  # of a text that are tokenized: what fills no maximum by then is hardly a text
WORD_TOKENS: Final = 128  # more than one word has: only the last so many tokens of a prefix depend on what follows it
ROBERTA_LIKE: Final = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
}  # positions begin behind the padding's id
SURROGATES: Final = re.compile("[\ud800-\udfff]")  # halves of a character: no tokenizer takes them


class TokenizedTexts(NamedTuple):
    """N tokenized texts: the ids of each, at most the model's maximum, and whether the text was cut to fit."""

    ids: list[Ids]
    truncated: list[bool]


class TruncatingTokenizer:
    """Texts → token ids, special tokens among them. Blocks; several threads may call at once.

    ``max_tokens``: of a text, special tokens among them. ``padding``: the id that stands for an empty text. ``closing``:
    the number of special tokens behind each text, such as [SEP]; ``special``: of those around it. ``unknown``: the id that
    stands for words that the tokenizer does not know; None if there is none.

    Of a text, MOST_CHARS characters or four times the usual prefix are tokenized at most, so that one with few tokens in a
    megabyte holds up no other. It is cut there.
    """

    def __init__(
        self, encode: Encode, *, max_tokens: int, padding: int, closing: int, special: int, unknown: int | None
    ) -> None:
        self.max_tokens = max_tokens
        self.padding = padding
        self.encode = encode
        self._closing = closing
        self._special = special
        self._unknown = unknown

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenizes N texts. Raises TokenizerPanicked; a text with a lone surrogate raises what the tokenizer raises."""
        if not texts:
            return TokenizedTexts([], [])
        prefix = self.max_tokens * CHARS_PER_TOKEN
        ids = self.encode([_prefix(text, prefix) for text in texts])
        truncated = [False] * len(texts)
        for index, text in enumerate(texts):
            if len(text) > prefix or len(ids[index]) > self.max_tokens:
                ids[index], truncated[index] = self._cut(text, ids[index], prefix)
            elif not len(ids[index]):
                ids[index] = np.array([self.padding], dtype=np.int32)
        return TokenizedTexts(ids, truncated)

    def count(self, ids: Sequence[TokenIds]) -> tuple[int, int]:
        """Of N tokenized texts: their tokens without the special ones around each, and the unknown ones among these."""
        tokens = max(0, sum(map(len, ids)) - len(ids) * self._special)
        if self._unknown is None or not tokens:
            return tokens, 0
        return tokens, int(np.count_nonzero(np.concatenate(ids) == self._unknown))

    def _cut(self, text: str, ids: Ids, prefix: int) -> tuple[Ids, bool]:
        """The ids of one text, given those of its first ``prefix`` characters, and whether it was cut."""
        length, end = prefix, min(len(text), max(MOST_CHARS, 4 * prefix))
        while len(ids) <= self.max_tokens + WORD_TOKENS and length < end:
            length = length * 4 if length == prefix else end  # so no text is tokenized more than three times
            (ids,) = self.encode([_prefix(text, length)])
        if len(ids) <= self.max_tokens:
            return ids, length < len(text)
        if length == prefix:
            return self.encode([_prefix(text, length)], self.max_tokens)[0], True
        last = len(ids) - self._closing  # cutting here saves tokenizing a long text once more
        return np.concatenate([ids[: self.max_tokens - self._closing], ids[last:]]), True


def max_tokens_of(name: str, tokenizer: CheckpointTokenizer, config: Mapping[str, Any]) -> int:
    """The most tokens that a text may have, by a checkpoint's tokenizer and its config.json.

    Special tokens are among them. Raises ModelError where nothing states a maximum, or no text would fit.
    """
    limits = {}
    if tokenizer.model_max_length is not None:
        limits["model_max_length in tokenizer_config.json"] = tokenizer.model_max_length
    is_roberta_like = config.get("model_type") in ROBERTA_LIKE
    is_of_the_family = is_roberta_like or config.get("model_type") == "bert"
    positions = config.get("max_position_embeddings", 512 if is_of_the_family else None)  # as transformers assumes it
    if positions not in (None, -1):
        behind = (config.get("pad_token_id", 1) or 0) + 1 if is_roberta_like else 0
        limits["max_position_embeddings in config.json"] = positions - behind
    least = tokenizer.shortest + 1
    for field, limit in limits.items():
        if limit < least:
            raise ModelError(
                f"model {name} cannot be used: {field} leaves room for {limit} tokens, and the shortest text has {least}"
            )
    if not limits:
        raise ModelError(
            f"model {name} cannot be used: nothing says how many tokens a text may have; set model_max_length in its "
            "tokenizer_config.json"
        )
    return min(NO_MAXIMUM, *limits.values())


def _prefix(text: str, length: int) -> str:
    """At most ``length`` characters, cut at white space, where no token of the beginning depends on what follows."""
    if len(text) <= length:
        return text
    for end in range(length, length // 2, -1):
        if text[end].isspace():
            return text[:end]
    return text[:length]
