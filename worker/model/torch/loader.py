"""Loads a checkpoint with transformers: its tokenizer and its model in torch. Every function here blocks."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from worker.model.checkpoint import Checkpoint, ModelError, folder_of
from worker.model.library_errors import as_model_error
from worker.model.tokenizer import CheckpointTokenizer
from worker.model.tokenizer_checks import refuse_tokens_without_rows
from worker.model.torch.wrapped_tokenizer import wrap_tokenizer

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask the hub to convert a .bin
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from huggingface_hub.utils.tqdm import progress_bar_states
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

log = logging.getLogger(__name__)

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # else float32, whatever the file holds


def load_for_torch(checkpoint: Checkpoint, device: str, dtype: str) -> tuple[CheckpointTokenizer, Any]:
    """The tokenizer and the model of a checkpoint; the model is on ``device``, in ``dtype`` as in settings.

    Runs no code of the checkpoint. Raises ModelError for one that cannot be loaded, HubUnreachable.
    """
    with _quiet(), as_model_error(checkpoint.name, "loaded"):
        return _load(checkpoint, torch.device(device), DTYPES.get(dtype, torch.float32))


def load_transformers_tokenizer(checkpoint: Checkpoint) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint. Runs no code of it. Raises ModelError, HubUnreachable."""
    with _quiet(), as_model_error(checkpoint.name, "loaded"):
        return wrap_tokenizer(_tokenizer(checkpoint))


def _tokenizer(checkpoint: Checkpoint) -> Any:
    return AutoTokenizer.from_pretrained(_source(checkpoint), revision=checkpoint.commit, trust_remote_code=False)


def _source(checkpoint: Checkpoint) -> str:
    """The folder or the name on the hub, as transformers takes it."""
    return checkpoint.name if checkpoint.commit else str(folder_of(checkpoint.name, None) or checkpoint.name)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[CheckpointTokenizer, Any]:
    name, revision, source = checkpoint.name, checkpoint.commit, _source(checkpoint)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    tokenizer = _tokenizer(checkpoint)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        source,
        config=config,  # else attention as config.json has it, perhaps the hub's code, would go before the argument
        revision=revision,
        trust_remote_code=False,
        dtype=dtype,
        attn_implementation="eager" if device.type == "cpu" else "sdpa",
        output_loading_info=True,
    )
    _refuse_untrained(name, loading)
    wrapped = wrap_tokenizer(tokenizer)
    refuse_tokens_without_rows(name, wrapped, model.get_input_embeddings().weight.shape[0])
    _warn_of_pickle(name, checkpoint.weights)
    model = _in_own_memory(model.to(device).eval())
    _refuse_without_padding(name, model)
    return wrapped, model


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
