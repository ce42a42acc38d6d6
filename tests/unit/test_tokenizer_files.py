"""From whatever files a tokenizer is read, it is the one that transformers makes of them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tests.support.checkpoint import TOKENIZER
from tests.support.process import environment
from worker.model.checkpoint import BUILTIN, ModelError, NeedsTorch, find_in
from worker.model.reviews import read_reviews
from worker.model.tokenizer import ODD_TEXTS, CheckpointTokenizer
from worker.model.tokenizer_files import load_tokenizer
from worker.model.torch.wrapped_tokenizer import WrappedTokenizer, wrap_tokenizer
from worker.model.truncation import max_tokens_of

TEXTS = [
    *ODD_TEXTS,
    *read_reviews()[:20],
    "Ёлка [new] x[new]y  <mask>a <s>b</s> [UNK] [[MASK] ]  <unk> \u0130 e\u0301 ﬁ ½ ①",
]

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


def assert_same_as_transformers(folder: Path, texts: Sequence[str] = TEXTS) -> CheckpointTokenizer:
    """Compares ids, whole and cut, and all that the worker asks of a tokenizer."""
    theirs = AutoTokenizer.from_pretrained(folder)
    wanted, ours = WrappedTokenizer(theirs), load(folder)
    for length in (None, 8):
        for text, some, others in zip(texts, ours.encode(texts, length), wanted(texts, length), strict=True):
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
def card_files(tokens: int) -> dict[str, str]:
    """The card's files with the first tokens of its vocabulary alone."""
    files = {file.name: file.read_text() for file in TOKENIZER.iterdir()}
    tokenizer = json.loads(files["tokenizer.json"])
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < tokens}
    vocab = "".join(files["vocab.txt"].splitlines(keepends=True)[:tokens])
    return files | {"tokenizer.json": json.dumps(tokenizer), "vocab.txt": vocab}


def of_a_small_card(folder: Path) -> None:
    """For what does not depend on the vocabulary: this tenth has every letter, and is read ten times as fast."""
    for name, content in card_files(3_000).items():
        (folder / name).write_text(content)


def small_vocabulary_of_bert(folder: Path) -> None:
    (folder / "vocab.txt").write_text(card_files(3_000)["vocab.txt"])
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
    tokenizer.train_from_iterator(read_reviews()[:200], trainer)
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


@pytest.fixture(params=CHECKPOINTS, ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.param(tmp_path)
    return tmp_path


def test_each_kind_of_file_gives_the_tokenizer_of_transformers(folder: Path) -> None:
    assert_same_as_transformers(folder, [*TEXTS, *read_reviews()])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """transformers' tokenizer and ours, of each kind of file."""
    both = []
    for make in CHECKPOINTS:
        folder = tmp_path_factory.mktemp("checkpoint")
        make(folder)
        both.append((WrappedTokenizer(AutoTokenizer.from_pretrained(folder)), load(folder).encode))
    return both


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.none() | st.integers(3, 20))
def test_ids_of_any_text_are_those_of_transformers(
    pairs: list[tuple[Any, Any]], texts: list[str], length: int | None
) -> None:
    for theirs, ours in pairs:
        assert [ids.tolist() for ids in ours(texts, length)] == [ids.tolist() for ids in theirs(texts, length)]


def test_the_golden_ids_of_the_card(tmp_path: Path) -> None:
    of_the_card(tmp_path)
    wanted = [2, 7063, 3261, 4192, 4823, 2242, 13786, 2085, 2506, 25263, 1545, 328, 700, 2593, 5, 3]
    assert load(tmp_path).encode(["Какая гадость эта ваша заливная рыба!"])[0].tolist() == wanted


# --- What the other files say ---


@pytest.mark.parametrize("make", [of_a_small_card, small_vocabulary_of_bert])
@pytest.mark.parametrize("options", list(product((True, False), (True, False, None), (True, False))), ids=str)
def test_the_options_of_bert(make: Make, options: tuple[bool, bool | None, bool], tmp_path: Path) -> None:
    make(tmp_path)
    names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    write(tmp_path, tokenizer_config=dict(zip(names, options, strict=True)))
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize("make", [of_roberta, vocabulary_of_roberta, of_xlm_roberta, of_camembert])
@pytest.mark.parametrize("has_space", [True, False])
def test_the_space_before_the_first_word(make: Make, has_space: bool, tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path, tokenizer_config={"add_prefix_space": has_space, "trim_offsets": not has_space})
    assert_same_as_transformers(tmp_path)


