"""A checkpoint: tokenizer and network, texts → token ids → logits. The only module that imports transformers.

Every public function here blocks, and none may be called from an event loop. Tokenizing and the network may run at once.
"""

import logging
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from worker.core.batching import TokenIds, cut_by_length
from worker.core.sentiment import (
    LABELS,
    Activation,
    Floats,
    Label,
    Sentiment,
    to_labels,
    to_probabilities,
    to_scores,
    to_sentiments,
)
from worker.errors import UserError
from worker.model.autotune import PATIENCE_S, one_thread, tune_budget, tune_pass_tokens, tune_threads, use_one_thread
from worker.model.backends import Choice, PaddedPasses, Run, backend_of, choose, choose_on_cuda, name_of
from worker.model.checkpoint import Checkpoint, Find, HubUnreachable, ModelError, folder_of, found_in
from worker.model.cuda import PASSES, passes_on
from worker.model.reviews import read_reviews
from worker.model.tokenizer import Encode, Ids, choose_encode, normalizing, panics_as_errors
from worker.runtime.memory import keep_freed_blocks
from worker.runtime.threads import parallel_map
from worker.settings import DEFAULT_MODEL, ModelSettings, is_folder

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask the hub to convert a .bin
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from huggingface_hub.utils.tqdm import progress_bar_states
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

log = logging.getLogger(__name__)

CHARS_PER_TOKEN = 8  # Russian words have about four a token: such a prefix nearly always fills the model's maximum
WORD_TOKENS = 128  # more than one word can have: those before the last so many do not change with what follows
NO_MAXIMUM = 2**31  # from there on a number of tokens says that there is no maximum, as transformers' 1e30 does
MOST_LABELS, MOST_CHARS = 5, 300  # of a checkpoint's or a library's words, in a sentence
DOUBTFUL = 0.5  # share of unknown tokens in the shipped reviews that is worth a warning
SURROGATES = re.compile("[\ud800-\udfff]")  # halves of a character: no tokenizer takes them
ReturnType = Literal["label", "score", "proba"]
Normalize = Literal["nfc", "none"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # else float32, whatever the file holds
ROBERTA_LIKE = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
}  # their positions begin behind the padding's id


class Tokens(NamedTuple):
    """N tokenized texts: their ids, each at most the model's maximum, and whether a text was cut for it."""

    ids: list[Ids]
    truncated: list[bool]


