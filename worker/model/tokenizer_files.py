"""The tokenizer of a checkpoint from its files, by the library ``tokenizers`` alone: tokenizer.json, or a vocabulary.

The ids are those that transformers 5 gives. Which class a checkpoint has follows its ``AutoTokenizer.from_pretrained``;
which special tokens, ``PreTrainedTokenizerBase._from_pretrained``; how they are added, ``TokenizersBackend.__init__``.
"""

import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # ``tokenizers`` reads it once, when it is first used

from tokenizers import AddedToken, Tokenizer

from worker.model.checkpoint import Find, ModelError, NeedsTorch
from worker.model.library_errors import as_model_error
from worker.model.tokenizer import CheckpointTokenizer, stated_maximum
from worker.model.tokenizer_classes import CAMEMBERT, CLASSES, GENERIC, Files, MissingFiles, Token, TokenizerClass

CLASS_OF: Final = {  # of a model_type, where no file names a class
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
}
ROLES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FORMATS: Final = ("sentencepiece.bpe.model", "tokenizer.model", "tekken.json", "tiktoken.model")


class SpecialTokens(NamedTuple):
    """``named``: by role, such as ``cls_token``. ``extra``: those without a role. ``added``: in the order of their ids."""

    named: dict[str, Token | None]
    extra: list[Token]
    added: list[AddedToken]


def load_tokenizer(name: str, find: Find, config: Mapping[str, Any]) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint with the files that ``find`` finds and ``config`` as its config.json. Blocks.

    ``name`` is for error messages. Raises ModelError; NeedsTorch for a tokenizer that only transformers can read.
    """
    with as_model_error(name, "loaded"):
        options = _object(name, find, "tokenizer_config.json") or {}
        serialized = _object(name, find, "tokenizer.json")
        kind = _class_of(name, options, config)
        _refuse_what_needs_the_extra(name, find, kind, options, serialized)
        tokens = _special_tokens(name, find, kind, options, serialized)
        try:
            backend = kind.build(Files(serialized, find), options, tokens.named)
        except MissingFiles:
            raise ModelError(
                f"model {name} cannot be loaded: its tokenizer's files are missing, or of a kind that is not known here"
            ) from None
        _add_tokens(backend, tokens)
        if kind.post_processor:
            backend.post_processor = kind.post_processor(backend, options, tokens.named)
        return _checkpoint_tokenizer(name, backend, options, serialized or {}, tokens)


def _class_of(name: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> TokenizerClass:
    """The class that transformers takes. Raises NeedsTorch for one that is not built here."""
    own = CLASS_OF.get(str(config.get("model_type")))
    stated = options.get("tokenizer_class") or config.get("tokenizer_class") or own
    kind = CLASSES.get(str(stated).removesuffix("Fast"))
    if own is None or kind is None or (config.get("model_name") and kind is not CLASSES[own]):
        # transformers takes another class than the stated one for some values of model_name
        raise NeedsTorch(name, f"its tokenizer is of class {str(stated)[:100]}")
    return kind


def _refuse_what_needs_the_extra(
    name: str, find: Find, kind: TokenizerClass, options: Mapping[str, Any], serialized: Mapping[str, Any] | None
) -> None:
    if serialized is None:
        for file in OTHER_FORMATS:
            if find(file):
                raise NeedsTorch(
                    name, f"it has {file} and no tokenizer.json", "save a tokenizer.json with transformers"
                )
    elif kind.model not in (None, serialized["model"].get("type", kind.model)):
        raise NeedsTorch(name, f"its tokenizer.json is of type {serialized['model']['type']}, unlike its class")
    if options.get("fast_tokenizer_files") not in (None, [], ["tokenizer.json"]):
        raise NeedsTorch(name, "its tokenizer_config.json sets fast_tokenizer_files")
    if options.get("fix_mistral_regex"):
        raise NeedsTorch(name, "its tokenizer_config.json sets fix_mistral_regex")


def _special_tokens(
    name: str,
    find: Find,
    kind: TokenizerClass,
    options: Mapping[str, Any],
    serialized: Mapping[str, Any] | None,
) -> SpecialTokens:
    given = dict(options)
    if "additional_special_tokens" in given and not given.get("extra_special_tokens"):
        given["extra_special_tokens"] = given.pop("additional_special_tokens")
    others = {key: given.pop(key) for key in options if _is_other_role(key) and isinstance(given.get(key), str)}
    if isinstance(given.get("extra_special_tokens"), dict):
        others |= given.pop("extra_special_tokens")
    if "added_tokens_decoder" in given:
        added = {int(number): AddedToken(**token) for number, token in given["added_tokens_decoder"].items()}
    else:
        given |= _special_tokens_map(name, find, given)
        if isinstance(given.get("extra_special_tokens"), dict):
            others |= given.pop("extra_special_tokens")
        added = _added_tokens(name, find, given, serialized)
    given, others = _as_tokens(given), _as_tokens(others)
    named: dict[str, Any] = dict.fromkeys(ROLES) | dict(kind.tokens)
    named |= {role: given[role] for role in ROLES if role in given}
    named |= {key: given[key] for key in given if _is_other_role(key) and isinstance(given[key], Token)} | others
    if kind is CAMEMBERT and isinstance(named["mask_token"], str):
        named["mask_token"] = AddedToken(named["mask_token"], lstrip=True, special=True)
    for role, token in named.items():
        if not isinstance(token, Token | None):
            raise ModelError(f"model {name} cannot be loaded: {role} is {ascii(token)[:100]}; it should be a string")
    padding = (serialized or {}).get("padding")
    if kind is GENERIC and "pad_token" not in given and padding:
        named["pad_token"] = padding["pad_token"]
    extra = given.get("additional_special_tokens") or kind.extra
    return SpecialTokens(
        named, list(given.get("extra_special_tokens", extra) or ()), [token for _, token in sorted(added.items())]
    )


def _special_tokens_map(name: str, find: Find, given: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens by role of special_tokens_map.json, which override those ``given`` in tokenizer_config.json."""
    tokens = _object(name, find, "special_tokens_map.json") or {}
    for key, value in tokens.items():
        if key == "extra_special_tokens" and isinstance(value, list):
            more = [AddedToken(**{**token, "special": True}) if isinstance(token, dict) else token for token in value]
            before = list(given.get(key) or [])
            tokens[key] = before + [token for token in more if token not in before]
        elif key != "extra_special_tokens" and isinstance(value, dict):
            tokens[key] = AddedToken(**{**value, "special": True})
    return tokens


