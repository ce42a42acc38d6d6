"""Makes a new small BERT: learns WordPieces from the texts, and pre-trains the model on masked tokens of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from worker.training.base_checkpoint import label_config
from worker.training.optimisation import Batch, hidden_tokens, optimise, padded, shuffled_batches, token_ids
from worker.training.training_run import TrainingRun

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def new_model(run: TrainingRun, texts: list[str]) -> tuple[Any, Any]:
    """The tokenizer and the pre-trained model, with a head for CLASSES that is not trained yet. Blocks for minutes."""
    options = run.options
    tokenizer = _learn_tokenizer(texts, options.vocabulary, options.max_tokens)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=4 * options.hidden,
        max_position_embeddings=options.max_tokens,
        **label_config(),
    )
    model: Any = BertForSequenceClassification(config)
    if options.pretrain_epochs:
        _pretrain(run, tokenizer, model, texts)
    return tokenizer, model


def _learn_tokenizer(texts: list[str], size: int, max_tokens: int) -> Any:
    """A lower-casing WordPiece tokenizer with at most `size` entries."""
    backend = BertTokenizer(vocab=_ids(SPECIAL_TOKENS), do_lower_case=True, strip_accents=False).backend_tokenizer
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    counts = Counter(char for text in texts for char in backend.normalizer.normalize_str(text) if not char.isspace())
    alphabet = sorted(char for char, count in counts.items() if count >= 5)
    # Single characters are given as special tokens, for their ids to be fixed: else the trainer numbers them in the order
    # of a hash map, which differs from run to run, and breaks ties between pairs by those numbers.
    fixed = SPECIAL_TOKENS + alphabet + [f"##{char}" for char in alphabet]
    learner.train_from_iterator(
        _known_characters(texts, alphabet, backend.normalizer),
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=fixed, show_progress=False),
    )
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    vocab = _ids([token for token, _ in learned])
    return BertTokenizer(vocab=vocab, do_lower_case=True, strip_accents=False, model_max_length=max_tokens)


def _known_characters(texts: list[str], alphabet: list[str], normalizer: Any) -> Iterator[str]:
    """Normalized texts, with a space for each character outside the alphabet, so that the trainer numbers none itself."""
    known = {*alphabet, " "}
    for text in texts:
        yield "".join(char if char in known else " " for char in normalizer.normalize_str(text))


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _pretrain(run: TrainingRun, tokenizer: Any, model: Any, texts: list[str]) -> None:
    """Trains the encoder of `model` on masked tokens of `texts`, in place (Devlin et al., 2019).

    The vector of [CLS] is trained to tell which tokens the text has, for nothing else trains it before fine-tuning.
    """
    options, device = run.options, run.device
    rows = token_ids(tokenizer, texts, min(options.pretrain_max_tokens, options.max_tokens))
    model.to(device)
    guesser: Any = BertForMaskedLM(model.config)
    guesser.to(device)
    guesser.bert.load_state_dict(model.bert.state_dict(), strict=False)
    head, body, pooler = guesser.cls, guesser.bert, model.bert.pooler
    special = torch.tensor(tokenizer.all_special_ids, device=device)

    def loss_of(batch: Batch) -> Tensor:
        ids = padded([rows[place] for place in batch], tokenizer.pad_token_id, device)
        hidden = hidden_tokens(ids, tokenizer, options.pretrain_masking)
        states = body(_masked(ids, hidden, tokenizer), (ids != tokenizer.pad_token_id).long()).last_hidden_state
        # The vocabulary is most of the arithmetic, so logits are computed for hidden tokens alone.
        guesses = head(states[hidden]).float()
        loss = functional.cross_entropy(guesses, ids[hidden], reduction="sum") / max(1, len(guesses))
        if options.pretrain_summary:
            present = torch.zeros(len(batch), len(tokenizer), device=device).scatter_(1, ids, 1.0)
            present[:, special] = 0
            wanted = present / present.sum(1, keepdim=True).clamp(min=1)
            loss = loss + options.pretrain_summary * functional.cross_entropy(head(pooler(states)).float(), wanted)
        return loss

    guesser.train()
    lengths, epochs = [len(row) for row in rows], range(options.pretrain_epochs)
    batches = [batch for _ in epochs for batch in shuffled_batches(lengths, options.batch_texts, run.rng)]
    parameters = [*guesser.parameters(), *(pooler.parameters() if options.pretrain_summary else ())]
    optimise(run, parameters, batches, loss_of, options.pretrain_learning_rate, "masked tokens")
    model.bert.load_state_dict(body.state_dict(), strict=False)


def _masked(ids: Tensor, hidden: Tensor, tokenizer: Any) -> Tensor:
    """`ids` with 80 % of the hidden tokens replaced by [MASK], 10 % by a random token (Devlin et al., 2019)."""
    draw = torch.rand(ids.shape, device=ids.device)
    other = torch.randint(len(SPECIAL_TOKENS), len(tokenizer), ids.shape, device=ids.device)
    masked = torch.where(hidden & (draw < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(hidden & (draw >= 0.9), other, masked)