class SentimentModel:
    """A loaded checkpoint. ``name`` is that of results, ``name@revision``; ``max_tokens`` the longest text in tokens.

    ``passes``: so many threads may call ``logits`` at once, and together are the fastest. ``widths``: those that texts are
    padded to, ascending; none if any. ``pass_tokens``: as cut_by_length takes them. ``doubt``: what is odd about the
    checkpoint, though it can be used; None if nothing is.
    """

    def __init__(
        self,
        *,
        name: str,
        encode: Encode,
        run: Run,
        device: torch.device,
        passes: int,
        backend: str,
        dtype: str,
        columns: list[int],
        activation: Activation,
        max_tokens: int,
        max_batch_tokens: int,
        padding: int,
        closing: int,
        doubt: str | None,
        loaded_with: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.doubt = doubt
        self.activation: Activation = activation
        self.max_batch_tokens = max_batch_tokens
        self.device = device
        self.backend = backend
        self.dtype = dtype
        self.passes = passes
        self.widths = run.widths
        self.pass_tokens = run.pass_tokens
        self.max_tokens = max_tokens
        self._encode = encode
        self._run = run
        self._columns = columns
        self._padding = padding
        self._closing = closing
        self._loaded_with = loaded_with

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the arguments of ``load``, and the commit if the model is the hub's: unpickling loads it again."""
        return partial(SentimentModel.load, **self._loaded_with), ()

    @classmethod
    @one_thread()
    def load(
        cls,
        name_or_path: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        activation: Activation = "sigmoid",
        normalize: Normalize = "nfc",
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        cpu_threads: int | Literal["auto"] = "auto",
        max_batch_tokens: int | Literal["auto"] = "auto",
        patience_s: float = PATIENCE_S,
    ) -> "SentimentModel":
        """Loads a checkpoint from a folder, the hub (its cache first if offline), or the ``builtin`` one.

        Never runs a checkpoint's own code: not its Python, and of a ``.bin`` only the tensors. On a CPU nothing of torch
        or transformers stays set for the process. Raises ModelError, and BackendError where this checkpoint or machine
        cannot do what ``backend`` or ``dtype`` ask for.

        name_or_path: a folder, with ``/``, ``./``, ``../`` or ``~`` in front; ``builtin``; any other name is of the hub
        revision: the hub's branch, tag or commit; None is its newest
        activation: logits → probabilities: ``sigmoid``, as the card does, or ``softmax``
        normalize: ``nfc`` drops stress marks and composes letters before a text is tokenized; ``none`` leaves it
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is cuda where there is one
        dtype: ``float32``, ``bfloat16``, ``float16``, on a CPU ``int8``; ``auto`` is float32 on a CPU, and on a GPU
            float16 where labels agree
        backend: ``torch`` or ``onnx``; ``auto`` takes the faster one on a CPU
        cpu_threads: passes of the network side by side, each on a thread; ``auto`` measures
        max_batch_tokens: tokens of a pass, padding included; ``auto`` measures
        patience_s: each of ``cpu_threads`` and ``max_batch_tokens`` that is auto is measured for so long
        """
        loaded_with = {key: value for key, value in locals().items() if key not in ("cls", "__class__")}
        where = _device(device)
        with _quiet(), _or_refused(name_or_path, "loaded"):
            loaded = _Loaded.read(name_or_path, revision, where, DTYPES.get(dtype, torch.float32))
        with _or_refused(name_or_path, "used"):
            longest = _max_tokens(name_or_path, loaded.tokenizer, loaded.config)
            encode = choose_encode(loaded.tokenizer)
            examples = encode(read_reviews(), longest)
            doubt = _unknown_words(name_or_path, loaded.tokenizer, examples)
            closing = _closing_tokens(loaded.tokenizer)
        if doubt:
            log.warning("%s", doubt)
        network, padding = loaded.network, loaded.tokenizer.pad_token_id or 0
        if where.type == "cuda":
            choice = choose_on_cuda(network, backend=backend, dtype=dtype, columns=loaded.columns, examples=examples)
        else:
            forward = choose(network, backend=backend, is_int8=dtype == "int8")
            choice = Choice(forward, "int8" if dtype == "int8" else name_of(network.dtype))
        if max_batch_tokens == "auto":
            max_batch_tokens = tune_budget(choice.forward, where, longest, patience_s)
        run: Run
        if where.type == "cuda":
            passes = PASSES
            run = passes_on(
                where,
                choice.forward,
                choice.exact,
                longest=longest,
                budget=max_batch_tokens,
                labels=loaded.config.num_labels,
                padding=padding,
            )
        else:
            passes = tune_threads(choice.forward, patience_s) if cpu_threads == "auto" else cpu_threads
            run = PaddedPasses(choice.forward, padding, tune_pass_tokens(choice.forward))
            log.info(
                "passes of the network side by side", extra={"cpu_threads": passes, "pass_tokens": run.pass_tokens}
            )
        return cls(
            name=f"{name_or_path}@{loaded.identity}{_set_otherwise(activation, normalize)}",
            encode=normalizing(encode) if normalize == "nfc" else encode,
            run=run,
            device=where,
            passes=passes,
            backend=backend_of(choice.forward),
            dtype=choice.dtype,
            columns=loaded.columns,
            activation=activation,
            max_tokens=longest,
            max_batch_tokens=max_batch_tokens,
            padding=padding,
            closing=closing,
            doubt=doubt,
            loaded_with=loaded_with | {"revision": loaded.commit},
        )

    @classmethod
    def load_as_set(cls, settings: ModelSettings) -> "SentimentModel":
        """``load`` by the settings that commands with a model share, in a process that is the worker's own."""
        own_process()
        model = cls.load(
            settings.model,
            revision=settings.revision,
            activation=settings.activation,
            normalize=settings.normalize,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
            cpu_threads=settings.cpu_threads,
            max_batch_tokens=settings.max_batch_tokens,
        )
        if model.device.type == "cpu":
            use_one_thread()
        return model

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of N texts. Of a very long one only the beginning is looked at, as much as fills the maximum."""
        if not texts:
            return Tokens([], [])
        prefix = self.max_tokens * CHARS_PER_TOKEN
        ids = self._encode([_prefix(text, prefix) for text in texts])
        padding = np.array([self._padding], dtype=np.int32)
        truncated = [False] * len(texts)
        for index, text in enumerate(texts):
            if len(text) > prefix or len(ids[index]) > self.max_tokens:
                ids[index], truncated[index] = self._cut(text, ids[index], prefix)
            elif not len(ids[index]):
                ids[index] = padding
        return Tokens(ids, truncated)

    def _cut(self, text: str, ids: Ids, prefix: int) -> tuple[Ids, bool]:
        """The ids of one text, of which those of its first ``prefix`` characters are given, and whether it was cut."""
        length = prefix
        while len(ids) <= self.max_tokens + WORD_TOKENS and length < len(text):
            length = length * 4 if length == prefix else len(text)  # each text is looked at three times at most
            (ids,) = self._encode([_prefix(text, length)])
        if len(ids) <= self.max_tokens:
            return ids, False
        if length == prefix:
            return self._encode([_prefix(text, length)], self.max_tokens)[0], True
        last = len(ids) - self._closing  # to have it cut would take as long again
        return np.concatenate([ids[: self.max_tokens - self._closing], ids[last:]]), True

    def logits(self, ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """Logits (N, 3), columns as LABELS, of N tokenized texts in one pass of the network.

        Raises what torch raises, torch.OutOfMemoryError among it.
        """
        return self._run(ids)[:, self._columns]

    def memory_bytes(self) -> int:
        """Device memory in use, bytes; 0 on CPU, where it is the process's own."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @overload
    def get_sentiment(self, text: str, return_type: Literal["label"] = "label") -> Label | None: ...  # type: ignore[overload-overlap]
    @overload
    def get_sentiment(self, text: str, return_type: Literal["score"]) -> float: ...  # type: ignore[overload-overlap]
    @overload
    def get_sentiment(self, text: Collection[str], return_type: Literal["label"] = "label") -> list[Label | None]: ...
    @overload
    def get_sentiment(self, text: Collection[str], return_type: Literal["score"]) -> list[float]: ...
    @overload
    def get_sentiment(self, text: Collection[str], return_type: Literal["proba"]) -> Floats: ...

    def get_sentiment(
        self, text: str | Collection[str], return_type: ReturnType = "label"
    ) -> Label | float | list[Label | None] | list[float] | Floats | None:
        """The model card's function: the label, the score from -1 to 1, or the probabilities as LABELS, of a text.

        For a sequence of N texts (a list, an array, a column) a list of N, or an N x 3 array for ``proba``. A text with a
        lone surrogate is no Unicode and has no answer: its label is None, its score and its probabilities are NaN.

        Raises ValueError for another ``return_type``, TypeError for what is neither a string nor a sequence of strings,
        FloatingPointError where the network answers with what is no number.
        """
        if return_type not in ("label", "score", "proba"):
            raise ValueError(f"return_type is {return_type!r}; it should be label, score or proba")
        probabilities = self._probabilities([text] if isinstance(text, str) else _texts(text))
        if return_type == "proba":
            return probabilities[0] if isinstance(text, str) else probabilities
        answers = to_scores(probabilities).tolist() if return_type == "score" else to_labels(probabilities)
        return answers[0] if isinstance(text, str) else answers

    def score(self, texts: Sequence[str]) -> list[tuple[Sentiment | None, bool]]:
        """For each of N texts its sentiment, and whether the text was cut.

        The sentiment is None where a logit is not finite, and for a text with a lone surrogate.
        """
        _, logits, truncated = self._all_logits(texts)
        return list(zip(to_sentiments(logits, self.activation), truncated.tolist(), strict=True))

    def _probabilities(self, texts: Sequence[str]) -> Floats:
        places, logits, _ = self._all_logits(texts)
        if not np.isfinite(logits[places]).all():
            raise FloatingPointError("the network answered with a logit that is not finite")
        return to_probabilities(logits, self.activation)

    def _all_logits(self, texts: Sequence[str]) -> tuple[list[int], NDArray[np.float32], NDArray[np.bool_]]:
        """Which of N texts can be tokenized, logits (N, 3), NaN for the others, and which texts were cut."""
        places = [place for place, text in enumerate(texts) if not SURROGATES.search(text)]
        ids, cut = self.tokenize([texts[place] for place in places])
        logits = np.full((len(texts), len(LABELS)), np.nan, dtype=np.float32)
        truncated = np.zeros(len(texts), dtype=np.bool_)
        truncated[places] = cut
        batches = cut_by_length([len(tokens) for tokens in ids], self.max_batch_tokens, self.pass_tokens, self.widths)
        answers = parallel_map(self.passes, lambda batch: self.logits([ids[index] for index in batch]), batches)
        for batch, answer in zip(batches, answers, strict=True):
            logits[[places[index] for index in batch]] = answer
        return places, logits, truncated


class _Loaded(NamedTuple):
    """What transformers has made of a checkpoint. ``columns``: which logit is negative, neutral, positive."""

    config: Any
    tokenizer: Any
    network: Any
    columns: list[int]
    identity: str
    commit: str | None  # of the hub

    @classmethod
    def read(cls, name: str, revision: str | None, where: torch.device, dtype: torch.dtype) -> "_Loaded":
        folder = folder_of(name, revision)
        source = str(folder or name)
        commit = None if folder else _commit(name, revision)  # all files are of one, whatever is published meanwhile
        files = Checkpoint(name, found_in(folder) if folder else _found_on_the_hub(name, commit))
        config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False)
        columns = _columns(name, config)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=commit, trust_remote_code=False)
        tokenizer.model_max_length = int(tokenizer.model_max_length)  # 512.0 is fine
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,  # else attention as config.json has it, perhaps the hub's code, would go before the argument
            revision=commit,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation="eager" if where.type == "cpu" else "sdpa",
            output_loading_info=True,
        )
        _refuse_untrained(name, loading)
        _refuse_tokens_without_rows(name, tokenizer, network)
        _tell_of_pickle(name, files.weights)
        identity = files.identity(folder) if folder else str(commit)
        network = _in_own_memory(network.to(where).eval())
        _refuse_without_padding(name, network)
        return cls(config, tokenizer, network, columns, identity, commit)


