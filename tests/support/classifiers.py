"""Small classifiers of BERT's family, with random weights."""

from typing import Any

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

SIZES = {
    "vocab_size": 300, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40, "num_labels": 3,
    "initializer_range": 0.3,
}  # fmt: skip


def bert(**changes: Any) -> Any:
    config = BertConfig(**{**SIZES, "num_hidden_layers": 3, **changes})
    return BertForSequenceClassification(config).eval()


def xlm_roberta() -> Any:
    config = XLMRobertaConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=514, pad_token_id=1)
    return XLMRobertaForSequenceClassification(config).eval()


def of_the_card() -> Any:
    return bert(
        hidden_size=312, num_attention_heads=12, intermediate_size=600, vocab_size=2_000, initializer_range=0.05
    )
