"""Whether a checkpoint's tokenizer fits its weights and the language of the texts."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from worker.model.checkpoint import ModelError
from worker.model.tokenizer import CheckpointTokenizer, Ids

UNKNOWN_SHARE: Final = 0.5  # share of unknown tokens in the shipped reviews from which on a warning is given


def refuse_tokens_without_rows(name: str, tokenizer: CheckpointTokenizer, rows: int) -> None:
    """Raises ModelError if there are tokens beyond the ``rows`` of the embeddings.

    On a GPU, one text with such a token breaks the device for all others.
    """
    if tokenizer.highest >= rows:
        raise ModelError(
            f"model {name} cannot be used: its tokenizer gives ids up to {tokenizer.highest}, and its weights have {rows} "
            "embeddings"
        )


def unknown_words_warning(name: str, tokenizer: CheckpointTokenizer, examples: Sequence[Ids]) -> str | None:
    """A warning if the tokenizer knows few words of the shipped reviews, else None. Raises ModelError if it knows none.

    ``examples``: the token ids of each review.
    """
    unknown = tokenizer.unknown
    tokens = np.concatenate(examples)
    words = tokens[~np.isin(tokens, sorted(tokenizer.special - {unknown}))]
    count = int(np.count_nonzero(words == unknown)) if unknown is not None else 0
    if count == len(words):
        raise ModelError(
            f"model {name} cannot be used: its tokenizer knows no word of the shipped reviews; is its tokenizer.json (or "
            "vocab.txt, or its SentencePiece model) missing? copy it into the folder"
        )
    if count <= UNKNOWN_SHARE * len(words):
        return None
    return (
        f"model {name}: {count / len(words):.0%} of the tokens of the shipped Russian reviews are unknown to its tokenizer; "
        "is it the one that the model was trained with?"
    )