def own_process() -> None:
    """What a process that scores for itself alone wants, as a command's: ``load`` leaves a caller's process as it was."""
    keep_freed_blocks()
    for library in ("transformers", "huggingface_hub"):  # their log lines go where the worker's go
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True


def _texts(given: Collection[str]) -> list[str]:
    """The strings of any sequence, of whatever library. Raises TypeError, which names the place of what is none."""
    wanted = "get_sentiment takes a string or a sequence of strings"
    is_sequence = all(hasattr(given, name) for name in ("__len__", "__iter__", "__getitem__"))
    if not is_sequence or isinstance(given, bytes | bytearray | memoryview | Mapping):
        raise TypeError(f"{wanted}, and this is of type {type(given).__name__}")
    if getattr(given, "ndim", 1) != 1:  # a table's items are the names of its columns
        raise TypeError(f"{wanted}, and this is of type {type(given).__name__}, of {given.ndim} dimensions")  # type: ignore[attr-defined]
    texts = list(given)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{wanted}, and item {place}, counted from 0, is of type {type(text).__name__}")
    return texts


def _commit(name: str, revision: str | None) -> str:
    """The hub's commit that ``revision`` means now. Raises ModelError where neither hub nor cache tells."""
    config = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise ModelError(f"model {name} cannot be loaded: the hub has no config.json for it, or names no commit of it")
    return commit


