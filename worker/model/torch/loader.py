"""Reads a checkpoint with transformers: configuration, tokenizer and torch model.

In ``worker.model`` only this module imports transformers. Every function here blocks.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from worker.core.sentiment import LABELS
from worker.model.checkpoint import MAX_CHARS, Checkpoint, Find, ModelError, find_in, folder_of
from worker.model.library_errors import as_model_error
from worker.model.tokenizer import Ids

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask the hub to convert a .bin
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from huggingface_hub.utils.tqdm import progress_bar_states
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

log = logging.getLogger(__name__)

MAX_LABELS: Final = 5  # of a checkpoint, in a message
UNKNOWN_SHARE: Final = 0.5  # share of unknown tokens in the shipped reviews from which on a warning is given


class LoadedCheckpoint(NamedTuple):
    """A checkpoint as transformers has loaded it.

    ``columns``: the places of negative, neutral and positive among the logits. ``identity``: the revision in results.
    ``commit``: of the hub; None for a folder.
    """

    config: Any
    tokenizer: Any
    model: Any
    columns: list[int]
    identity: str
    commit: str | None


def load_checkpoint(name: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> LoadedCheckpoint:
    """Loads a checkpoint by the name of a folder or of the hub, or ``builtin``; the model is on ``device``, in ``dtype``.

    Runs no code of the checkpoint. Raises ModelError for one that cannot be loaded, HubUnreachable.
    """
    with _quiet(), as_model_error(name, "loaded"):
        return _load(name, revision, device, dtype)


def _load(name: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> LoadedCheckpoint:
    folder = folder_of(name, revision)
    source = str(folder or name)
    commit = None if folder else _commit(name, revision)  # all files are of one, whatever is published meanwhile
    files = Checkpoint(name, find_in(folder) if folder else _find_on_hub(name, commit))
    config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False)
    columns = _columns(name, config)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=commit, trust_remote_code=False)
    tokenizer.model_max_length = int(tokenizer.model_max_length)  # 512.0 is fine
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        source,
        config=config,  # else attention as config.json has it, perhaps the hub's code, would go before the argument
        revision=commit,
        trust_remote_code=False,
        dtype=dtype,
        attn_implementation="eager" if device.type == "cpu" else "sdpa",
        output_loading_info=True,
    )
    _refuse_untrained(name, loading)
    _refuse_tokens_without_rows(name, tokenizer, model)
    _warn_of_pickle(name, files.weights)
    identity = files.identity(folder) if folder else str(commit)
    model = _in_own_memory(model.to(device).eval())
    _refuse_without_padding(name, model)
    return LoadedCheckpoint(config, tokenizer, model, columns, identity, commit)


def device_of(name: str) -> torch.device:
    """The device that a setting names; ``auto`` is cuda where there is one, else cpu. Raises ModelError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device is {name}, but torch finds no CUDA device here; cpu works everywhere")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ModelError(f"device is {name}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _commit(name: str, revision: str | None) -> str:
    """The hub's commit that ``revision`` means now. Raises ModelError where neither hub nor cache tells."""
    config = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise ModelError(f"model {name} cannot be loaded: the hub has no config.json for it, or names no commit of it")
    return commit


def _find_on_hub(name: str, commit: str | None) -> Find:
    @cache  # each call is a request
    def find(file: str) -> Path | None:
        found = cached_file(name, file, revision=commit, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    return find


def _columns(name: str, config: Any) -> list[int]:
    """The places of negative, neutral and positive among the logits, by the checkpoint's names for them."""
    names = {str(label).strip().lower(): int(index) for index, label in (config.id2label or {}).items()}
    if set(names) != set(LABELS):
        labels = [str(label)[:MAX_CHARS] for label in (config.id2label or {}).values()]
        more = f" and {len(labels) - MAX_LABELS:,} more" if len(labels) > MAX_LABELS else ""
        listed = (", ".join(labels[:MAX_LABELS]) or "none") + more
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


def unknown_words_warning(name: str, tokenizer: Any, examples: Sequence[Ids]) -> str | None:
    """A warning if the tokenizer knows few words of the shipped reviews, else None. Raises ModelError if it knows none.

    ``examples``: the token ids of each review.
    """
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
    if count <= UNKNOWN_SHARE * len(words):
        return None
    return (
        f"model {name}: {count / len(words):.0%} of the tokens of the shipped Russian reviews are unknown to its tokenizer; "
        "is it the one that the model was trained with?"
    )


def _in_own_memory(model: Any) -> Any:
    """Copies weights on a CPU: they are pages of the file, and would change, or end the process, if it is overwritten."""
    if model.device.type == "cpu":
        for tensor in model.parameters():
            tensor.data = tensor.data.clone()
    return model


def _refuse_untrained(name: str, loading: Any) -> None:
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name} is no finished classifier: its file lacks {len(missing)} weights ({missing[0]}, …), which would "
            "be random"
        )


def _refuse_tokens_without_rows(name: str, tokenizer: Any, model: Any) -> None:
    """Refuses ids beyond the embeddings: on a GPU, one text with such a token breaks the device for all others."""
    highest, rows = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ModelError(
            f"model {name} cannot be used: its tokenizer gives ids up to {highest}, and its weights have {rows} embeddings"
        )


def _refuse_without_padding(name: str, model: Any) -> None:
    """Refuses a decoder without an id of padding: only by that it finds each text's end where it takes several at once."""
    ids = torch.zeros((2, 2), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except ValueError as error:
        raise ModelError(
            f"model {name} cannot be used: it takes no two texts at once ({str(error).strip()}); set pad_token_id in its "
            "config.json"
        ) from None


def _warn_of_pickle(name: str, weights: Sequence[str]) -> None:
    if any(file.endswith(".safetensors") for file in weights):
        return
    log.warning(
        "model %s comes as a .bin without safetensors: its tensors were read by torch's weights-only reader, which runs "
        "no code of the file",
        name,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and notices of transformers off the terminal inside, and leaves its settings as they were."""
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