def _added_tokens(
    name: str, find: Find, given: Mapping[str, Any], serialized: Mapping[str, Any] | None
) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json and tokenizer.json by their ids; those of tokenizer.json override the others."""
    special = {str(given[role]) for role in ROLES if given.get(role)}
    special |= set(map(str, given.get("extra_special_tokens") or []))
    added = {
        number: AddedToken(content, normalized=content not in special, special=content in special)
        for content, number in (_object(name, find, "added_tokens.json") or {}).items()
    }
    for token in (serialized or {}).get("added_tokens", []):
        added[token["id"]] = AddedToken(**{option: value for option, value in token.items() if option != "id"})
    return added


def _as_tokens(value: Any) -> Any:
    """A value of a JSON file, with an AddedToken for each object that is marked as one."""
    if isinstance(value, list):
        return [_as_tokens(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("__type") == "AddedToken":
        return AddedToken(**{key: each for key, each in value.items() if key != "__type"})
    return {key: _as_tokens(each) for key, each in value.items()}


def _is_other_role(key: str) -> bool:
    return key.endswith("_token") and key not in ROLES


def _add_tokens(backend: Tokenizer, tokens: SpecialTokens) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | set(map(str, tokens.added))
    missing: list[Token] = list(tokens.added)
    for token in [*tokens.named.values(), *tokens.extra]:
        if token is not None and str(token) not in known and token not in missing:
            missing.append(token)
    by_role = {str(token) for token in tokens.named.values() if token}
    for place, token in enumerate(missing):
        if isinstance(token, str):
            missing[place] = AddedToken(token, special=True)
        elif str(token) in by_role:
            token.special = True
    backend.add_tokens(missing)


def _checkpoint_tokenizer(
    name: str, backend: Tokenizer, options: Mapping[str, Any], serialized: Mapping[str, Any], tokens: SpecialTokens
) -> CheckpointTokenizer:
    backend.encode_special_tokens = options.get("split_special_tokens", False)
    side = options.get("truncation_side", ((serialized.get("truncation") or {}).get("direction") or "right").lower())
    if side not in ("left", "right"):
        raise ModelError(
            f"model {name} cannot be loaded: truncation_side in tokenizer_config.json is {ascii(side)[:100]}; it should be "
            "left or right"
        )
    unknown = _id(backend, tokens.named["unk_token"], None)
    special = {_id(backend, token, unknown) for token in [*tokens.named.values(), *tokens.extra] if token is not None}
    return CheckpointTokenizer.of_backend(
        backend,
        model_max_length=stated_maximum(options.get("model_max_length", options.get("max_len"))),
        padding=_id(backend, tokens.named["pad_token"], unknown),
        unknown=unknown,
        special=frozenset(special - {None}),
        truncation_side=side,
    )


def _id(backend: Tokenizer, token: Token | None, unknown: int | None) -> int | None:
    if token is None:
        return None
    number = backend.token_to_id(str(token))
    return unknown if number is None else number


def _object(name: str, find: Find, file: str) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. Raises ModelError if it is none."""
    path = find(file)
    if path is None:
        return None
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ModelError(
            f"model {name} cannot be loaded: {file} is no valid JSON ({error.msg}); if it was cut short, copy or download "
            "it again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"model {name} cannot be loaded: {file} is JSON, and no object")
    return value