def _found_on_the_hub(name: str, commit: str | None) -> Find:
    @cache  # each time is a request
    def find(file: str) -> Path | None:
        found = cached_file(name, file, revision=commit, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    return find


def _set_otherwise(activation: Activation, normalize: Normalize) -> str:
    """What changes results and is not as by default, for the model's name."""
    given = {"activation": (activation, "sigmoid"), "normalize": (normalize, "nfc")}
    return "".join(f"+{name}={value}" for name, (value, default) in given.items() if value != default)


def _closing_tokens(tokenizer: Any) -> int:
    """How many special tokens stand behind each text, such as [SEP]."""
    mask = tokenizer("а", return_special_tokens_mask=True)["special_tokens_mask"]
    return int(mask[::-1].index(0)) if 0 in mask else 0


def _prefix(text: str, length: int) -> str:
    """At most ``length`` characters, cut at white space, where no token of the beginning depends on what follows."""
    if len(text) <= length:
        return text
    for end in range(length, length // 2, -1):
        if text[end].isspace():
            return text[:end]
    return text[:length]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device is {name}, but torch finds no CUDA device here; cpu works everywhere")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ModelError(f"device is {name}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _columns(name: str, config: Any) -> list[int]:
    """Which logit is negative, neutral, positive, by the checkpoint's own names."""
    names = {str(label).strip().lower(): int(index) for index, label in (config.id2label or {}).items()}
    if set(names) != set(LABELS):
        labels = [str(label)[:MOST_CHARS] for label in (config.id2label or {}).values()]
        more = f" and {len(labels) - MOST_LABELS:,} more" if len(labels) > MOST_LABELS else ""
        listed = (", ".join(labels[:MOST_LABELS]) or "none") + more
        raise ModelError(
            f"model {name} cannot be loaded: its labels should be negative, neutral and positive, and this checkpoint has: "
            f"{listed}; if they mean these, rename them in its config.json (id2label)"
        )
    if sorted(names.values()) != list(range(len(LABELS))):
        raise ModelError(
            f"model {name} cannot be loaded: its labels should be numbered 0 to 2 in its config.json (id2label), and this "
            f"checkpoint has: {sorted(names.values())}"
        )
    return [names[label] for label in LABELS]


def _max_tokens(name: str, tokenizer: Any, config: Any) -> int:
    """The longest text, special tokens among its tokens. Raises ModelError where no text would fit."""
    limits = {"model_max_length in tokenizer_config.json": tokenizer.model_max_length}
    positions = getattr(config, "max_position_embeddings", None)
    if positions not in (None, -1):
        behind = (config.pad_token_id or 0) + 1 if config.model_type in ROBERTA_LIKE else 0
        limits["max_position_embeddings in config.json"] = positions - behind
    least = len(tokenizer("", verbose=False)["input_ids"]) + 1
    for field, limit in limits.items():
        if limit < least:
            raise ModelError(
                f"model {name} cannot be used: {field} leaves room for {limit} tokens, and the shortest text has {least}"
            )
    longest = int(min(limits.values()))
    if longest >= NO_MAXIMUM:
        raise ModelError(
            f"model {name} cannot be used: nothing says how many tokens a text may have; set model_max_length in its "
            "tokenizer_config.json"
        )
    return longest


def _unknown_words(name: str, tokenizer: Any, examples: Sequence[Ids]) -> str | None:
    """What to warn of where many words of the shipped reviews are unknown. Raises ModelError where all are."""
    unknown = tokenizer.unk_token_id
    special = [number for number in tokenizer.all_special_ids if number != unknown]
    tokens = np.concatenate(examples)
    words = tokens[~np.isin(tokens, special)]
    count = int(np.count_nonzero(words == unknown)) if unknown is not None else 0
    if count == len(words):
        raise ModelError(
            f"model {name} cannot be used: its tokenizer knows no word of the shipped reviews; is its tokenizer.json (or "
            "vocab.txt, or its SentencePiece model) missing? copy it into the folder"
        )
    if count <= DOUBTFUL * len(words):
        return None
    return (
        f"model {name}: {count / len(words):.0%} of the tokens of the shipped Russian reviews are unknown to its tokenizer; "
        "is it the one that the model was trained with?"
    )


def _in_own_memory(network: Any) -> Any:
    """On a CPU the weights are pages of the file, and would change, or end the process, when it is overwritten."""
    if network.device.type == "cpu":
        for tensor in network.parameters():
            tensor.data = tensor.data.clone()
    return network


def _refuse_untrained(name: str, loading: Any) -> None:
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name} is no finished classifier: its file lacks {len(missing)} weights ({missing[0]}, …), which would "
            "be random"
        )


