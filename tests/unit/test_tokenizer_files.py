"""From whatever files a tokenizer is read, it is the one that transformers makes of them."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tests.support.checkpoint import TOKENIZER
from worker.model.checkpoint import BUILTIN, find_in
from worker.model.reviews import read_reviews
from worker.model.tokenizer import ODD_TEXTS, CheckpointTokenizer
from worker.model.tokenizer_files import load_tokenizer
from worker.model.torch.wrapped_tokenizer import WrappedTokenizer, wrap_tokenizer

TEXTS = [*ODD_TEXTS, *read_reviews(), "Ёлка [new] x[new]y <mask>a <s>b</s> [UNK] [[MASK] ]  <unk> \u0130 e\u0301 ﬁ ½ ①"]

Make = Callable[[Path], None]


def write(folder: Path, **files: Any) -> None:
    """Writes JSON files; the double underscore in a name stands for its dot."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def change(folder: Path, name: str, **entries: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def load(folder: Path) -> CheckpointTokenizer:
    return load_tokenizer("./a", find_in(folder), json.loads((folder / "config.json").read_text()))


def assert_same_as_transformers(folder: Path) -> CheckpointTokenizer:
    """Compares ids, whole and cut, and all that the worker asks of a tokenizer."""
    theirs = AutoTokenizer.from_pretrained(folder)
    wanted, ours = WrappedTokenizer(theirs), load(folder)
    for length in (None, 8):
        for text, some, others in zip(TEXTS, ours.encode(TEXTS, length), wanted(TEXTS, length), strict=True):
            assert some.tolist() == others.tolist(), ascii(text)
    fields = wrap_tokenizer(theirs)
    for field in CheckpointTokenizer.__dataclass_fields__.keys() - {"encode", "backend"}:
        assert getattr(ours, field) == getattr(fields, field), field
    return ours


# --- The files of the checkpoints ---


def of_the_card(folder: Path) -> None:
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)


def of_builtin(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)


def vocabulary_of_bert(folder: Path) -> None:
    shutil.copy(TOKENIZER / "vocab.txt", folder)
    write(folder, config={"model_type": "bert"})


@cache
def byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        read_reviews(),
        trainers.BpeTrainer(vocab_size=1_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer.to_str()


def of_roberta(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(byte_pairs())
    write(folder, config={"model_type": "roberta"}, tokenizer_config={"model_max_length": 512})


def vocabulary_of_roberta(folder: Path) -> None:
    Tokenizer.from_str(byte_pairs()).model.save(str(folder))
    write(folder, config={"model_type": "roberta"})


@cache
def pieces(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1_000, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(read_reviews(), trainer)
    return tokenizer.to_str()


def of_xlm_roberta(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(pieces(("<s>", "<pad>", "</s>", "<unk>", "<mask>")))
    write(folder, config={"model_type": "xlm-roberta"}, tokenizer_config={"tokenizer_class": "XLMRobertaTokenizerFast"})


def of_camembert(folder: Path) -> None:
    special = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>")
    (folder / "tokenizer.json").write_text(pieces(special))
    write(folder, config={"model_type": "camembert"})


CHECKPOINTS: list[Make] = [
    of_the_card, of_builtin, vocabulary_of_bert, of_roberta, vocabulary_of_roberta, of_xlm_roberta, of_camembert,
]  # fmt: skip


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_each_kind_of_file_gives_the_tokenizer_of_transformers(make: Make, tmp_path: Path) -> None:
    make(tmp_path)
    assert_same_as_transformers(tmp_path)
