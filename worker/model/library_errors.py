"""Turns what transformers, safetensors, tokenizers and the hub's client raise about a checkpoint into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from worker.errors import UserError
from worker.model.checkpoint import MAX_CHARS, HubUnreachable, ModelError
from worker.model.tokenizer import panics_as_errors
from worker.runtime.memory import is_out_of_memory
from worker.settings.values import is_folder


@contextmanager
def as_model_error(name: str, what: str) -> Iterator[None]:
    """Raises ModelError "model ``name`` cannot be ``what``" for whatever a library raises inside, Rust's panics included.

    Raises HubUnreachable instead where the hub did not answer. UserErrors and a want of memory pass as they are.
    """
    try:
        with panics_as_errors():
            yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        is_local = is_folder(name) or name == "builtin"
        kind = HubUnreachable if not is_local and _is_connection_error(error) else ModelError
        raise kind(f"model {name} cannot be {what}: {_reason(error)[:MAX_CHARS]}") from error


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is one, by name: the hub's client has changed its HTTP library before."""
    names = {"ConnectionError", "TimeoutError", "TransportError"}
    while error is not None:
        if any(kind.__name__ in names for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    """What is wrong with the checkpoint and what to do, as far as the library's words are known; else its first line."""
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