NEW = {"content": "[new]", "single_word": True, "lstrip": True, "rstrip": False, "normalized": True, "special": False}
MASK = {"content": "[[MASK]", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a side": {"tokenizer_config": {"truncation_side": "left", "model_max_length": 77}},
    "no maximum": {"tokenizer_config": {"model_max_length": 1e30}},
    "an older name of the maximum": {"tokenizer_config": {"max_len": 99}},
    "extra tokens": {"tokenizer_config": {"additional_special_tokens": ["[new]", "x"], "extra_special_tokens": {}}},
    "extra tokens by name": {"tokenizer_config": {"extra_special_tokens": {"image_token": "[new]"}}},
    "extra tokens in a list": {"tokenizer_config": {"extra_special_tokens": ["[new]", "[new]"]}},
    "a role of its own": {"tokenizer_config": {"image_token": "[new]", "bos_token": "y"}},
    "marked tokens": {"tokenizer_config": {"mask_token": {"__type": "AddedToken", **MASK}, "bos_token": "[new]"}},
    "added tokens": {"tokenizer_config": {"added_tokens_decoder": {"90001": NEW, "90000": MASK | {"content": "y"}}}},
    "no added tokens": {"tokenizer_config": {"mask_token": "<mask>", "added_tokens_decoder": {}}},
    "an added token with a role": {
        "tokenizer_config": {"mask_token": "[[MASK]", "added_tokens_decoder": {"90000": MASK, "90001": NEW}}
    },
    "added tokens of older times": {
        "added_tokens": {"[new]": 90_001, "[[MASK]": 90_000},
        "special_tokens_map": {"mask_token": MASK, "additional_special_tokens": ["y"]},
    },
    "tokens by role": {"special_tokens_map": {"mask_token": MASK | {"special": True}, "other_token": "[new]"}},
    "extra tokens by role": {
        "tokenizer_config": {"extra_special_tokens": ["x"]},
        "special_tokens_map": {"extra_special_tokens": [MASK, "x", "y"]},
    },
    "extra tokens by role and name": {"special_tokens_map": {"extra_special_tokens": {"image_token": "[new]"}}},
    "special tokens that are split": {"tokenizer_config": {"split_special_tokens": True}},
    "tokens around a text": {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True, "bos_token": "y"}},
    "no token for padding": {"tokenizer_config": {"pad_token": None}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [of_a_small_card, small_vocabulary_of_bert, vocabulary_of_roberta, of_camembert])