def _refuse_tokens_without_rows(name: str, tokenizer: Any, network: Any) -> None:
    """On a GPU, a text with such a token would take the device away from every other text."""
    highest, rows = max(tokenizer.get_vocab().values(), default=0), network.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ModelError(
            f"model {name} cannot be used: its tokenizer gives ids up to {highest}, and its network has {rows} embeddings"
        )


def _refuse_without_padding(name: str, network: Any) -> None:
    """A decoder looks for the padding to find a text's end, and takes no two texts at once without."""
    ids = torch.zeros((2, 2), dtype=torch.long, device=network.device)
    try:
        with torch.inference_mode():
            network(input_ids=ids, attention_mask=torch.ones_like(ids))
    except ValueError as error:
        raise ModelError(
            f"model {name} cannot be used: it takes no two texts at once ({str(error).strip()}); set pad_token_id in its "
            "config.json"
        ) from None


def _tell_of_pickle(name: str, weights: Sequence[str]) -> None:
    if any(file.endswith(".safetensors") for file in weights):
        return
    log.warning(
        "model %s comes as a .bin without safetensors: its tensors were read by torch's weights-only reader, which runs "
        "no code of the file",
        name,
    )


@contextmanager
def _or_refused(name: str, what: str) -> Iterator[None]:
    """Raises ModelError, or HubUnreachable, for whatever a library raises about a checkpoint, a panic of Rust among it."""
    try:
        with panics_as_errors():
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        is_local = is_folder(name) or name == "builtin"
        kind = HubUnreachable if not is_local and _is_of_the_network(error) else ModelError
        raise kind(f"model {name} cannot be {what}: {_reason(error)[:MOST_CHARS]}") from error


