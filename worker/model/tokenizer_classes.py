"""The tokenizer classes of transformers 5 that a checkpoint of the BERT family has, built with ``tokenizers`` alone.

A class takes the vocabulary from tokenizer.json, or from its files of older times, and makes all else itself: whatever
normalizer, pre-tokenizer and post-processor tokenizer.json has, those of the class replace them. Only the class that
transformers calls TokenizersBackend (PreTrainedTokenizerFast before) takes tokenizer.json as it is.
Source: tokenization_bert.py, tokenization_roberta.py, tokenization_xlm_roberta.py, tokenization_camembert.py.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

from worker.model.checkpoint import Find

Token = str | AddedToken
Options = Mapping[str, Any]
Named = Mapping[str, Token | None]


class MissingFiles(Exception):
    """A checkpoint has none of the files that its class reads."""


class Files:
    """The files of a vocabulary. ``serialized``: the object in tokenizer.json; None if there is no such file."""

    def __init__(self, serialized: Mapping[str, Any] | None, find: Find) -> None:
        self.serialized = serialized
        self._find = find

    @property
    def model(self) -> Mapping[str, Any]:
        """The object ``model`` of tokenizer.json. Raises MissingFiles if there is no such file."""
        if self.serialized is None:
            raise MissingFiles
        model: Mapping[str, Any] = self.serialized["model"]
        return model

    def path(self, name: str) -> str:
        """A file by its name. Raises MissingFiles."""
        found = self._find(name)
        if found is None:
            raise MissingFiles
        return str(found)


class TokenizerClass(NamedTuple):
    """How a class of transformers makes its tokenizer.

    ``model``: the ``type`` of the model in tokenizer.json; None if it takes any. ``tokens``: the special tokens by role
    where no file states them. ``extra``: likewise, those without a role. ``build``: the tokenizer without added tokens.
    ``post_processor``: what puts special tokens around a text, once all tokens are added; None leaves that of ``build``.
    """

    model: str | None
    tokens: Mapping[str, Token]
    extra: tuple[str, ...]
    build: Callable[[Files, Options, Named], Tokenizer]
    post_processor: Callable[[Tokenizer, Options, Named], Any] | None


def _as_it_is(files: Files, options: Options, named: Named) -> Tokenizer:
    del options, named
    if files.serialized is None:
        raise MissingFiles
    return Tokenizer.from_file(files.path("tokenizer.json"))


def _bert(files: Files, options: Options, named: Named) -> Tokenizer:
    vocabulary = WordPiece.read_file(files.path("vocab.txt")) if files.serialized is None else files.model["vocab"]
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=str(named["unk_token"])))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _around_bert(tokenizer: Tokenizer, options: Options, named: Named) -> Any:
    del options
    first, last = str(named["cls_token"]), str(named["sep_token"])
    ids = [(first, _id(tokenizer, named, "cls_token", 2)), (last, _id(tokenizer, named, "sep_token", 3))]
    return processors.TemplateProcessing(single=f"{first}:0 $A:0 {last}:0", special_tokens=ids)


def _roberta(files: Files, options: Options, named: Named) -> Tokenizer:
    del named
    if files.serialized is None:
        vocabulary, merges = BPE.read_file(files.path("vocab.json"), files.path("merges.txt"))
    else:
        vocabulary, pairs = files.model["vocab"], files.model.get("merges") or []
        merges = [(left, right) for left, right in (p.split(" ") if isinstance(p, str) else p for p in pairs)]
    model = BPE(vocabulary, merges, dropout=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _around_roberta(tokenizer: Tokenizer, options: Options, named: Named) -> Any:
    return processors.RobertaProcessing(
        (str(named["sep_token"]), _id(tokenizer, named, "sep_token")),
        (str(named["cls_token"]), _id(tokenizer, named, "cls_token")),
        options.get("trim_offsets", True),
        options.get("add_prefix_space", False),
    )


def _xlm_roberta(files: Files, options: Options, named: Named) -> Tokenizer:
    del named
    return _sentence_piece(files, options, unknown=3)


def _camembert(files: Files, options: Options, named: Named) -> Tokenizer:
    pieces = [piece for piece, _ in files.model["vocab"]]
    unknown = str(named["unk_token"])
    return _sentence_piece(files, options, unknown=pieces.index(unknown) if unknown in pieces else 0)


def _sentence_piece(files: Files, options: Options, unknown: int) -> Tokenizer:
    pieces = list(map(tuple, files.model["vocab"]))
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unknown, byte_fallback=False))
    characters = _character_map(files.serialized or {})
    if characters is not None:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    scheme = "always" if options.get("add_prefix_space", True) else "never"
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    return tokenizer


def _around_sentence_piece(tokenizer: Tokenizer, options: Options, named: Named) -> Any:
    del options
    first, last = str(named["bos_token"]), str(named["eos_token"])
    ids = [(first, _id(tokenizer, named, "bos_token")), (last, _id(tokenizer, named, "eos_token"))]
    return processors.TemplateProcessing(single=[first, "$A", last], special_tokens=ids)


def _character_map(serialized: Mapping[str, Any]) -> bytes | None:
    """SentencePiece's table of normalized characters, if the normalizer in tokenizer.json has one."""
    normalizer = serialized.get("normalizer") or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    maps = (step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled")
    found = next(maps, None)
    return None if found is None else base64.b64decode(found)


def _id(tokenizer: Tokenizer, named: Named, role: str, default: int | None = None) -> int:
    """The id of the token with a role, which is among the added ones; ``default`` where files say that there is none."""
    token = named[role]
    number = default if token is None else tokenizer.token_to_id(str(token))
    if number is None:
        raise ValueError(f"{role} in its tokenizer_config.json is {token}, and each text should have one")
    return number


BERT: Final = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
ROBERTA: Final = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
NOT_USED: Final = ("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED")
CAMEMBERT: Final = TokenizerClass("Unigram", ROBERTA, NOT_USED, _camembert, _around_sentence_piece)
GENERIC: Final = TokenizerClass(None, {}, (), _as_it_is, None)
CLASSES: Final = {
    "BertTokenizer": TokenizerClass("WordPiece", BERT, (), _bert, _around_bert),
    "RobertaTokenizer": TokenizerClass("BPE", ROBERTA, (), _roberta, _around_roberta),
    "XLMRobertaTokenizer": TokenizerClass("Unigram", ROBERTA, (), _xlm_roberta, _around_sentence_piece),
    "CamembertTokenizer": CAMEMBERT,
    "TokenizersBackend": GENERIC,
    "PreTrainedTokenizer": GENERIC,
    "PythonBackend": GENERIC,
}
"""By the name in a checkpoint's files, without ``Fast`` at its end."""