def test_special_tokens_and_limits(make: Make, options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    write(tmp_path, **options)
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_class_that_takes_a_tokenizer_json_as_it_is(options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    of_a_small_card(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    write(tmp_path, **{"tokenizer_config": {}} | options)
    change(tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    change(
        tmp_path,
        "tokenizer.json",
        normalizer={"type": "Lowercase"},
        truncation={"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
    )  # fmt: skip
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize("make", [of_a_small_card, of_roberta, of_xlm_roberta, of_camembert])
def test_a_class_replaces_what_a_tokenizer_json_has(make: Make, tmp_path: Path) -> None:
    make(tmp_path)
    change(
        tmp_path,
        "tokenizer.json",
        normalizer={"type": "Lowercase"},
        pre_tokenizer={"type": "Whitespace"},
        post_processor=None,
        truncation={"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
    )
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("kind", "make"), [("BertTokenizerFast", of_a_small_card), ("XLMRobertaTokenizer", of_xlm_roberta)]
)
@pytest.mark.parametrize("where", ["config", "tokenizer_config"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert"])
def test_the_class_may_be_another_than_the_model_s(
    kind: str, make: Make, where: str, model_type: str, tmp_path: Path
) -> None:
    make(tmp_path)
    write(tmp_path, config={"model_type": model_type}, tokenizer_config={})
    change(tmp_path, f"{where}.json", tokenizer_class=kind)
    assert_same_as_transformers(tmp_path)


def test_a_real_sentencepiece_model_that_was_converted(tmp_path: Path) -> None:
    """With the table of characters that SentencePiece makes of NFKC."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(read_reviews()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "sentencepiece.bpe"), vocab_size=1_000, minloglevel=2
    )
    write(tmp_path, config={"model_type": "xlm-roberta"})
    with pytest.raises(
        NeedsTorch, match=r"without torch: it has sentencepiece\.bpe\.model and no tokenizer\.json; pip install"
    ):
        load(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "Precompiled" in (tmp_path / "tokenizer.json").read_text()
    assert_same_as_transformers(tmp_path)


# --- What is refused ---


def without_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()


REFUSALS: dict[str, tuple[Make, str]] = {
    "no files": (without_files, "its tokenizer's files are missing"),
    "broken": (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json is no valid JSON"),
    "no object": (lambda folder: write(folder, tokenizer_config=[]), r"tokenizer_config\.json is JSON, and no object"),
    "side": (lambda folder: write(folder, tokenizer_config={"truncation_side": "up"}), "should be left or right"),
    "class": (lambda folder: write(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}), "without torch"),
    "model": (lambda folder: write(folder, config={"model_type": "albert"}), "without torch"),
    "type": (lambda folder: write(folder, config={"model_type": "roberta"}, tokenizer_config={}), "without torch"),
    "token": (lambda folder: write(folder, tokenizer_config={"cls_token": 7}), "cls_token is 7; it should be a string"),
    "role": (lambda folder: write(folder, tokenizer_config={"cls_token": {"content": "x"}}), "it should be a string"),
    "vocabulary": (lambda folder: change(folder, "tokenizer.json", model={"type": "WordPiece"}), "cannot be loaded"),
    "option": (lambda folder: write(folder, tokenizer_config={"do_lower_case": "yes"}), "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_loaded(spoil: Make, words: str, tmp_path: Path) -> None:
    of_a_small_card(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    spoil(tmp_path)
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(
    ("stated", "config", "most"),
    [
        (None, {"model_type": "bert", "max_position_embeddings": 300}, 300),
        (128, {"model_type": "bert", "max_position_embeddings": 300}, 128),
        (None, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        (None, {"model_type": "roberta", "max_position_embeddings": 514}, 512),
        (None, {"model_type": "bert"}, 512),
        (77, {"model_type": "gpt2", "max_position_embeddings": None}, 77),
        (77, {"model_type": "xlnet", "max_position_embeddings": -1}, 77),
    ],
)
def test_the_most_tokens_of_a_text(stated: int | None, config: dict[str, Any], most: int, tmp_path: Path) -> None:
    of_builtin(tmp_path)
    write(tmp_path, tokenizer_config={"model_max_length": stated})
    assert max_tokens_of("./a", load(tmp_path), config) == most


@pytest.mark.parametrize(
    ("stated", "positions", "words"),
    [
        (2, 512, r"model_max_length in tokenizer_config\.json leaves room for 2 tokens, and the shortest text has 3"),
        (9, 1, r"max_position_embeddings in config\.json leaves room for 1 tokens"),
        (1e30, None, "nothing says how many tokens a text may have; set model_max_length"),
    ],
)
def test_no_room_and_no_limit(stated: float, positions: int | None, words: str, tmp_path: Path) -> None:
    of_builtin(tmp_path)
    write(tmp_path, tokenizer_config={"model_max_length": stated})
    with pytest.raises(ModelError, match=words):
        max_tokens_of("./a", load(tmp_path), {"model_type": "bert", "max_position_embeddings": positions})


def test_neither_torch_nor_transformers_is_imported() -> None:
    program = (
        "import sys\n"
        "from worker.model.checkpoint import BUILTIN, find_in\n"
        "from worker.model.tokenizer import choose_encode\n"
        "from worker.model.tokenizer_files import load_tokenizer\n"
        "choose_encode(load_tokenizer('builtin', find_in(BUILTIN), {'model_type': 'bert'}))\n"
        "print(sys.modules.keys() & {'torch', 'transformers', 'sentencepiece', 'huggingface_hub'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment(), check=True, timeout=150
    )
    assert done.stdout == b"set()\n"