def _is_of_the_network(error: BaseException | None) -> bool:
    """By name, for the hub's client has had several HTTP libraries underneath."""
    names = {"ConnectionError", "TimeoutError", "TransportError"}
    while error is not None:
        if any(kind.__name__ in names for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    words = str(error).strip()
    lines = [line.strip() for line in words.splitlines()] or [type(error).__name__]
    if "weights_only" in words or "Weights only" in words:
        return "its .bin holds more than tensors, which could run code"
    if "couldn't connect to" in words:
        return "the Hugging Face hub cannot be reached, and its cache does not hold it; try again, or name a folder"
    if "trust_remote_code" in words:
        return "it needs Python code of its own, which is never run here"
    if "have a `model_type`" in words:
        return "it has no config.json that names its model_type; it should be a folder with a checkpoint"
    if "deserializing header" in words:
        return f"its .safetensors is damaged ({lines[0]}); if it was cut short, copy or download it again"
    if "ignore_mismatched_sizes" in words:
        return "its weights have other sizes than its config.json states"
    if lines[0].startswith("Validation error for field") and len(lines) > 1:
        return f"its config.json is wrong: {lines[1]}"
    if "instantiate the backend tokenizer" in words:
        return "its tokenizer's files are missing, or of a kind that is not known here"
    if isinstance(error, KeyError | AttributeError | TypeError):
        kind = type(error).__name__
        return f"its config.json or tokenizer_config.json states what does not fit ({kind}: {lines[0]})"
    return lines[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and notices off the terminal while a checkpoint loads."""
    has_bars, of_the_hub = transformers_logging.is_progress_bar_enabled(), dict(progress_bar_states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if has_bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            progress_bar_states.clear()  # transformers has set the hub's, too
            progress_bar_states.update(of_the_hub)
